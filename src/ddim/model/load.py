"""Load a model by name: bundled, from a folder or a run, from the hub, or another library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddim.model import hub, importers
from ddim.model.config import ModelConfig
from ddim.model.devices import usable
from ddim.model.image import Model
from ddim.model.tokens import TokenModel
from ddim.nn.base import Network


def load(
    name: str | Path,
    device: torch.device | str | None = None,
    hints: importers.CheckpointHints | None = None,
    **settings: Any,
) -> Model | TokenModel:
    """A model: bundled, a model folder, a run's folder, or one of another code. Nothing in it is ever executed.

    Args:
        name: A bundled model's name, a path (also of a diffusers folder, or of a file of weights, see
            `ddim.model.importers`), or the name of a model on the hub, "org/name".
        device: Where it computes; a GPU if there is one, else the CPU.
        hints: What a file of weights does not say of itself, such as its pictures' size.
        settings: dtype, compile, micro_batch, cuda_graphs: see `Model`.

    Raises:
        DdimError: If there is no such model, it is damaged, or the device cannot be used.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    usable(device)
    config, network, notes = hub.read(hub.place(name), name, hints)
    model = build_model(network, config, device, **settings)
    model.notes = notes
    return model


def build_model(
    network: nn.Module, config: ModelConfig, device: torch.device | str, **settings: Any
) -> Model | TokenModel:
    """A network and its configuration as a model of its kind; settings: as for `ModelBase`."""
    assert isinstance(network, Network)
    return (TokenModel if config.categorical else Model)(network, config, device, **settings)
