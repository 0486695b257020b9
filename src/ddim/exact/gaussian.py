"""Gaussian data: the denoiser, the score, the flow of the ODE (14) and the map of DDIM, all in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.exact.draws import normals
from ddim.process.parameterization import Prediction
from ddim.process.schedule import Level


@dataclass(frozen=True, eq=False)
class GaussianData:
    """Data N(mean, diag(variance)).

    x_t is N(signal mean, diag(abar variance + 1 - abar)). States x are (..., D), of any floating dtype. Everything is
    computed in float64, is differentiable and valid at every level, including clean data and zero signal.

    Args:
        mean: (D,).
        variance: (D,), > 0.

    Raises:
        DdimError: If the shapes differ or a variance is not positive.
    """

    mean: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        mean, variance = torch.as_tensor(self.mean).double(), torch.as_tensor(self.variance).double()
        if mean.ndim != 1 or not len(mean) or mean.shape != variance.shape:
            shapes = f"have shapes {tuple(mean.shape)} and {tuple(variance.shape)}"
            raise DdimError("mean and variance", shapes, "pass two vectors of one length")
        if not (mean.isfinite().all() and variance.isfinite().all() and (variance > 0).all()):
            raise DdimError("mean and variance", "are not finite with variance > 0", "fix the numbers")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "variance", variance)

    def denoise(self, x: Tensor, level: Level, /) -> Prediction:
        """E[x_0 | x] and E[eps | x] by conditioning Gaussians, the shape and dtype of x. At t = 0, (x, 0)."""
        whitened = self._centred(x, level) / self._spread(level)
        x0 = self.mean + level.signal * self.variance * whitened
        return Prediction(x0.to(x.dtype), (level.noise * whitened).to(x.dtype))

    def score(self, x: Tensor, level: Level) -> Tensor:
        """The gradient of `log_density` with respect to x, the shape and dtype of x."""
        return -(self._centred(x, level) / self._spread(level)).to(x.dtype)

    def log_density(self, x: Tensor, level: Level) -> Tensor:
        """log q(x_t) in nats: float64, (...)."""
        spread = self._spread(level)
        return -0.5 * (self._centred(x, level) ** 2 / spread + (2 * math.pi * spread).log()).sum(-1)

    def flow(self, x: Tensor, now: Level, next: Level) -> Tensor:
        """The solution of the ODE (14) from `now` to `next`, in either direction; the shape and dtype of x.

        With y = xbar - mean it is dy/dv = v y / (variance + v^2), so y is proportional to sqrt(variance + v^2), and
        x - signal mean to the standard deviation of x_t.
        """
        scale = (self._spread(next) / self._spread(now)).sqrt()
        return (next.signal * self.mean + scale * self._centred(x, now)).to(x.dtype)

    def flow_log_density(self, x: Tensor, now: Level, top: Level) -> Tensor:
        """The log-density at `now` of the model: N(0, I) at level `top`, transported to `now` by the exact ODE.

        It differs from `log_density` because N(0, I) differs from the true distribution of x_top.

        Args:
            x: States at `now`, (..., D).
            now: Their level, for example clean data.
            top: The level of the model's prior.

        Returns:
            log N(flow(x); 0, I) + log |det d flow / dx| in nats: float64, (...).
        """
        latent = self.flow(x.double(), now, top)
        stretch = 0.5 * (self._spread(top) / self._spread(now)).log().sum()
        return -0.5 * (latent**2 + math.log(2 * math.pi)).sum(-1) + stretch

    def ddim_map(self, x: Tensor, levels: Sequence[Level], clean_as: Level | None = None) -> Tensor:
        """DDIM at eta = 0 over any falling or rising levels: the product of the factors of its steps.

        A step multiplies x - signal mean by (signal' signal variance + noise' noise) / (abar variance + 1 - abar).

        Args:
            x: States at the first level, (..., D).
            levels: Two or more levels, as in `ddim.samplers.ddim`.
            clean_as: The level at which eps of clean data is predicted, if the levels rise from t = 0.

        Returns:
            The states at the last level, the shape and dtype of x.
        """
        factor = torch.ones_like(self.mean)
        first, *_, last = levels
        steps = list(itertools.pairwise(levels))
        centred = self._centred(x, first)
        if first.t == 0 and levels[1].log_snr < first.log_snr:
            # Clean data is x_0 itself, and its eps is predicted as if it were at a noisier level.
            following, query = levels[1], clean_as or levels[1]
            whitened = self._centred(x, query) / self._spread(query)
            centred = following.signal * centred + following.noise * query.noise * whitened
            steps = steps[1:]
        for now, following in steps:
            moved = following.signal * now.signal * self.variance + following.noise * now.noise
            factor = factor * moved / self._spread(now)
        return (last.signal * self.mean + factor * centred).to(x.dtype)

    def error(self, level: Level) -> float:
        """E ||eps - E[eps | x_t]||^2 / D, the least loss of eq. (5) at a level; 0 at zero signal, 1 at t = 0."""
        return float((level.alpha_bar * self.variance / self._spread(level)).mean())

    def sample(self, n: int, seed: int) -> Tensor:
        """Clean data: float64, (n, D); sample i is a function of (seed, i)."""
        return self.mean + self.variance.sqrt() * normals(n, seed, tuple(self.mean.shape)).to(self.mean.device)

    def _centred(self, x: Tensor, level: Level) -> Tensor:
        if x.shape[-1:] != self.mean.shape:
            raise ValueError(f"x of shape {tuple(x.shape)} does not end in D = {len(self.mean)}")
        return x.double() - level.signal * self.mean

    def _spread(self, level: Level) -> Tensor:
        return level.alpha_bar * self.variance + level.variance
