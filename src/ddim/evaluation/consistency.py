"""How much of a sample depends on x_T alone: the paper's Figure 5 as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ddim.errors import DdimError
from ddim.evaluation.accumulate import FeatureStats


@dataclass(frozen=True, slots=True)
class Consistency:
    """Samples of two numbers of calls from the same x_T, beside samples from different x_T.

    Args:
        n: How many pairs the correlations are of.
        correlation: Mean over pairs of the correlation of their pixels, in [-1, 1].
        unrelated: The same of pairs from different x_T.
        feature_pairs: How many pairs the distances are of.
        distance: Mean distance of the pairs' features.
        unrelated_distance: The same of pairs from different x_T.
    """

    n: int
    correlation: float
    unrelated: float
    feature_pairs: int
    distance: float
    unrelated_distance: float

    @property
    def ratio(self) -> float | None:
        """The distance in units of that of unrelated samples: 0 for the same pictures, 1 for unrelated ones.

        None where unrelated samples are all alike too.
        """
        return self.distance / self.unrelated_distance if self.unrelated_distance else None


def consistency(a: FeatureStats, b: FeatureStats) -> Consistency:
    """Compare samples of the same indices and seed.

    Unrelated pairs are sample i of one and sample i + n / 2 (counted round) of the other.

    Args:
        a: Samples made with one number of calls.
        b: Samples made with another.

    Raises:
        DdimError: If fewer than two samples of each are kept.
    """
    n, m = min(len(a.pictures), len(b.pictures)), min(len(a.features), len(b.features))
    if n < 2 or m < 2:
        raise DdimError("consistency", "of fewer than two samples", "sample more")
    x, y = _unit(a.pictures[:n]), _unit(b.pictures[:n])
    f, g = a.features[:m].double(), b.features[:m].double()
    return Consistency(
        n,
        float((x * y).sum(1).mean()),
        float((x * np.roll(y, n // 2, axis=0)).sum(1).mean()),
        m,
        float((f - g).norm(dim=1).mean()),
        float((f - torch.roll(g, m // 2, 0)).norm(dim=1).mean()),
    )


def _unit(pictures: np.ndarray) -> np.ndarray:
    """Each picture as a vector without mean, of length 1; a picture of one colour stays 0."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    unit: np.ndarray = flat / np.where(length > 0, length, 1.0)
    return unit
