"""A mixture of Gaussians: multimodal data with an exact denoiser, score and density."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.exact.draws import NOISE, distribution, normals
from ddim.process.gaussian import diffuse
from ddim.process.parameterization import Prediction, v_from_pair
from ddim.process.rng import sample_categorical
from ddim.process.schedule import Level


@dataclass(frozen=True, eq=False)
class MixtureData:
    """Data sum_k w_k N(m_k, C_k).

    x_t is the mixture of N(signal m_k, abar C_k + (1 - abar) I) with the same weights. States x are (..., D), of any
    floating dtype. Everything is computed in float64, is differentiable and valid at every level, including clean data
    and zero signal.

    Args:
        weights: (K,), >= 0, of sum 1.
        means: (K, D).
        covariances: (K, D, D), symmetric and positive definite.

    Raises:
        DdimError: If the shapes do not match, the weights are not a distribution or a covariance is not positive
            definite.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    # C_k = axes_k diag(along_k) axes_k^T: the covariances of all levels are diagonal in the same axes.
    axes: Tensor = field(init=False, repr=False)
    along: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        means, covariances = torch.as_tensor(self.means).double(), torch.as_tensor(self.covariances).double()
        if means.ndim != 2 or not means.numel() or (*means.shape, means.shape[1]) != covariances.shape:
            shapes = f"have shapes {tuple(means.shape)} and {tuple(covariances.shape)}"
            raise DdimError("means and covariances", shapes, "pass (K, D) and (K, D, D)")
        if not (means.isfinite().all() and covariances.isfinite().all()):
            raise DdimError("means and covariances", "are not all finite", "fix the numbers")
        if (covariances - covariances.mT).abs().max() > 1e-6 * covariances.abs().max():
            raise DdimError("covariances", "are not symmetric", "use (C + C^T) / 2")
        weights = distribution("weights", self.weights, len(means))
        covariances = (covariances + covariances.mT) / 2
        along, axes = torch.linalg.eigh(covariances)
        if not (along > 0).all():
            raise DdimError("covariances", "are not positive definite", "add a constant to the diagonals")
        tensors = {"weights": weights, "means": means, "covariances": covariances, "axes": axes, "along": along}
        for name, tensor in tensors.items():
            object.__setattr__(self, name, tensor)

    def denoise(self, x: Tensor, level: Level, /) -> Prediction:
        """E[x_0 | x] and E[eps | x], the shape and dtype of x. At t = 0, (x, 0)."""
        posterior, whitened = self._posterior(x, level)
        x0 = (posterior[..., None] * (self.means + level.signal * self._rotate_back(self.along * whitened))).sum(-2)
        eps = level.noise * (posterior[..., None] * self._rotate_back(whitened)).sum(-2)
        return Prediction(x0.to(x.dtype), eps.to(x.dtype))

    def score(self, x: Tensor, level: Level) -> Tensor:
        """The gradient of `log_density` with respect to x, the shape and dtype of x."""
        posterior, whitened = self._posterior(x, level)
        return -(posterior[..., None] * self._rotate_back(whitened)).sum(-2).to(x.dtype)

    def log_density(self, x: Tensor, level: Level) -> Tensor:
        """log q(x_t) in nats: float64, (...)."""
        return self._joint(x, level)[0].logsumexp(-1)

    def reference(self, x: Tensor, now: Level, next: Level, steps: int = 500) -> Tensor:
        """The solution of the ODE (14) from `now` to `next`, in either direction, by the classical 4th-order RK method.

        There is no closed form. The ODE is solved as dx / d angle = signal eps - noise x0, which is finite at both
        ends, in equal steps of asinh(angle / a), where a is the smallest standard deviation of the data. This is
        approximately the log of noise / signal, except below a, where the solution hardly changes. The error falls as
        steps^-4, down to rounding: about 1e-7 at 100 steps and 1e-11 at 1000 for components ten times narrower than
        their distances. It is larger for states that are improbable under the data. To estimate it, solve with twice
        the steps: the difference is the error of the coarser solution.

        Args:
            x: States at `now`, (..., D).
            now: Their level; zero signal and clean data are both allowed.
            next: The target level.
            steps: Number of steps, of 4 denoiser evaluations each.

        Returns:
            The states at `next`, the shape and dtype of x.
        """
        a = float(self.along.min().sqrt())
        start, end = math.asinh(now.angle / a), math.asinh(next.angle / a)
        width = (end - start) / steps

        def slope(state: Tensor, at: float) -> Tensor:
            angle = min(a * math.sinh(at), math.pi / 2)
            level = Level(math.nan, -2 * math.log(math.tan(angle)) if angle > 0 else math.inf)
            pair = self.denoise(state, level)
            return v_from_pair(pair.x0, pair.eps, level) * math.hypot(a, angle)

        state = x.double()
        for k in range(steps):
            at = start + k * width
            k1 = slope(state, at)
            k2 = slope(state + width / 2 * k1, at + width / 2)
            k3 = slope(state + width / 2 * k2, at + width / 2)
            k4 = slope(state + width * k3, at + width)
            state = state + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return state.to(x.dtype)

    def error(self, level: Level, n: int = 10_000, seed: int = 0) -> float:
        """E ||eps - E[eps | x_t]||^2 / D, the minimum of the loss, eq. (5), at a level, by Monte Carlo.

        Args:
            level: The level of x_t.
            n: The number of draws: x_0 is `sample(n, seed)`, each with one independent eps.
            seed: The same seed gives the same x_0 and eps at every level.

        Returns:
            The mean over draws; its standard error falls with 1 / sqrt(n).
        """
        x0 = self.sample(n, seed)
        eps = normals(n, seed, tuple(x0.shape[1:]), NOISE).to(x0.device)
        predicted = self.denoise(diffuse(x0, eps, level), level).eps
        return float(((eps - predicted) ** 2).mean())

    def sample(self, n: int, seed: int) -> Tensor:
        """Clean data: float64, (n, D); sample i is a function of (seed, i)."""
        drawn = normals(n, seed, (self.means.shape[1] + 1,)).to(self.means.device)
        k = sample_categorical(torch.special.ndtr(drawn[:, 0]), self.weights)
        scaled = self.along[k].sqrt() * drawn[:, 1:]
        return self.means[k] + (self.axes[k] @ scaled[..., None])[..., 0]

    def _joint(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """log w_k N(x; ...), (..., K), and S_k^-1 (x - signal m_k) in the axes of each component, (..., K, D)."""
        if x.shape[-1:] != self.means.shape[1:]:
            raise ValueError(f"x of shape {tuple(x.shape)} does not end in D = {self.means.shape[1]}")
        spread = level.alpha_bar * self.along + level.variance
        centred = x.double()[..., None, :] - level.signal * self.means
        inside = torch.einsum("kij,...ki->...kj", self.axes, centred)
        whitened = inside / spread
        log_normal = -0.5 * (inside * whitened + (2 * math.pi * spread).log()).sum(-1)
        return self.weights.log() + log_normal, whitened

    def _posterior(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        joint, whitened = self._joint(x, level)
        return joint.softmax(-1), whitened

    def _rotate_back(self, inside: Tensor) -> Tensor:
        """Rotate from the axes of each component, (..., K, D), back to the coordinates of x."""
        return torch.einsum("kij,...kj->...ki", self.axes, inside)
