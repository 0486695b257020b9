"""The error of a model at each time, E || eps - eps_theta ||^2 / d: measured on pictures, brought to all of 1..T.

It is what is left of the noise after the network's guess, hence what the optimal reverse variance is made of (Bao et
al. 2022). A training writes the table by itself; this is for models that have none.
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
from ddim.model.image import Model
from ddim.process.gaussian import diffuse
from ddim.process.rng import Noise
from ddim.process.schedule import Level, Schedule

DENSE = 10
FEWEST = 24
DIGITS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """The error at one time.

    Args:
        t: The time.
        error: Mean over pictures of || eps - eps_theta ||^2 / d.
        standard_error: Of that mean; nan for one picture.
    """

    t: int
    error: float
    standard_error: float


def choose_times(schedule: Schedule, count: int) -> list[int]:
    """At most `count` times at which to measure: 1..10, T, and the rest in equal steps of log-SNR.

    Where T is no more than that, all of them. Between them the table is interpolated linearly in t; on data whose
    error is known in closed form 100 of 1000 times are then right to 3 percent.

    Args:
        schedule: The model's.
        count: 24 or more, or T or more: with fewer, what lies between the times is a guess.

    Raises:
        DdimError: If `count` is too small.
    """
    if count >= schedule.T:
        return list(range(1, schedule.T + 1))
    if count < FEWEST:
        raise DdimError(f"times {count}", "is too few to interpolate between", f"give {FEWEST} or more")
    finite = schedule.log_snr[np.isfinite(schedule.log_snr)]
    even = np.linspace(finite[0], finite[-1], count - DENSE)
    nearest = 1 + np.abs(finite[:, None] - even).argmin(0)
    return sorted({*range(1, DENSE + 1), *(int(t) for t in nearest[:-1]), schedule.T})


def error_table(
    model: Model,
    pictures: Tensor | np.ndarray,
    times: Sequence[int],
    seed: int = 0,
    labels: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Measured]:
    """Measure the error at each time on all pictures, with one draw of noise for each picture and time.

    The noise of picture i at time t is a function of (seed, i, t).

    Args:
        model: The model, best in float32.
        pictures: uint8, (N, H, W, C), or float in [-1, 1], (N, C, H, W).
        times: Whole times in 1..T.
        seed: Of the noise.
        labels: The pictures' labels, (N,), to measure the conditional model.

    Yields:
        One `Measured` per time, in the order of `times`.

    Raises:
        DdimError: If there is no picture, or they are not of the model's shape, or labels do not fit it.
    """
    x0 = to_float(pictures) if pictures.dtype in (np.uint8, torch.uint8) else torch.as_tensor(pictures)
    if not len(x0) or x0.shape[1:] != model.shape:
        wrong = f"are {tuple(x0.shape)}, the model's are {model.shape}"
        raise DdimError("pictures", wrong, "give one or more of the model's shape")
    known = None if labels is None else torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    for t in times:
        level = model.schedule.level(t)
        parts = [_errors(model, x0, first, level, seed, known) for first in range(0, len(x0), model.micro_batch)]
        errors = torch.cat(parts)
        spread = float(errors.std()) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
        yield Measured(t, float(errors.mean()), spread)


@torch.no_grad()
def _errors(model: Model, x0: Tensor, first: int, level: Level, seed: int, labels: Tensor | None) -> Tensor:
    """The errors of one micro-batch, float64, (n,)."""
    places = range(first, min(first + model.micro_batch, len(x0)))
    eps = Noise(seed, tuple(places), model.shape, model.device).row(int(level.t) - 1)
    denoise = model.denoise if labels is None else model.denoiser(labels[first : places.stop])
    part = x0[first : places.stop].to(model.device, torch.float32)
    said: Tensor = denoise(diffuse(part, eps, level), level).eps
    return (said - eps).square().flatten(1).mean(1).cpu().double()


def complete(times: Sequence[int] | np.ndarray, errors: Sequence[float] | np.ndarray, T: int) -> tuple[float, ...]:
    """The error at t = 1..T: linear in t between the times measured, constant beyond them, to 5 significant digits.

    Args:
        times: Rising times in 1..T, (K,), at least one.
        errors: The error at each, (K,).
        T: How many times there are.
    """
    table = np.interp(np.arange(1, T + 1), times, errors)
    return tuple(float(f"{value:.{DIGITS}g}") for value in table)
