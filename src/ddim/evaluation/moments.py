"""Running mean and covariance in float64, from one pass, and the distance between two Gaussians that have them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddim.errors import DdimError


@dataclass
class Moments:
    """Count, mean and scatter of vectors of D numbers, gathered a batch at a time (Chan et al. 1983).

    Args:
        dim: D.
        count: How many vectors went in.
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
        """Take in a batch of vectors, (B, D); the moments themselves, changed."""
        if not len(features):
            return self
        x = features.to("cpu", torch.float64)
        mean = x.mean(0)
        centred = x - mean
        return self.merge(Moments(self.dim, len(x), mean, centred.T @ centred))

    def merge(self, other: Moments) -> Moments:
        """Take in other moments; these themselves, changed."""
        if not other.count:
            return self
        total, away = self.count + other.count, other.mean - self.mean
        self.scatter += other.scatter + torch.outer(away, away) * (self.count * other.count / total)
        self.mean += away * (other.count / total)
        self.count = total
        return self

    def copy(self) -> Moments:
        """Moments of their own."""
        return Moments(self.dim, self.count, self.mean.clone(), self.scatter.clone())

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, float64, (D, D).

        Raises:
            DdimError: Of fewer than two vectors.
        """
        if self.count < 2:
            raise DdimError("statistics", f"are of {self.count} picture", "a covariance needs two or more")
        return self.scatter / (self.count - 1)


def of(features: Tensor, block: int = 64) -> Moments:
    """The moments of vectors, (N, D), taken in `block` at a time."""
    made = Moments(features.shape[1])
    for part in torch.split(features, block):
        made.add(part)
    return made


def factor(moments: Moments) -> Tensor:
    """A factor F of a covariance, F F^T = C, float64, (D, R), with R its numerical rank.

    Of fewer vectors than dimensions most eigenvalues are 0, and are computed as rounding errors of either sign, of the
    size of D machine epsilons of the largest. Those are left out: the square root of one, 1e-8, is no rounding error.

    Raises:
        DdimError: If an eigenvalue is negative by more than rounding: no set of vectors has such a covariance.
    """
    values, vectors = torch.linalg.eigh(moments.covariance)
    largest = float(values.abs().max())
    floor = moments.dim * torch.finfo(torch.float64).eps * largest
    # What gathered sums of float32 features lose by cancellation is far below 1e-6 of the largest.
    if float(values.min()) < -max(floor, 1e-6 * largest):
        raise DdimError("statistics", "have a covariance with a negative eigenvalue", "make them again")
    kept = values > floor
    made: Tensor = vectors[:, kept] * values[kept].sqrt()
    return made


def frechet(a: Moments, b: Moments, factor_b: Tensor | None = None) -> float:
    """The squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017 call it FID).

    |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^1/2. The last trace is the sum of the singular values of
    F_a^T F_b, F F^T = C. (The eigenvalues of C_b^1/2 C_a C_b^1/2 are their squares; the root of an eigenvalue that is 0
    but for rounding would be of the size 1e-8, and D of them make the distance of a set from itself negative.)

    Args:
        a: Count, mean and scatter of one set.
        b: Of the other.
        factor_b: `factor(b)`, where many are held against one.

    Returns:
        The distance, at least 0, and exactly 0 of equal moments.

    Raises:
        DdimError: If the two are of different dimensions, of fewer than two vectors, not finite, or not of vectors.
    """
    if a.dim != b.dim:
        raise DdimError("statistics", f"are of {a.dim} and of {b.dim} features", "use one extractor for both")
    first, second = a.covariance, b.covariance
    if not all(torch.isfinite(part).all() for part in (a.mean, b.mean, first, second)):
        raise DdimError("statistics", "hold numbers that are not finite", "make them again")
    if torch.equal(a.mean, b.mean) and torch.equal(first, second):
        return 0.0
    cross = torch.linalg.svdvals(factor(a).T @ (factor(b) if factor_b is None else factor_b)).sum()
    away = (a.mean - b.mean).square().sum()
    # Below 0 by rounding alone: the sum is never negative (both covariances have been found to be such), and what is
    # computed of it is off by some 1e-13 of the two traces.
    return max(0.0, float(away + first.trace() + second.trace() - 2 * cross))
