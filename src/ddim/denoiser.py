"""The hub between what a network predicts and what a sampler needs.

A denoiser is any callable `denoise(x, level) -> Prediction`; the pair it returns is always consistent,
x = signal x0 + noise eps. Samplers never learn what the network predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.row import Linear
from ddim.schedule import Level, Scales
from ddim.table import Hook as Hook
from ddim.table import Table

Predicts = Literal["eps", "x0", "v"]
Number = TypeVar("Number", Tensor, float)
Guidance = float | Callable[[Level], float]
"""A scale of classifier-free guidance, or one for each level; see `ddim.guidance`."""


class Prediction:
    """What a denoiser says of x_t.

    Args:
        x0: The predicted clean data f_theta, the shape of x_t.
        eps: The predicted noise, the shape of x_t.
        fraction: Where between its bounds the log-variance of a step lies, 0 (lower) to 1, the shape of x_t; None of a
            network that does not say (Nichol & Dhariwal 2021, eq. (15) there).
    """

    __slots__ = ("_eps", "_x0", "fraction", "linear")

    def __init__(self, x0: Tensor, eps: Tensor, fraction: Tensor | None = None):
        self._x0: Tensor | None = x0
        self._eps: Tensor | None = eps
        self.fraction = fraction
        self.linear: Linear | None = None

    @staticmethod
    def of(linear: Linear) -> Prediction:
        """x_0 and eps as sums of x_t and a network's output, made when they are asked for.

        A row of a plan is a sum of such sums, and asks for neither: `linear` is kept for it.
        """
        made = Prediction.__new__(Prediction)
        made._x0 = made._eps = None
        made.fraction, made.linear = None, linear
        return made

    @property
    def x0(self) -> Tensor:
        """The predicted clean data."""
        if self._x0 is None:
            assert self.linear is not None
            self._x0 = self.linear.sum(self.linear.of_x0)
        return self._x0

    @property
    def eps(self) -> Tensor:
        """The predicted noise."""
        if self._eps is None:
            assert self.linear is not None
            self._eps = self.linear.sum(self.linear.of_eps)
        return self._eps

    def with_x0(self, x0: Tensor, x: Tensor, level: Level) -> Prediction:
        """The prediction with another x_0, eps being derived again so that the pair stays consistent at x_t."""
        return Prediction(x0, eps_from_x0(x0, x, level), self.fraction)

    def towards(self, other: Prediction, scale: float) -> Prediction:
        """The prediction on the line from this one, at scale 0, through the other, at 1; the other's `fraction`."""
        return Prediction(self.x0.lerp(other.x0, scale), self.eps.lerp(other.eps, scale), other.fraction)


AnyDenoiser = Callable[[Tensor, Level], Any]
"""A denoiser of any kind of data: its prediction has `x0`, `with_x0` and `towards`, as `Prediction` has."""


class Denoiser(Protocol):
    """Anything that predicts x_0 and eps from x_t."""

    def __call__(self, x: Tensor, level: Level, /) -> Prediction:
        """The prediction at x (N, ...) and one level."""
        ...


def predict(output: Tensor, x: Tensor, level: Level, predicts: Predicts) -> Prediction:
    """A network's output as a consistent pair, whatever it predicts.

    Args:
        output: The network's output, the shape of x.
        x: x_t.
        level: The level of x_t.
        predicts: "eps", "x0" or "v" with v = signal eps - noise x0 (Salimans & Ho 2022).

    Raises:
        ValueError: If `predicts` is unknown, eps is predicted where there is no signal, or x_0 where there is no noise.
    """
    if predicts == "eps":
        if level.signal == 0:
            raise ValueError("eps says nothing about x0 at zero signal; use a network that predicts v or x0")
        of_x0 = (x0_from_eps(0.0, 1.0, level), x0_from_eps(1.0, 0.0, level))
        return Prediction.of(Linear(x, output, of_x0, (0.0, 1.0)))
    if predicts == "x0":
        if level.noise == 0:
            raise ValueError("x0 says nothing about eps at zero noise")
        of_eps = (eps_from_x0(0.0, 1.0, level), eps_from_x0(1.0, 0.0, level))
        return Prediction.of(Linear(x, output, (0.0, 1.0), of_eps))
    if predicts == "v":
        signal, noise = level.signal, level.noise
        return Prediction.of(Linear(x, output, (signal, -noise), (noise, signal)))
    raise ValueError(f"unknown prediction {predicts!r}")


