"""The default of clip_x0 when sampling, which depends on the library that a model was converted from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ddim.errors import DdimError, either
from ddim.model.config import ModelConfig

CLIPS = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")
"""Schedulers of diffusers that clip by default."""


def clipping_of(config: ModelConfig) -> Callable[[], str] | None:
    """The clipping rule of a model of images, for `ddim.samplers.registry.Planner`.

    With a network that predicts eps, x_0 is clipped, as in most libraries: with small errors clipping makes no
    difference, with large errors samples are closer to the data (docs/solvers.md). Models of the DDIM authors' code
    are not clipped, and models of diffusers follow their scheduler, whatever their network predicts.

    Args:
        config: The model's configuration.

    Returns:
        A function that returns the reason to clip, or "" for no clipping; it raises a DdimError for a scheduler that
        changes x_0 in a way that plans do not support. None if no rule applies.
    """
    origin = config.origin.format if config.origin else ""
    if origin == "diffusers":
        return partial(_of_diffusers, config)
    if config.predicts != "eps" or config.categorical or origin == "official":
        return None
    return lambda: "as this network predicts eps"


def _of_diffusers(config: ModelConfig) -> str:
    """The reason to clip, or "", according to the scheduler of a diffusers folder."""
    assert config.origin is not None
    settings = config.origin.settings
    scheduler, subject = settings.get("scheduler") or "scheduler", "clip_x0"
    hint = either("use clip_x0=True", "clip_x0=False")
    if settings.get("thresholding"):
        raise DdimError(
            subject, f"is not set, and the model's {scheduler} uses thresholding, which plans do not support", hint
        )
    if not settings.get("clip_sample", scheduler in CLIPS):
        return ""
    largest = settings.get("clip_sample_range", 1.0)
    if largest != 1:
        raise DdimError(subject, f"is not set, and the model's {scheduler} clips to {largest}, plans to 1", hint)
    return f"as the model's {scheduler} did"
