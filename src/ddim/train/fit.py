"""Fitting a recipe to the length of a run and to the measured speed of this machine."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import torch

from ddim.data.image_set import ImageSet
from ddim.data.text import TextSet
from ddim.model.config import ModelConfig, TrainConfig
from ddim.model.modality import modality_of
from ddim.process import rng
from ddim.train.trainer import Trainer

WARMUP = 0.05  # fraction of the run for a warm-up that does not fit
LONGEST_WARMUP = 0.2  # a longer warm-up, as a fraction of the run, does not fit
MINUTES = 10  # longest time between checkpoints
MEASURED = 2.0  # seconds after which no further step is measured
SMALL = 4  # samples of a step on a CPU from which a longer one is estimated


def seconds_per_step(
    model: ModelConfig, recipe: TrainConfig, data: ImageSet | TextSet, device: torch.device | str
) -> float:
    """Measure the duration of an optimiser step on real data, without compilation.

    A step that takes long on a CPU is estimated from steps with 1 and 4 samples: a constant and a time per sample.

    Args:
        model: The model to train; a network with random weights is built for the measurement.
        recipe: Its recipe.
        data: The data set.
        device: The training device.
    """
    device, batch = torch.device(device), recipe.batch
    if device.type == "cpu" and batch > SMALL:
        one = _measure(model, recipe, data, device, 1)
        if one * batch > MEASURED * SMALL:  # a whole batch takes long even if its samples are that much faster
            several = _measure(model, recipe, data, device, SMALL)
            each = max((several - one) / (SMALL - 1), several / SMALL / SMALL)
            return several + each * (batch - SMALL)
    return _measure(model, recipe, data, device, batch)


def _measure(
    model: ModelConfig, recipe: TrainConfig, data: ImageSet | TextSet, device: torch.device, batch: int
) -> float:
    """The shortest duration of up to two steps after a first one, which prepares kernels."""
    accumulate = recipe.accumulate if batch == recipe.batch else 1
    changes = {"batch": batch, "accumulate": accumulate, "compile": False, "steps": 3, "budget": None, "warmup": 0}
    trainer = _trainer(model, recipe.model_copy(update=changes | {"data_on": "host"}), data, device)
    durations: list[float] = []
    with contextlib.closing(trainer.loader.batches(0)) as batches:
        trainer.update(*next(batches))
        while len(durations) < 2 and sum(durations) < MEASURED:
            _wait(device)
            start = time.monotonic()
            trainer.update(*next(batches))
            _wait(device)
            durations.append(time.monotonic() - start)
    return min(durations)


def _trainer(model: ModelConfig, recipe: TrainConfig, data: ImageSet | TextSet, device: torch.device) -> Trainer:
    modality = modality_of(model)
    with rng.temporary_seed("cpu", recipe.seed):
        network = model.network.build().to(device)
    classes = model.network.classes
    loss = modality.loss(recipe.gamma, device, recipe.times)
    labels = data.labels if classes else None
    return Trainer(network, loss, data.batch, len(data), recipe, labels, classes, modality.read)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def expected_steps(recipe: TrainConfig, seconds: float) -> int:
    """The number of steps that a run will have, at `seconds` per step; at least 1."""
    limits = [] if recipe.steps is None else [float(recipe.steps)]
    if recipe.budget is not None:
        limits.append(0.95 * recipe.budget / seconds)  # the rest is for previews, checkpoints and the start
    return max(1, int(min(limits)))


@dataclass(frozen=True, slots=True)
class Change:
    """A setting of a recipe that was scaled to the run.

    Args:
        name: Name of the setting in `TrainConfig`.
        before: Its value in the recipe.
        value: Its value for this run.
    """

    name: str
    before: int
    value: int


def fit_to_length(recipe: TrainConfig, steps: int, seconds: float, fixed: Any = ()) -> list[Change]:
    """The settings of a recipe that do not fit a run of this length, scaled to it.

    The warm-up is scaled if it is longer than a fifth of the run. In a run of a minute or more, previews come at least
    four times, lines of metrics 20 times, and checkpoints every ten minutes. The EMA needs no scaling: its decay after
    n updates is at most (1 + n) / (10 + n), see `ddim.nn.EMA`.

    Args:
        recipe: The recipe.
        steps: Number of steps of the run.
        seconds: Seconds per step.
        fixed: Names of settings that are not changed.
    """
    wanted = {"warmup": recipe.warmup if recipe.warmup <= LONGEST_WARMUP * steps else max(1, round(WARMUP * steps))}
    if steps * seconds >= 60:
        wanted["checkpoint_every"] = min(recipe.checkpoint_every, max(1, int(60 * MINUTES / seconds)))
        wanted["preview_every"] = min(recipe.preview_every, max(1, steps // 4))
        wanted["log_every"] = min(recipe.log_every, max(1, steps // 20))
    changes = [Change(name, getattr(recipe, name), value) for name, value in wanted.items() if name not in fixed]
    return [change for change in changes if change.value != change.before]
