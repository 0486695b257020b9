"""Prediction types as consistent pairs (x0, eps): eq. (9), eps, x0 and v; and token logits as p(x_0 | x_t).

A denoiser is any callable `denoise(x, level) -> Prediction`; the pair it returns is consistent,
x = signal x0 + noise eps. Samplers are independent of what the network predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.names import Predicts
from ddim.process.categorical import Alphabet
from ddim.process.schedule import Level, Scales

Number = TypeVar("Number", Tensor, float)


class Prediction:
    """A denoiser's prediction at x_t.

    Args:
        x0: The predicted clean data f_theta, the shape of x_t.
        eps: The predicted noise, the shape of x_t.
        fraction: The position of a step's log-variance between its bounds, 0 (lower) to 1, the shape of x_t; None if
            the network does not predict a variance (Nichol & Dhariwal 2021, their eq. (15)).
    """

    __slots__ = ("_eps", "_x0", "linear", "variance_fraction")

    def __init__(self, x0: Tensor, eps: Tensor, fraction: Tensor | None = None):
        self._x0: Tensor | None = x0
        self._eps: Tensor | None = eps
        self.variance_fraction = fraction
        self.linear: LinearPrediction | None = None

    @staticmethod
    def of(linear: LinearPrediction) -> Prediction:
        """A prediction whose x_0 and eps are linear in x_t and the network's output, computed on first access.

        A plan row combines the coefficients of `linear` directly and computes neither.
        """
        prediction = Prediction.__new__(Prediction)
        prediction._x0 = prediction._eps = None
        prediction.variance_fraction, prediction.linear = None, linear
        return prediction

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
        """The prediction with x_0 replaced and eps recomputed, so that the pair stays consistent at x_t."""
        return Prediction(x0, eps_from_x0(x0, x, level), self.variance_fraction)

    def lerp(self, other: Prediction, scale: float) -> Prediction:
        """Linear interpolation from this prediction (scale 0) to the other (scale 1), with the other's `fraction`."""
        return Prediction(self.x0.lerp(other.x0, scale), self.eps.lerp(other.eps, scale), other.variance_fraction)


AnyDenoiser = Callable[[Tensor, Level], Any]
"""A denoiser of any modality: its prediction has `x0`, `with_x0` and `lerp`, like `Prediction`."""


class Denoiser(Protocol):
    """A callable that predicts x_0 and eps from x_t."""

    def __call__(self, x: Tensor, level: Level, /) -> Prediction:
        """The prediction at x (N, ...) and one level."""
        ...


def predict(output: Tensor, x: Tensor, level: Level, predicts: Predicts) -> Prediction:
    """A network's output converted to a consistent pair (x0, eps).

    Args:
        output: The network's output, the shape of x.
        x: x_t.
        level: The level of x_t.
        predicts: "eps", "x0" or "v", where v = signal eps - noise x0 (Salimans & Ho 2022).

    Raises:
        ValueError: If `predicts` is unknown, or is eps at zero signal or x_0 at zero noise.
    """
    if predicts == "eps":
        if level.signal == 0:
            raise ValueError("eps does not determine x0 at zero signal; use a network that predicts v or x0")
        of_x0 = (x0_from_eps(0.0, 1.0, level), x0_from_eps(1.0, 0.0, level))
        return Prediction.of(LinearPrediction(x, output, of_x0, (0.0, 1.0)))
    if predicts == "x0":
        if level.noise == 0:
            raise ValueError("x0 does not determine eps at zero noise")
        of_eps = (eps_from_x0(0.0, 1.0, level), eps_from_x0(1.0, 0.0, level))
        return Prediction.of(LinearPrediction(x, output, (0.0, 1.0), of_eps))
    if predicts == "v":
        signal, noise = level.signal, level.noise
        return Prediction.of(LinearPrediction(x, output, (signal, -noise), (noise, signal)))
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
    """The eps that makes (x0, eps) consistent at x_t; the inverse of eq. (9). Requires noise > 0."""
    return (x - x0 * level.signal) / level.noise


def v_from_pair(x0: Tensor, eps: Tensor, level: Scales) -> Tensor:
    """v = signal eps - noise x0 (Salimans & Ho 2022)."""
    return eps * level.signal - x0 * level.noise


def _check_hook(x0: Any, before: Tensor, level: Level) -> None:
    where = f"hook at t = {level.t:g}"
    if not isinstance(x0, Tensor) or x0.shape != before.shape:
        actual = tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
        raise DdimError(where, f"returns {actual}, not {tuple(before.shape)}", "return x_0 in its shape")
    if not torch.isfinite(x0).all() and torch.isfinite(before).all():
        raise DdimError(where, "returns a number that is not finite", "return finite numbers")


class LinearPrediction(NamedTuple):
    """x_0 and eps as linear combinations of x_t and a network's output.

    Args:
        x: x_t.
        output: The network's output, the shape of x.
        of_x0: The weights of x and of the output in x_0.
        of_eps: The weights of x and of the output in eps.
    """

    x: Tensor
    output: Tensor
    of_x0: tuple[float, float]
    of_eps: tuple[float, float]

    def sum(self, weights: tuple[float, float]) -> Tensor:
        """The weighted sum of x and the output."""
        if weights == (0, 1):
            return self.output
        return (self.x * weights[0]).add_(self.output, alpha=weights[1])


@dataclass(frozen=True, slots=True)
class TokenPrediction:
    """A denoiser's prediction at discrete x_t.

    Args:
        x0: p(x_0 | x_t), a distribution for each token independently: float, (N, ..., K).
    """

    x0: Tensor

    def with_x0(self, x0: Tensor, x: Tensor, level: Level) -> TokenPrediction:
        """The prediction with x_0 replaced."""
        return TokenPrediction(x0)

    def lerp(self, other: TokenPrediction, scale: float) -> TokenPrediction:
        """p proportional to self^(1 - scale) other^scale (Schiff et al. 2024); categories at 0 in both stay at 0."""
        off, on = (part.x0.clamp_min(torch.finfo(part.x0.dtype).tiny).log() for part in (self, other))
        logits = off.lerp(on, scale).masked_fill((self.x0 == 0) & (other.x0 == 0), -math.inf)
        return TokenPrediction(logits.softmax(-1))


def predict_tokens(output: Tensor, x: Tensor, level: Level, alphabet: Alphabet) -> TokenPrediction:
    """The prediction for a network's logits (N, ..., K) at x (N, ...)."""
    return TokenPrediction(log_probabilities(output, x, alphabet).exp())


def log_probabilities(logits: Tensor, x: Tensor, alphabet: Alphabet) -> Tensor:
    """log p(x_0 | x_t) from a network's logits.

    The mask has probability 0; with `carry_over` a token that is not masked equals x_0 with certainty (Sahoo et al.
    2024).

    Args:
        logits: (N, ..., K).
        x: Ids x_t, (N, ...).
        alphabet: The categories.

    Returns:
        The dtype of the logits, at least float32, (N, ..., K); -inf for excluded categories.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if alphabet.mask is None:
        return logits.log_softmax(-1)
    ids = torch.arange(alphabet.size, device=logits.device)
    logits = logits.masked_fill(ids == alphabet.mask, -math.inf)
    if alphabet.carry_over:
        unmasked = (x != alphabet.mask)[..., None]
        logits = logits.masked_fill(unmasked & (ids != x[..., None]), -math.inf)
    return logits.log_softmax(-1)
