"""Load a model by name: bundled, from a folder, a run or the Hub, or converted from another library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from ddim._io.arguments import suggest_names
from ddim.errors import DdimError, shorten
from ddim.model import checkpoint, hub, importers
from ddim.model.config import ModelConfig
from ddim.model.devices import usable
from ddim.model.model import Model
from ddim.model.wrap import Wrapped, wrap
from ddim.names import DType
from ddim.nn.base import Network
from ddim.process import rng


@overload
def load(
    name: str | Path,
    device: torch.device | str | None = None,
    *,
    network: None = None,
    hints: importers.CheckpointHints | None = None,
    dtype: DType = "auto",
    compile: bool = False,
    micro_batch: int | None = None,
    cuda_graphs: bool | None = None,
) -> Model: ...


@overload
def load(
    name: str | Path,
    device: torch.device | str | None = None,
    *,
    network: nn.Module,
    micro_batch: int | None = None,
) -> Wrapped: ...


@suggest_names
def load(
    name: str | Path,
    device: torch.device | str | None = None,
    *,
    network: nn.Module | None = None,
    hints: importers.CheckpointHints | None = None,
    dtype: DType = "auto",
    compile: bool = False,
    micro_batch: int | None = None,
    cuda_graphs: bool | None = None,
) -> Model | Wrapped:
    """Load a bundled model, a model folder, a run, or another library's model. No code in it is ever executed.

    Args:
        name: A bundled model's name, a path (also of a diffusers folder, or of a file of weights, see
            `ddim.model.importers`), or the name of a model on the Hub, "org/name".
        device: The device to compute on; by default a GPU if there is one, else the CPU.
        network: For a run of `ddim.fit`, the network that its weights are loaded into, constructed as for training. It
            is not needed if `ddim.fit` built the network itself. The result is then a `Wrapped`.
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
    place = hub.place(name)
    if checkpoint.has_network(place):
        if hints is not None or dtype not in ("auto", "float32") or compile or cuda_graphs:
            raise DdimError(name, "is a network of ddim.fit", "pass no hints, dtype, compile or cuda_graphs")
        return load_network(place, network, device, micro_batch)
    if network is not None:
        raise DdimError(name, "is not a run of ddim.fit, and has a network itself", "leave out network=")
    config, built, notes = hub.read(place, name, hints)
    settings: dict[str, Any] = {"micro_batch": micro_batch, "cuda_graphs": cuda_graphs}
    model = build_model(built, config, device, dtype=dtype, compile=compile, **settings)
    model.notes = notes
    return model


def load_network(
    name: str | Path,
    network: nn.Module | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
) -> Wrapped:
    """Load the weights of a run of `ddim.fit` into a network, and wrap it. No code that the folder names is imported.

    Args:
        name: The folder of the run, or its model folder.
        network: The network; None if `ddim.fit` built it itself.
        device: The device to compute on; by default that of the network.
        micro_batch: The number of samples per network evaluation, see `ddim.wrap`.

    Raises:
        DdimError: If the network is missing or does not fit the weights.
    """
    config, weights = checkpoint.read_network(name)
    if network is None and config.unet is None:
        arguments = "" if config.arguments is None else f" with {shorten(json.dumps(config.arguments))}"
        problem = f"has the weights of a {config.network}{arguments}, which is not built from a file"
        raise DdimError(name, problem, "construct it, and pass it as network=")
    if network is None:
        assert config.unet is not None
        with rng.temporary_seed("cpu", 0):
            network = config.unet.build()
    checkpoint.fill(network, weights, name, "construct the network as for training")
    network = network.eval().to(network_device(network) if device is None else usable(device))
    schedule = config.build_schedule()
    return wrap(network, schedule, predicts=config.predicts, shape=config.shape, micro_batch=micro_batch)


def network_device(network: nn.Module) -> torch.device:
    """The device of a network's first parameter, the CPU if it has none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def build_model(network: nn.Module, config: ModelConfig, device: torch.device | str, **settings: Any) -> Model:
    """A model of a network and its configuration; the settings are those of `Model`."""
    assert isinstance(network, Network)
    return Model(network, config, device=device, **settings)
