"""Load a model by name: bundled, from a folder, a run or the Hub, or converted from another library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddim._io.arguments import suggest_names
from ddim.model import hub, importers
from ddim.model.config import ModelConfig
from ddim.model.devices import usable
from ddim.model.model import Model
from ddim.names import DType
from ddim.nn.base import Network


@suggest_names
def load(
    name: str | Path,
    device: torch.device | str | None = None,
    *,
    hints: importers.CheckpointHints | None = None,
    dtype: DType = "auto",
    compile: bool = False,
    micro_batch: int | None = None,
    cuda_graphs: bool | None = None,
) -> Model:
    """Load a bundled model, a model folder, a run, or another library's model. No code in it is ever executed.

    Args:
        name: A bundled model's name, a path (also of a diffusers folder, or of a file of weights, see
            `ddim.model.importers`), or the name of a model on the Hub, "org/name".
        device: The device to compute on; by default a GPU if there is one, else the CPU.
        hints: Metadata that a file of weights lacks, such as the size of the images.
        dtype: The network's compute precision, see `ddim.names.DType`.
        compile: Whether to compile the network with torch.compile.
        micro_batch: The number of samples per network evaluation, see `Model`.
        cuda_graphs: Whether sampling replays CUDA graphs, see `Model`.

    Raises:
        DdimError: If there is no such model, it is damaged, or the device cannot be used.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    usable(device)
    config, network, notes = hub.read(hub.place(name), name, hints)
    settings: dict[str, Any] = {"micro_batch": micro_batch, "cuda_graphs": cuda_graphs}
    model = build_model(network, config, device, dtype=dtype, compile=compile, **settings)
    model.notes = notes
    return model


def build_model(network: nn.Module, config: ModelConfig, device: torch.device | str, **settings: Any) -> Model:
    """A model of a network and its configuration; the settings are those of `Model`."""
    assert isinstance(network, Network)
    return Model(network, config, device=device, **settings)
