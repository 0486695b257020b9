"""Hooks on the predicted x_0: clipping, thresholding, and agreement with what is known of a picture (DDNM).

A hook is a function `hook(x0, level) -> x0`; `Hooked(denoiser, hook)` runs it and derives eps again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.plan.base import Hook, Hooked
from ddim.plan.plan import Plan
from ddim.process.parameterization import Denoiser, Prediction
from ddim.process.schedule import Level
from ddim.sampling import guidance

MEAN = (1 / 3, 1 / 3, 1 / 3)
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the grey of a picture (ITU-R 601)."""


class Operator(Protocol):
    """A linear measurement A of a picture and a right inverse of it, A A^+ = I."""

    def apply(self, x: Tensor, /) -> Tensor:
        """A x of pictures (N, ...): what is known of each, (N, ...) of a shape of its own."""

    def pinv(self, y: Tensor, /) -> Tensor:
        """A^+ y: pictures (N, ...) of which y (N, ...) is known."""


def clip(low: float = -1.0, high: float = 1.0) -> Hook:
    """x_0 clipped to [low, high].

    Raises:
        DdimError: If low is not below high.
    """
    if not low < high:
        raise DdimError(f"clip to [{low:g}, {high:g}]", "is an empty range", "give a low end below the high one")
    return lambda x0, _: x0.clamp(low, high)


def threshold(quantile: float = 0.995) -> Hook:
    """Dynamic thresholding (Saharia et al. 2022, Imagen): x_0 clipped to [-s, s] and divided by s.

    s is the quantile of |x_0| of each sample by itself, at least 1, so that a sample within [-1, 1] is left as it is.

    Args:
        quantile: 0..1.

    Raises:
        DdimError: If it is not in that range.
    """
    if not 0 <= quantile <= 1:
        raise DdimError(f"quantile {quantile:g}", "is outside 0..1", "give a number such as 0.995")

    def hook(x0: Tensor, _: Level) -> Tensor:
        # Each sample by itself: torch.quantile takes no more than 2^24 numbers at once.
        exact = x0.to(torch.promote_types(x0.dtype, torch.float32))
        found = [torch.quantile(sample.abs().flatten(), quantile) for sample in exact]
        s = torch.stack(found).clamp_min(1).to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s

    return hook


def consistent(operator: Operator, y: Tensor, rounds: int = 0) -> Hook:
    """Agreement with what is known (Wang et al. 2023, DDNM): x_0 becomes A^+ y + (I - A^+ A) x_0.

    A of the changed x_0 is y. A plan whose last row gives x_0 itself, as DDIM's to clean data does for any eta, so
    ends in pictures x with A x = y, up to rounding.

    With eps derived again the filled part leans too little towards what is known, on any number of steps: the denoiser
    takes it for as noisy as the rest. Within `eps_kept` it does not: on Gaussian data with an exact denoiser mean and
    spread approach those of the distribution given y as steps are added.

    Args:
        operator: What was measured.
        y: What it gave: (1, ...) for all samples, or one for each sample of a batch. A model samples in micro-batches
            of its own, so give `Model.sample` one for all.
        rounds: How often x_0 is before that made to agree and clipped to [-1, 1], in turn: projections by turns lead to
            a picture that has both (where `pinv` is the pseudo-inverse). Without, what A takes means of may agree
            through values that no picture has.
    """

    def hook(x0: Tensor, level: Level) -> Tensor:
        if len(y) not in (1, len(x0)):
            wrong = f"are {len(y)} for a batch of {len(x0)}"
            raise DdimError("known data", wrong, "give one for all samples; a model samples in micro-batches")
        known = operator.pinv(y.to(x0))
        for _ in range(rounds):
            x0 = (known + (x0 - operator.pinv(operator.apply(x0)))).clamp(-1, 1)
        return known + (x0 - operator.pinv(operator.apply(x0)))

    return hook


