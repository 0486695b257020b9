"""Sample consistency: how much of a sample is determined by x_T alone, quantifying the paper's Figure 5."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ddim.errors import DdimError
from ddim.evaluation.accumulate import FeatureStats


@dataclass(frozen=True, slots=True)
class Consistency:
    """Similarity of samples from the same x_T with two numbers of steps, and of unrelated samples for comparison.

    Args:
        n: Number of pairs used for the correlations.
        correlation: Mean pixel correlation of the pairs, in [-1, 1].
        unrelated: Mean pixel correlation of pairs from different x_T.
        feature_pairs: Number of pairs used for the distances.
        distance: Mean feature distance of the pairs.
        unrelated_distance: Mean feature distance of pairs from different x_T.
    """

    n: int
    correlation: float
    unrelated: float
    feature_pairs: int
    distance: float
    unrelated_distance: float

    @property
    def ratio(self) -> float | None:
        """`distance` / `unrelated_distance`: 0 for identical images, 1 for unrelated ones.

        None if the unrelated distance is 0.
        """
        return self.distance / self.unrelated_distance if self.unrelated_distance else None


def consistency(a: FeatureStats, b: FeatureStats) -> Consistency:
    """Compare two sets of samples with the same indices and seed.

    Unrelated pairs are sample i of one set and sample (i + n / 2) mod n of the other.

    Args:
        a: Samples with one number of steps.
        b: Samples with another number of steps.

    Raises:
        DdimError: If either holds fewer than two images or features.
    """
    n, m = min(len(a.images), len(b.images)), min(len(a.features), len(b.features))
    if n < 2 or m < 2:
        raise DdimError("consistency", "needs two or more samples", "draw more")
    x, y = _unit(a.images[:n]), _unit(b.images[:n])
    f, g = a.features[:m].double(), b.features[:m].double()
    return Consistency(
        n,
        float((x * y).sum(1).mean()),
        float((x * np.roll(y, n // 2, axis=0)).sum(1).mean()),
        m,
        float((f - g).norm(dim=1).mean()),
        float((f - torch.roll(g, m // 2, 0)).norm(dim=1).mean()),
    )


def _unit(images: np.ndarray) -> np.ndarray:
    """Each image as a vector with mean 0 and length 1, float64, (N, d); a constant image becomes 0."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    unit: np.ndarray = flat / np.where(length > 0, length, 1.0)
    return unit
