"""Hooks on the predicted x_0: clipping, thresholding, and consistency with measurements of an image (DDNM).

A hook is a function `hook(x0, level) -> x0`; `Hooked(denoiser, hook)` applies it and recomputes eps.
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
"""Luma weights of red, green and blue (ITU-R 601)."""


class Operator(Protocol):
    """A linear measurement A of an image with a right inverse A^+, A A^+ = I."""

    def apply(self, x: Tensor, /) -> Tensor:
        """A x: images (N, ...) to measurements (N, ...), which may have another shape."""

    def pinv(self, y: Tensor, /) -> Tensor:
        """A^+ y: measurements (N, ...) to images (N, ...)."""


def clip(low: float = -1.0, high: float = 1.0) -> Hook:
    """A hook that clips x_0 to [low, high].

    Raises:
        DdimError: If low is not below high.
    """
    if not low < high:
        raise DdimError(f"clip to [{low:g}, {high:g}]", "is an empty range", "use low < high")
    return lambda x0, _: x0.clamp(low, high)


def threshold(quantile: float = 0.995) -> Hook:
    """Dynamic thresholding (Saharia et al. 2022, Imagen): x_0 is clipped to [-s, s] and divided by s.

    s is the quantile of |x_0| of each sample, at least 1, so that a sample within [-1, 1] is unchanged.

    Args:
        quantile: 0..1.

    Raises:
        DdimError: If the quantile is outside 0..1.
    """
    if not 0 <= quantile <= 1:
        raise DdimError(f"quantile {quantile:g}", "is outside 0..1", "use a number such as 0.995")

    def hook(x0: Tensor, _: Level) -> Tensor:
        # One sample at a time: torch.quantile accepts at most 2^24 numbers.
        exact = x0.to(torch.promote_types(x0.dtype, torch.float32))
        quantiles = [torch.quantile(sample.abs().flatten(), quantile) for sample in exact]
        s = torch.stack(quantiles).clamp_min(1).to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s

    return hook


def consistent(operator: Operator, y: Tensor, rounds: int = 0) -> Hook:
    """A hook for consistency with measurements (Wang et al. 2023, DDNM): x_0 becomes A^+ y + (I - A^+ A) x_0.

    Then A x_0 = y. If the plan's last row returns x_0, as DDIM's row to clean data does for any eta, the images satisfy
    A x = y up to rounding.

    With eps recomputed, the unmeasured part depends too weakly on the measurements, for any number of steps: the
    denoiser assumes that it is as noisy as the rest. `eps_kept` avoids this: on Gaussian data with an exact denoiser
    the mean and variance approach those of the distribution given y as the number of steps grows.

    Args:
        operator: The measurement A.
        y: The measured values: (1, ...) for all samples, or one for each sample of a batch. `Model.sample` runs in
            micro-batches, so pass it one for all.
        rounds: Number of alternating projections before the last one: x_0 is made consistent and clipped to [-1, 1].
            They converge to an image that satisfies both (if `pinv` is the pseudo-inverse). Without them, an operator
            that averages may be satisfied by values outside [-1, 1].
    """

    def hook(x0: Tensor, level: Level) -> Tensor:
        if len(y) not in (1, len(x0)):
            problem = f"are {len(y)} for a batch of {len(x0)}"
            raise DdimError("measurements", problem, "pass one for all samples; a model samples in micro-batches")
        particular = operator.pinv(y.to(x0))
        for _ in range(rounds):
            x0 = (particular + (x0 - operator.pinv(operator.apply(x0)))).clamp(-1, 1)
        return particular + (x0 - operator.pinv(operator.apply(x0)))

    return hook


def eps_kept(hook: Hook, plan: Plan) -> Hook:
    """A hook that effectively changes x_0 alone: each row uses the noise that the network predicted.

    The pair stays consistent: the change of x_0 is multiplied by w of `ddim.guidance.eps_kept`, so that with eps
    recomputed from it each row has the output that it would have with x_0 changed by the hook and eps unchanged. So the
    x_0 of a step differs from the hook's, except on the last step to clean data.

    Args:
        hook: The hook.
        plan: The plan to be run.

    Raises:
        DdimError: If the plan is not one that `ddim.guidance.eps_kept` accepts.
    """
    scale = guidance.eps_kept(plan)
    return lambda x0, level: x0.lerp(hook(x0, level), scale(level))


@dataclass(frozen=True, eq=False)
class Mask:
    """Inpainting: A selects the measured values of an image, A^+ places them among zeros.

    Args:
        mask: bool, the shape of one sample; True where the value is measured.

    Raises:
        DdimError: If the mask is not bool.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise DdimError("mask", f"is {self.mask.dtype}, not bool", "use mask > 0.5, for instance")

    def apply(self, x: Tensor, /) -> Tensor:
        """(N, ...) to (N, K), where K is the number of measured values.

        Raises:
            DdimError: If the samples do not have the mask's shape.
        """
        if x.shape[1:] != self.mask.shape:
            problem = f"is {tuple(self.mask.shape)}, a sample is {tuple(x.shape[1:])}"
            raise DdimError("mask", problem, "pass one of a sample's shape")
        return x[:, self.mask.to(x.device)]

    def pinv(self, y: Tensor, /) -> Tensor:
        """(N, K) to (N, ...), 0 where nothing is measured."""
        out = y.new_zeros(len(y), *self.mask.shape)
        out[:, self.mask.to(y.device)] = y
        return out


