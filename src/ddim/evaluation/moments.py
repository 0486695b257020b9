"""Running mean and covariance in float64, and the Frechet distance between two Gaussians with such moments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddim.errors import DdimError


@dataclass
class Moments:
    """Count, mean and scatter matrix of D-dimensional vectors, accumulated in batches (Chan et al. 1983).

    Args:
        dim: D.
        count: Number of vectors.
        mean: float64, (D,).
        scatter: sum (x - mean)(x - mean)^T, float64, (D, D).
    """

    dim: int
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    scatter: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if not self.count:
            self.mean = torch.zeros(self.dim, dtype=torch.float64)
            self.scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64)

    def add(self, features: Tensor) -> Moments:
        """Add a batch of vectors, (B, D), in place; returns self."""
        if not len(features):
            return self
        x = features.to("cpu", torch.float64)
        mean = x.mean(0)
        centred = x - mean
        return self.merge(Moments(self.dim, len(x), mean, centred.T @ centred))

    def merge(self, other: Moments) -> Moments:
        """Add the vectors of other moments in place; returns self."""
        if not other.count:
            return self
        total, shift = self.count + other.count, other.mean - self.mean
        self.scatter += other.scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean += shift * (other.count / total)
        self.count = total
        return self

    def copy(self) -> Moments:
        """An independent copy."""
        return Moments(self.dim, self.count, self.mean.clone(), self.scatter.clone())

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, float64, (D, D).

        Raises:
            DdimError: If there are fewer than two vectors.
        """
        if self.count < 2:
            raise DdimError("statistics", f"have {self.count} image", "use two or more for a covariance")
        return self.scatter / (self.count - 1)


def of(features: Tensor, block: int = 64) -> Moments:
    """The moments of vectors, (N, D), accumulated in batches of `block`."""
    total = Moments(features.shape[1])
    for part in torch.split(features, block):
        total.add(part)
    return total


def factor(moments: Moments) -> Tensor:
    """A factor F of a covariance C = F F^T, float64, (D, R), where R is the numerical rank of C.

    With fewer vectors than dimensions many eigenvalues are 0, but computed as rounding errors of either sign, up to D
    machine epsilons times the largest eigenvalue. They are dropped, because their square roots (1e-8) are not
    negligible.

    Raises:
        DdimError: If an eigenvalue is negative by more than rounding, which no covariance of vectors has.
    """
    values, vectors = torch.linalg.eigh(moments.covariance)
    largest = float(values.abs().max())
    floor = moments.dim * torch.finfo(torch.float64).eps * largest
    # Cancellation in the accumulated sums of float32 features is far below 1e-6 of the largest eigenvalue.
    if float(values.min()) < -max(floor, 1e-6 * largest):
        raise DdimError("statistics", "have a covariance with a negative eigenvalue", "compute them again")
    significant = values > floor
    result: Tensor = vectors[:, significant] * values[significant].sqrt()
    return result


def frechet(a: Moments, b: Moments, factor_b: Tensor | None = None) -> float:
    """The squared Frechet distance of two Gaussians (Dowson & Landau 1982; called FID by Heusel et al. 2017).

    |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^1/2. The last trace is the sum of the singular values of
    F_a^T F_b, where F F^T = C. (Their squares are the eigenvalues of C_b^1/2 C_a C_b^1/2. Taking square roots of those
    would turn rounding errors of zero eigenvalues into errors of about 1e-8 each, and the sum of D of them could make
    the distance of a set from itself negative.)

    Args:
        a: Moments of one set.
        b: Moments of the other set.
        factor_b: `factor(b)`, to compute it once when many sets are compared with b.

    Returns:
        The distance, at least 0, and exactly 0 for equal moments.

    Raises:
        DdimError: If the dimensions differ, a set has fewer than two vectors, or the moments are not finite or have a
            covariance with a negative eigenvalue.
    """
    if a.dim != b.dim:
        raise DdimError("statistics", f"have {a.dim} and {b.dim} features", "use one extractor for both")
    first, second = a.covariance, b.covariance
    if not all(torch.isfinite(part).all() for part in (a.mean, b.mean, first, second)):
        raise DdimError("statistics", "have numbers that are not finite", "compute them again")
    if torch.equal(a.mean, b.mean) and torch.equal(first, second):
        return 0.0
    cross = torch.linalg.svdvals(factor(a).T @ (factor(b) if factor_b is None else factor_b)).sum()
    shift = (a.mean - b.mean).square().sum()
    # The exact value is never negative, since `factor` has checked both covariances; rounding errors are about 1e-13 of
    # the traces.
    return max(0.0, float(shift + first.trace() + second.trace() - 2 * cross))
