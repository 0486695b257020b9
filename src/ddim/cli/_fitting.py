"""Fits a training's recipe to its length and to this machine's speed, and prints what was changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._recipe import configure
from ddim.errors import DdimError, warn

if TYPE_CHECKING:
    from ddim.data import ImageSet
    from ddim.data.text import TextSet
    from ddim.model.config import ModelConfig, TrainConfig
    from ddim.train.presets import Preset
    from ddim.train.run_config import RunConfig

_NAMES = {"warmup": "warm-up", "checkpoint_every": "checkpoints every", "preview_every": "previews every"}
_NAMES |= {"log_every": "metrics every"}
FEW = 100  # with fewer steps, a network learns nothing
DAY = 24 * 3600.0
Changes = dict[str, dict[str, Any]]


def fitted(
    name: str, recipe: Preset, changes: Changes, predicts: str | None, data: ImageSet | TextSet, device: str, out: Path
) -> tuple[ModelConfig, TrainConfig]:
    """The configurations of a run, with what does not fit its length scaled and printed.

    A run that exists keeps the settings with which it was started.

    Args:
        name: Name of the preset.
        recipe: The preset.
        changes: The settings given by the user; they are not changed.
        predicts: The prediction given by the user.
        data: The data set.
        device: The training device.
        out: The run directory.

    Raises:
        DdimError: If a warm-up given by the user is longer than half of the run.
    """
    from ddim.train import fit
    from ddim.train.run_config import RunConfig, read_run

    if (stored := read_run(out, RunConfig)) is not None:
        return configure(_as_started(name, recipe, stored), changes, predicts)
    measured = None
    if name == "photos":
        recipe, measured = _photos(recipe, changes, predicts, data, device)
    model, train = configure(recipe, changes, predicts)
    seconds = measured or fit.seconds_per_step(model, train, data, device)
    steps = fit.expected_steps(train, seconds)
    given = changes["train"]
    if train.warmup > steps / 2 and "warmup" in given:
        problem = f"is more than half of the run, about {steps} steps"
        raise DdimError(f"--warmup {train.warmup}", problem, f"use --warmup {max(1, steps // 20)}, or leave it out")
    _say_whether_it_ends(name, model, train, steps, seconds)
    fitting = fit.fit_to_length(train, steps, seconds, given)
    if fitting:
        scaled = ", ".join(f"{_NAMES[each.name]} {each.value} steps, not {each.before}" for each in fitting)
        click.echo(f"fitted to about {steps} steps: {scaled}", err=True)
    return model, train.model_copy(update={each.name: each.value for each in fitting})


def _as_started(name: str, recipe: Preset, stored: RunConfig) -> Preset:
    """The preset with the fitted settings of an existing run."""
    keys = [*_NAMES, *(("batch", "lr") if name == "photos" else ())]
    train = recipe.train.model_copy(update={key: getattr(stored.train, key) for key in keys})
    update: dict[str, Any] = {"train": train}
    if name == "photos" and len(stored.model.data.shape) == 3:
        update |= {"network": stored.model.network, "data": stored.model.data}
    return recipe.model_copy(update=update)


def _photos(
    recipe: Preset, changes: Changes, predicts: str | None, data: ImageSet | TextSet, device: str
) -> tuple[Preset, float]:
    """The preset `photos` at the scale that suits the budget or steps and the measured speed, and seconds per step."""
    from ddim.train import fit, photos

    policy: Any = data.policy

    def at(scale: photos.Scale, steps: int = 1000) -> Preset:
        network = type(recipe.network)(**photos.network(scale, policy))
        train = recipe.train.model_copy(update=photos.recipe(scale, steps))
        return recipe.model_copy(update={"network": network, "data": policy, "train": train})

    def measure(scale: photos.Scale) -> float:
        return fit.seconds_per_step(*configure(at(scale), changes, predicts), data, device)

    _, train = configure(at(photos.SCALES[0]), changes, predicts)
    limit = math.inf if train.budget else photos.NIGHT
    scale, seconds = photos.choose(measure, lambda seconds: fit.expected_steps(train, seconds), limit)
    steps = fit.expected_steps(train, seconds)
    chosen = at(scale, steps)
    model, train = configure(chosen, changes, predicts)
    text = f"photos: {model.network}, {_millions(model)}; batch {train.batch}, warm-up {train.warmup} of about {steps} "
    click.echo(f"{text}steps, a preview every {train.preview_every}", err=True)
    return chosen, seconds


def _say_whether_it_ends(name: str, model: ModelConfig, train: TrainConfig, steps: int, seconds: float) -> None:
    """Warn before a run that will take days, or that has time for a few steps only."""
    hint = "" if name == "photos" or len(model.data.shape) == 1 else "try --preset photos --budget "
    if train.budget is None and steps * seconds > DAY:
        days = steps * seconds / DAY
        warn(f"{_millions(model)}, {steps:,} steps: about {days:.0f} days on this machine", hint and f"{hint}30min")
    elif train.budget is not None and steps < FEW and (train.steps is None or steps < train.steps):
        budget = f"{train.budget:g}s"
        warn(f"{_millions(model)}: about {steps} steps in {budget}, too few to learn", hint and hint + budget)


def _millions(model: ModelConfig) -> str:
    return f"{model.network.parameters / 1e6:.1f} M parameters"