@dataclass(frozen=True)
class MeanPool:
    """Super-resolution: A averages over k by k pixels, A^+ repeats each pixel k by k times.

    Args:
        k: The downscaling factor, at least 1.

    Raises:
        DdimError: If k is less than 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise DdimError(f"pooling by {self.k}", "is not a whole number >= 1", "use a number such as 4")

    def apply(self, x: Tensor, /) -> Tensor:
        """(N, C, H, W) to (N, C, H / k, W / k).

        Raises:
            DdimError: If k does not divide H and W.
        """
        if x.shape[-2] % self.k or x.shape[-1] % self.k:
            problem = f"does not divide {x.shape[-2]}x{x.shape[-1]} pixels"
            raise DdimError(f"pooling by {self.k}", problem, "use a factor of both sides")
        return torch.nn.functional.avg_pool2d(x, self.k)

    def pinv(self, y: Tensor, /) -> Tensor:
        """(N, C, h, w) to (N, C, k h, k w)."""
        return y.repeat_interleave(self.k, -2).repeat_interleave(self.k, -1)


@dataclass(frozen=True)
class Grey:
    """Colourisation: A is a weighted sum of the channels, A^+ copies the grey value to every channel.

    With equal weights A^+ is the pseudo-inverse, which makes the smallest change; with others, such as `LUMA`, it is
    the right inverse that changes all channels by the same amount and so preserves differences between channels.

    Args:
        weights: One for each channel, of sum 1.

    Raises:
        DdimError: If their sum is not 1.
    """

    weights: tuple[float, ...] = MEAN

    def __post_init__(self) -> None:
        if not math.isclose(sum(self.weights), 1, abs_tol=1e-9):
            raise DdimError(f"grey weights {self.weights}", f"have the sum {sum(self.weights):g}", "use a sum of 1")

    def apply(self, x: Tensor, /) -> Tensor:
        """(N, C, H, W) to (N, 1, H, W).

        Raises:
            DdimError: If the numbers of channels and weights differ.
        """
        if x.shape[1] != len(self.weights):
            problem = f"has {len(self.weights)} weights for {x.shape[1]} channels"
            raise DdimError("grey", problem, "use a model of colour images, or other weights")
        return (x * x.new_tensor(self.weights)[:, None, None]).sum(1, keepdim=True)

    def pinv(self, y: Tensor, /) -> Tensor:
        """(N, 1, H, W) to (N, C, H, W)."""
        return y.expand(-1, len(self.weights), -1, -1)


@dataclass(frozen=True, slots=True)
class Clipped:
    """A denoiser whose x_0 is clipped to [low, high], with eps recomputed: `Hooked` with `ddim.x0_hooks.clip`.

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
        prediction: Prediction = clipped(x, level)
        return prediction
