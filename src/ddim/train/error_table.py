"""Mean squared error of eps at each timestep, E || eps - eps_theta ||^2 / d, measured on images for t in 1..T.

The optimal reverse variance is computed from it (Bao et al. 2022). Training writes this table; the functions here are
for models that have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddim.data.pixels import to_float
from ddim.errors import DdimError
from ddim.model.model import Model
from ddim.process.gaussian import diffuse
from ddim.process.rng import Noise
from ddim.process.schedule import Level, Schedule

DENSE = 10
MIN_TIMESTEPS = 24
DIGITS = 5


@dataclass(frozen=True, slots=True)
class TimestepMSE:
    """The error at one timestep.

    Args:
        t: The timestep.
        error: Mean over images of || eps - eps_theta ||^2 / d.
        standard_error: Standard error of that mean; nan for a single image.
    """

    t: int
    error: float
    standard_error: float


def choose_timesteps(schedule: Schedule, count: int) -> list[int]:
    """At most `count` timesteps at which to measure: 1..10, T, and the rest evenly spaced in log-SNR.

    All of 1..T if T <= `count`. The table is interpolated linearly in t between them; with 100 of 1000 timesteps the
    interpolated error is accurate to 3 percent on data with a closed-form error.

    Args:
        schedule: The model's schedule.
        count: At least 24, or at least T; fewer are too few to interpolate.

    Raises:
        DdimError: If `count` is too small.
    """
    if count >= schedule.T:
        return list(range(1, schedule.T + 1))
    if count < MIN_TIMESTEPS:
        raise DdimError(f"times {count}", "is too few to interpolate", f"use {MIN_TIMESTEPS} or more")
    finite = schedule.log_snr[np.isfinite(schedule.log_snr)]
    even = np.linspace(finite[0], finite[-1], count - DENSE)
    nearest = 1 + np.abs(finite[:, None] - even).argmin(0)
    return sorted({*range(1, DENSE + 1), *(int(t) for t in nearest[:-1]), schedule.T})


def error_table(
    model: Model,
    images: Tensor | np.ndarray,
    times: Sequence[int],
    seed: int = 0,
    labels: Sequence[int] | np.ndarray | None = None,
) -> Iterator[TimestepMSE]:
    """Measure the error at each timestep over all images, with one noise sample per image and timestep.

    The noise of image i at timestep t is a function of (seed, i, t).

    Args:
        model: The model, preferably in float32.
        images: uint8, (N, H, W, C), or float in [-1, 1], (N, C, H, W).
        times: Integer timesteps in 1..T.
        seed: Seed of the noise.
        labels: Labels of the images, (N,), to measure the conditional model.

    Yields:
        One `TimestepMSE` per timestep, in the order of `times`.

    Raises:
        DdimError: If there are no images, their shape is not the model's, or the labels do not fit the model.
    """
    x0 = to_float(images) if images.dtype in (np.uint8, torch.uint8) else torch.as_tensor(images)
    if not len(x0) or x0.shape[1:] != model.shape:
        problem = f"have shape {tuple(x0.shape)}, not (N, *{model.shape})"
        raise DdimError("images", problem, "pass at least one image of the model's shape")
    label_tensor = None if labels is None else torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    for t in times:
        level = model.schedule.level(t)
        parts = [_errors(model, x0, first, level, seed, label_tensor) for first in range(0, len(x0), model.micro_batch)]
        errors = torch.cat(parts)
        spread = float(errors.std()) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
        yield TimestepMSE(t, float(errors.mean()), spread)


@torch.no_grad()
def _errors(model: Model, x0: Tensor, first: int, level: Level, seed: int, labels: Tensor | None) -> Tensor:
    """The errors of one micro-batch, float64, (n,)."""
    indices = range(first, min(first + model.micro_batch, len(x0)))
    eps = Noise(seed, tuple(indices), model.shape, model.device).row(int(level.t) - 1)
    denoise = model.denoise if labels is None else model.denoiser(labels[first : indices.stop])
    part = x0[first : indices.stop].to(model.device, torch.float32)
    predicted: Tensor = denoise(diffuse(part, eps, level), level).eps
    return (predicted - eps).square().flatten(1).mean(1).cpu().double()


def interpolate(times: Sequence[int] | np.ndarray, errors: Sequence[float] | np.ndarray, T: int) -> tuple[float, ...]:
    """The error at t = 1..T, rounded to 5 significant digits: linear interpolation in t, constant extrapolation.

    Args:
        times: Increasing timesteps in 1..T, (K,), at least one.
        errors: The error at each timestep, (K,).
        T: Number of timesteps.
    """
    table = np.interp(np.arange(1, T + 1), times, errors)
    return tuple(float(f"{value:.{DIGITS}g}") for value in table)