def x0_from_eps(eps: Number, x: Number, level: Level) -> Number:
    """Eq. (9): f_theta(x_t) = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t).

    Args:
        eps: Predicted noise, the shape of x.
        x: x_t.
        level: The level of x_t, with signal.
    """
    return (x - eps * level.noise) / level.signal


def eps_from_x0(x0: Number, x: Number, level: Level) -> Number:
    """The eps that makes (x0, eps) consistent at x_t; the inverse of eq. (9). Needs noise > 0."""
    return (x - x0 * level.signal) / level.noise


def v_from_pair(x0: Tensor, eps: Tensor, level: Scales) -> Tensor:
    """v = signal eps - noise x0 (Salimans & Ho 2022)."""
    return eps * level.signal - x0 * level.noise


@dataclass(frozen=True, slots=True)
class Hooked:
    """A denoiser whose x_0 goes through a hook; the rest of the prediction follows it, see `Prediction.with_x0`.

    Args:
        denoiser: The denoiser to wrap.
        hook: `hook(x0, level) -> x0`, the shape kept; see `ddim.hooks`.
        eps_kept: Whether the rest stays as predicted instead, which is what some other codes do, see `ddim.emulate`.
        checked: Whether what the hook gives is checked at each call; for a plan's own hook it is not.
    """

    denoiser: AnyDenoiser
    hook: Hook
    eps_kept: bool = False
    checked: bool = True

    def __call__(self, x: Tensor, level: Level, /) -> Any:
        """The changed prediction.

        Raises:
            DdimError: If the hook gives something else than finite numbers of the same shape.
        """
        made = self.denoiser(x, level)
        x0 = self.hook(made.x0, level)
        if self.checked:
            _check_hook(x0, made.x0, level)
        return Prediction(x0, made.eps, made.fraction) if self.eps_kept else made.with_x0(x0, x, level)


def _check_hook(x0: Any, before: Tensor, level: Level) -> None:
    where = f"hook at t = {level.t:g}"
    if not isinstance(x0, Tensor) or x0.shape != before.shape:
        gives = tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
        raise DdimError(where, f"gives {gives} of {tuple(before.shape)}", "return x_0, its shape kept")
    if not torch.isfinite(x0).all() and torch.isfinite(before).all():
        raise DdimError(where, "gives a number that is not finite", "return finite numbers")


@dataclass(frozen=True, slots=True)
class Clipped:
    """A denoiser whose x_0 is clipped to [low, high], eps being derived again: `Hooked` with `ddim.hooks.clip`.

    Args:
        denoiser: The denoiser to wrap.
        low: Smallest value of x_0.
        high: Largest value of x_0.
    """

    denoiser: Denoiser
    low: float = -1.0
    high: float = 1.0

    def __call__(self, x: Tensor, level: Level, /) -> Prediction:
        """The clipped prediction."""
        clipped = Hooked(self.denoiser, lambda x0, _: x0.clamp(self.low, self.high), checked=False)
        made: Prediction = clipped(x, level)
        return made


def as_planned(denoise: AnyDenoiser, plan: Table[Any]) -> AnyDenoiser:
    """The denoiser that a plan runs: its x_0 through the plan's own hook, such as clipping, where there is one."""
    return Hooked(denoise, plan.hook, plan.eps_kept, checked=False) if plan.hook else denoise


@dataclass(frozen=True, slots=True)
class Guided:
    """Classifier-free guidance (Ho & Salimans 2021): unconditional + scale (conditional - unconditional).

    Args:
        conditional: The denoiser that knows the label.
        unconditional: The one that does not.
        scale: 0 ignores the label, 1 is the conditional model, more exaggerates it; or a function of the level.
    """

    conditional: AnyDenoiser
    unconditional: AnyDenoiser
    scale: Guidance

    def __call__(self, x: Tensor, level: Level, /) -> Any:
        """The guided prediction; two calls."""
        on, off = self.conditional(x, level), self.unconditional(x, level)
        scale = self.scale(level) if callable(self.scale) else self.scale
        if not math.isfinite(scale):
            raise DdimError(f"guidance {scale}", f"at t = {level.t:g} is not a finite number", "give one such as 2")
        return off.towards(on, scale)
