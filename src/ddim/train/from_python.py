"""`fit`: train any network on data of any shape, in a run folder that can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

import ddim
from ddim._io.arguments import suggest_names
from ddim.errors import DdimError
from ddim.model import checkpoint
from ddim.model.config import TrainConfig, build
from ddim.model.devices import usable
from ddim.model.load import load_network
from ddim.model.network_config import NetworkConfig
from ddim.model.wrap import Wrapped, schedule_of
from ddim.names import LossWeight, Predicts
from ddim.nn.unet import UNetConfig
from ddim.objective.mse import Objective
from ddim.process import rng
from ddim.process.schedule import Schedule
from ddim.train.batches import Data, first_entry, is_stream
from ddim.train.logger import Logger
from ddim.train.run import Report, TrainingLoop, train
from ddim.train.run_config import NetworkRunConfig
from ddim.train.trainer import Trainer, read_data

STEPS = 10_000
"""The default number of optimizer steps."""
_GAMMAS: dict[Predicts, LossWeight] = {"eps": "simple", "x0": "x0", "v": "v"}


@suggest_names
def fit(
    data: Data,
    network: nn.Module | None = None,
    *,
    out: str | Path,
    predicts: Predicts = "v",
    schedule: Schedule | str | Sequence[float] | np.ndarray | Tensor = "linear",
    steps: int | None = None,
    budget: float | None = None,
    batch: int | None = None,
    lr: float = 1e-3,
    loss_weight: LossWeight | None = None,
    flip: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    log: str | Logger | None = None,
    checkpoint_every: int = 1000,
    arguments: Mapping[str, Any] | None = None,
) -> Wrapped:
    """Train a network on data of any shape, and return it ready to sample.

    Everything is written to the folder `out`. Calling it again with the same arguments resumes the run, or returns its
    network if it has ended; `ddim.load(out, network=network)` loads it later. The network that was passed is trained in
    place, and ends with the exponential moving average of its weights.

    Args:
        data: A tensor, array, Dataset, DataLoader or iterable of batches, see `ddim.train.batches.Data`: floats
            (N, ...), scaled to about [-1, 1].
        network: Called as network(x, t - 1) with x (B, ...) and int64 times in 0..T - 1 (B,); returns the shape of x.
            If None, a U-Net is built, for images (C, H, W).
        out: The run directory, created or resumed.
        predicts: What the network learns to predict: "eps", "x0" or "v".
        schedule: The noise schedule, its name, or betas (T,).
        steps: The number of optimizer steps; 10,000 if neither this nor a budget is passed.
        budget: The time for everything, in seconds, instead of the steps; with both, whichever ends first.
        batch: Samples per step, 128 by default; a DataLoader or iterable has its own.
        lr: The learning rate. It rises over the first steps, and decays along a cosine over the last 30 %.
        loss_weight: See `ddim.objective.mse.weights`; by default the error of the output is not weighted.
        flip: Whether images (C, H, W) are flipped left-right at random.
        seed: The seed of all randomness, except that of a DataLoader.
        device: The device to train on; by default that of the network's first parameter, or a GPU if there is one for
            the U-Net.
        log: "tensorboard", "wandb", "mlflow", "none" or a `ddim.train.logger.Logger`; by default TensorBoard if it is
            installed. Metrics are always written to metrics.jsonl.
        checkpoint_every: Steps between checkpoints.
        arguments: The arguments that the network was constructed with, recorded in the folder; JSON values.

    Raises:
        DdimError: If an argument is invalid, `out` holds another run, or the loss is not finite.
    """
    table, stream = schedule_of(schedule), is_stream(data)
    if stream and batch is not None:
        raise DdimError("batch", "is that of the DataLoader or iterable", "leave it out")
    first = _first_batch(data)
    shape, unet = tuple(first.shape[1:]), None
    if network is None:
        unet = _unet(shape)
        with rng.temporary_seed("cpu", seed):
            network = unet.build()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = _place(network, device)
    model = _model(network, table, predicts, shape, arguments, unet)
    every = {"checkpoint_every": checkpoint_every, "preview_every": 0, "keep": 2}
    length = {"steps": STEPS if steps is None and budget is None else steps, "budget": budget}
    recipe = {"warmup": min(500, max((length["steps"] or 2000) // 20, 1)), "decay": "cosine", "ema_half_life": 0.05}
    size = {"batch": len(first) if stream else 128 if batch is None else batch, "lr": lr, "flip": flip, "seed": seed}
    gamma = {"gamma": loss_weight or _GAMMAS[predicts], "precision": "float32"}
    config = NetworkRunConfig(
        kind="fit",
        data=type(data).__name__,
        data_fingerprint=_fingerprint(data, first),
        model=model,
        train=build(TrainConfig, {**length, **recipe, **size, **every, **gamma}, "fit"),
    )
    if flip and len(shape) != 3:
        raise DdimError("flip", f"is for images (C, H, W), but samples are {shape}", "leave it out")
    loop = _loop_of(network.to(place), table)
    _show(train(Path(out), config, data, place, log=log, loop_type=loop))
    return load_network(out, None if unet else network, place)


def _first_batch(data: Data) -> Tensor:
    """The first batch, or the first sample as a batch; float, (B, ...)."""
    if isinstance(data, Iterator):
        hint = "pass an object that can be iterated again, such as a DataLoader"
        raise DdimError("data", "can be iterated only once", hint)
    if is_stream(data):
        assert isinstance(data, Iterable)
        item = next(iter(data), None)
        first = None if item is None else first_entry(item)
    else:
        indexed: Any = data
        first = first_entry(indexed[0])[None] if len(indexed) else None
    if first is None or first.ndim < 2:
        problem = "have no samples" if first is None else "have samples without a dimension"
        raise DdimError("data", problem, "pass samples (N, ...), such as (N, 2) or (N, 3, 32, 32)")
    return _floats(first)


def _floats(batch: Tensor) -> Tensor:
    if not batch.is_floating_point():
        name = str(batch.dtype).removeprefix("torch.")
        raise DdimError("data", f"are {name}", "convert to floats in about [-1, 1], such as x / 127.5 - 1")
    return read_data(batch)


def _unet(shape: tuple[int, ...]) -> UNetConfig:
    if len(shape) != 3:
        problem = f"is needed for samples of shape {shape}; only images (C, H, W) have a default"
        raise DdimError("network", problem, "pass a module, called as network(x, t)")
    channels, height, width = shape
    sizes = {"in_channels": channels, "height": height, "width": width}
    settings = {"channels": 64, "multipliers": (1, 2), "blocks": 1, "dropout": 0.0}
    patch = 2 if height >= 16 and height % 4 == width % 4 == 0 else 1
    attention = (height // patch // 2,)
    return build(UNetConfig, {**sizes, **settings, "patch": patch, "attention": attention}, "network")


def _place(network: nn.Module, device: torch.device | str | None) -> torch.device:
    first = next((parameter for parameter in network.parameters() if parameter.requires_grad), None)
    if first is None:
        raise DdimError("network", "has no parameter to train", "pass a module with parameters")
    return first.device if device is None else usable(device)


def _model(
    network: nn.Module,
    schedule: Schedule,
    predicts: Predicts,
    shape: tuple[int, ...],
    arguments: Mapping[str, Any] | None,
    unet: UNetConfig | None,
) -> NetworkConfig:
    try:
        plain = None if arguments is None else json.loads(json.dumps(dict(arguments)))
    except (TypeError, ValueError) as error:
        raise DdimError("arguments", f"are not JSON ({error})", "pass numbers, texts, lists and dictionaries") from None
    path = f"{type(network).__module__}:{type(network).__qualname__}"
    values = {"schedule": schedule.name, "log_snr": schedule.log_snr.tolist(), "predicts": predicts, "shape": shape}
    return build(NetworkConfig, {**values, "network": path, "arguments": plain, "unet": unet}, "fit")


def _fingerprint(data: Data, first: Tensor) -> str:
    """A hash of the content of a tensor or array; of the type, length and shape of other data."""
    digest = hashlib.sha256()
    if isinstance(data, Tensor | np.ndarray):
        array = data.detach().cpu().numpy() if isinstance(data, Tensor) else data
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    else:
        sized: Any = data.dataset if isinstance(data, DataLoader) else data
        length = len(sized) if hasattr(sized, "__len__") else None
        digest.update(f"{type(sized).__qualname__} {length} {tuple(first.shape[1:])}".encode())
    return digest.hexdigest()


def _loop_of(network: nn.Module, schedule: Schedule) -> type[TrainingLoop]:
    class NetworkLoop(TrainingLoop):
        """The training loop of a user's network."""

        @override
        def _new_trainer(self, weights: Mapping[str, Tensor] | None) -> Trainer:
            recipe = self.config.train
            objective = Objective(schedule, self.config.model.predicts, recipe.gamma, self.device, recipe.times)
            return Trainer(network, objective, self.images, recipe=recipe, read=_floats)

        @override
        def _exported(self) -> int | None:
            if checkpoint.has_network(self.folder / "model"):
                return checkpoint.read_network(self.folder / "model")[0].steps
            return None

        @override
        def _model_config(self) -> NetworkConfig:
            update = {"steps": self.trainer.step, "seconds": round(self.seconds, 1), "software": ddim.__version__}
            model: NetworkConfig = self.config.model.model_copy(update=update)
            return model

    return NetworkLoop


def _show(reports: Iterator[Report]) -> None:
    """Run a training with a progress bar, if this is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_interactive) as bar:
        task = bar.add_task("training", total=None, state="")
        for report in reports:
            state = f"step {report.step}, loss {report.loss:.4f}"
            bar.update(task, completed=report.step, total=report.steps, state=state)