def eps_kept(hook: Hook, plan: Plan) -> Hook:
    """A hook that changes x_0 alone: the noise that a row puts back is the network's own.

    The pair stays consistent all the same: x_0 is changed further, by w of `ddim.guidance.eps_kept`, so that with eps
    derived from it each row ends where it would with x_0 changed by the hook and eps left alone. In between, a step's
    x_0 is therefore not the hook's; on the last step to clean data it is.

    Args:
        hook: The hook.
        plan: What will be run.

    Raises:
        DdimError: As `ddim.guidance.eps_kept`.
    """
    scale = guidance.eps_kept(plan)
    return lambda x0, level: x0.lerp(hook(x0, level), scale(level))


@dataclass(frozen=True, eq=False)
class Mask:
    """Some numbers of a picture are known: A picks them, A^+ puts them back among zeros.

    Args:
        mask: bool, the shape of one sample; True where it is known.

    Raises:
        DdimError: If it is not bool.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise DdimError("mask", f"is {self.mask.dtype}, not bool", "write mask > 0.5, for instance")

    def apply(self, x: Tensor, /) -> Tensor:
        """(N, ...) to (N, K), K the number known.

        Raises:
            DdimError: If the samples are not of the mask's shape.
        """
        if x.shape[1:] != self.mask.shape:
            wrong = f"is {tuple(self.mask.shape)}, a sample is {tuple(x.shape[1:])}"
            raise DdimError("mask", wrong, "give one of a sample's shape")
        return x[:, self.mask.to(x.device)]

    def pinv(self, y: Tensor, /) -> Tensor:
        """(N, K) to (N, ...), 0 where nothing is known."""
        out = y.new_zeros(len(y), *self.mask.shape)
        out[:, self.mask.to(y.device)] = y
        return out


@dataclass(frozen=True)
class MeanPool:
    """A small picture is known: A takes means of k by k pixels, A^+ repeats each pixel k by k times.

    Args:
        k: How many times smaller, at least 1.

    Raises:
        DdimError: If k is less than 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise DdimError(f"pooling by {self.k}", "is not a whole number >= 1", "give a number such as 4")

    def apply(self, x: Tensor, /) -> Tensor:
        """(N, C, H, W) to (N, C, H / k, W / k).

        Raises:
            DdimError: If k does not divide H and W.
        """
        if x.shape[-2] % self.k or x.shape[-1] % self.k:
            wrong = f"does not divide {x.shape[-2]}x{x.shape[-1]} pixels"
            raise DdimError(f"pooling by {self.k}", wrong, "give a factor of both sides")
        return torch.nn.functional.avg_pool2d(x, self.k)

    def pinv(self, y: Tensor, /) -> Tensor:
        """(N, C, h, w) to (N, C, k h, k w)."""
        return y.repeat_interleave(self.k, -2).repeat_interleave(self.k, -1)


@dataclass(frozen=True)
class Grey:
    """A grey picture is known: A weighs the channels, A^+ gives every channel the grey.

    With equal weights A^+ is the pseudo-inverse, which changes a picture least; with others, such as `LUMA`, it is the
    right inverse that shifts all channels by as much and so leaves differences between colours alone.

    Args:
        weights: One for each channel, of sum 1.

    Raises:
        DdimError: If their sum is not 1.
    """

    weights: tuple[float, ...] = MEAN

    def __post_init__(self) -> None:
        if not math.isclose(sum(self.weights), 1, abs_tol=1e-9):
            raise DdimError(f"grey weights {self.weights}", f"have the sum {sum(self.weights):g}", "make it 1")

    def apply(self, x: Tensor, /) -> Tensor:
        """(N, C, H, W) to (N, 1, H, W).

        Raises:
            DdimError: If there are not as many channels as weights.
        """
        if x.shape[1] != len(self.weights):
            wrong = f"weighs {len(self.weights)} channels, there are {x.shape[1]}"
            raise DdimError("grey", wrong, "use a colour model, or give other weights")
        return (x * x.new_tensor(self.weights)[:, None, None]).sum(1, keepdim=True)

    def pinv(self, y: Tensor, /) -> Tensor:
        """(N, 1, H, W) to (N, C, H, W)."""
        return y.expand(-1, len(self.weights), -1, -1)


@dataclass(frozen=True, slots=True)
class Clipped:
    """A denoiser whose x_0 is clipped to [low, high], eps being derived again: `Hooked` with `ddim.x0_hooks.clip`.

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
