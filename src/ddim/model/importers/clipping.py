"""Whether plans that sample clip x_0 where nobody says, by where a model comes from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ddim.errors import DdimError, either
from ddim.model.config import ModelConfig

CLIPS = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")
"""Schedulers of diffusers that clip unless their configuration says otherwise."""


def clipping_of(config: ModelConfig) -> Callable[[], str] | None:
    """What `ddim.samplers.registry.Planner` asks of a model of images.

    A network that predicts eps is clipped, as the libraries clip that such networks come from: with small errors it
    makes no difference, with large ones samples are nearer to the data (docs/solvers.md). The DDIM authors' code does
    not clip, and a folder of diffusers does as its scheduler does, whatever its network predicts.

    Args:
        config: The model's configuration.

    Returns:
        A function that gives the reason to clip, or "" not to; it raises a DdimError for a scheduler that changes x_0
        in a way that no plan has. None where there is nothing to ask.
    """
    origin = config.origin.format if config.origin else ""
    if origin == "diffusers":
        return partial(_of_diffusers, config)
    if config.predicts != "eps" or config.categorical or origin == "official":
        return None
    return lambda: "as this network predicts eps"


def _of_diffusers(config: ModelConfig) -> str:
    """The reason to clip as the scheduler of a diffusers folder does."""
    assert config.origin is not None
    settings = config.origin.settings
    scheduler, what = settings.get("scheduler") or "scheduler", "clip_x0"
    hint = either("choose clip_x0=True", "clip_x0=False")
    if settings.get("thresholding"):
        raise DdimError(what, f"is not given, and the model's {scheduler} has thresholding, which no plan has", hint)
    if not settings.get("clip_sample", scheduler in CLIPS):
        return ""
    largest = settings.get("clip_sample_range", 1.0)
    if largest != 1:
        raise DdimError(what, f"is not given, and the model's {scheduler} clips to {largest}, plans to 1", hint)
    return f"as the model's {scheduler} did"
