"""A finite data set and its optimal denoiser, the minimiser of the training objective over all functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.exact.draws import uniforms
from ddim.process.parameterization import Prediction, eps_from_x0
from ddim.process.schedule import Level


@dataclass(frozen=True, eq=False)
class EmpiricalData:
    """Data distributed uniformly over M points.

    x_t is the mixture of N(signal d_m, (1 - abar) I), and E[x_0 | x] is the mean of the points weighted by
    softmax_m(-|x - signal d_m|^2 / 2 (1 - abar)). States x are (N, *shape), of any floating dtype. Everything is
    computed in float64 (8 bytes per number of the data), is differentiable and valid at zero signal.

    Args:
        data: (M, *shape).
        block: About how many distances are in memory at once; x is split accordingly.

    Raises:
        DdimError: If there are no points or they are not finite.
    """

    data: Tensor
    block: int = 2**22
    centre: Tensor = field(init=False, repr=False)
    points: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.data.ndim < 2 or not self.data.numel():
            raise DdimError(f"data of shape {tuple(self.data.shape)}", "has no points", "pass (M, *shape)")
        flat = self.data.flatten(1).double()
        if not flat.isfinite().all():
            raise DdimError("data", "is not all finite", "fix the numbers")
        # Distances are computed from inner products, which lose fewer digits when the data is centred.
        object.__setattr__(self, "centre", flat.mean(0))
        object.__setattr__(self, "points", flat - flat.mean(0))

    def denoise(self, x: Tensor, level: Level, /) -> Prediction:
        """E[x_0 | x] and E[eps | x], the shape and dtype of x.

        At t = 0 it is (x, 0), the only pair that is consistent if x is not one of the points.
        """
        if level.variance == 0:
            return Prediction(x, torch.zeros_like(x))
        x0 = self._x0(x, level)
        return Prediction(x0.to(x.dtype), eps_from_x0(x0, x.double(), level).to(x.dtype))

    def score(self, x: Tensor, level: Level) -> Tensor:
        """The gradient of `log_density` with respect to x, the shape and dtype of x.

        Raises:
            DdimError: At t = 0, where there is no density.
        """
        self._has_density(level)
        return ((level.signal * self._x0(x, level) - x.double()) / level.variance).to(x.dtype)

    def log_density(self, x: Tensor, level: Level) -> Tensor:
        """log q(x_t) in nats: float64, (N,).

        Raises:
            DdimError: At t = 0, where there is no density.
        """
        self._has_density(level)
        values = []
        for part in self._parts(x, level):
            gain, best = self._gain(part, level)
            exponent = (best[:, 0] - 0.5 * (part**2).sum(1)) / level.variance
            values.append(exponent + gain.logsumexp(1))
        volume = math.log(len(self.points)) + 0.5 * self.points.shape[1] * math.log(2 * math.pi * level.variance)
        return torch.cat(values) - volume

    def sample(self, n: int, seed: int) -> Tensor:
        """Points drawn with replacement: (n, *shape), the dtype of the data; sample i is a function of (seed, i)."""
        u = uniforms(n, seed, 1)[:, 0].to(self.points.device)
        return self.data[(u * len(self.data)).long().clamp(max=len(self.data) - 1)]

    def _x0(self, x: Tensor, level: Level) -> Tensor:
        parts = [self._gain(part, level)[0].softmax(1) @ self.points for part in self._parts(x, level)]
        return (self.centre + torch.cat(parts)).reshape(x.shape)

    def _parts(self, x: Tensor, level: Level) -> Iterator[Tensor]:
        """x - signal centre in float64, (n, P), a batch of samples at a time."""
        if x.shape[1:] != self.data.shape[1:]:
            raise ValueError(f"x of shape {tuple(x.shape)} for points of shape {tuple(self.data.shape[1:])}")
        rows = max(1, self.block // len(self.points))
        for part in torch.split(x, rows):
            yield part.flatten(1).double() - level.signal * self.centre

    def _gain(self, part: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """log q(x | d_m) minus its maximum over m, (n, M); and the maximum, in units of 1 / (1 - abar), (n, 1).

        Both omit the term |x - signal centre|^2, which is the same for all m.
        """
        scaled = level.signal * self.points
        product = part @ scaled.T - 0.5 * (scaled**2).sum(1)
        best = product.detach().amax(1, keepdim=True)
        return (product - best) / level.variance, best

    def _has_density(self, level: Level) -> None:
        if level.variance == 0:
            raise DdimError("a finite data set", "has no density at t = 0", "use a noisier level")
