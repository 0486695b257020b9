"""Distances between samples and data, each with how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.evaluation import fidelity
from ddim.evaluation.moments import Moments, factor, frechet, of
from ddim.evaluation.statistics import Statistics, check_comparable
from ddim.process.rng import permutation

GROUPS = 10
SIZES = 8
FEWEST = 8  # of pictures for KID, precision and recall


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error.

    Args:
        value: The figure.
        error: Its standard error; None where it cannot be had.
    """

    value: float
    error: float | None


def jackknife(features: Tensor, reference: Moments, groups: int = GROUPS) -> float | None:
    """The standard error of the Frechet distance over the choice of samples, by leaving out one group after another.

    Args:
        features: Features of the samples, (N, D), in no order.
        reference: Moments of the data.
        groups: How many groups.

    Returns:
        The error; None for fewer than two samples a group.
    """
    if len(features) < 2 * groups:
        return None
    parts = [of(features[k::groups]) for k in range(groups)]
    values, of_data = [], factor(reference)
    for left_out in range(groups):
        rest = Moments(features.shape[1])
        for k, part in enumerate(parts):
            if k != left_out:
                rest.merge(part)
        values.append(frechet(rest, reference, of_data))
    spread = np.array(values) - np.mean(values)
    return float(np.sqrt((groups - 1) / groups * (spread**2).sum()))


def fid_infinity(features: Tensor, reference: Moments, seed: int = 0, sizes: int = SIZES) -> Estimate | None:
    """The Frechet distance as it would be of infinitely many samples (Chong & Forsyth 2020).

    A distance of N samples is too large by nearly c / N; a line through the distances of subsets against 1 / N is
    followed to 1 / N = 0. The error is that of the line alone: what the samples at hand leave open comes on top. Of
    samples very near to the data it may be negative by about its errors, as no distance is; it is left so, since an
    estimate that is cut off at 0 would be too large on average.

    Args:
        features: Features of the samples, (N, D).
        reference: Moments of the data, taken as they are.
        seed: Of the order in which subsets are drawn.
        sizes: How many subsets, of sizes from N / 4, even in 1 / N.

    Returns:
        The estimate; None of so few samples that a quarter of them is not more than D.
    """
    n = len(features)
    if n // 4 <= features.shape[1]:
        return None
    rates = np.linspace(4 / n, 1 / n, sizes)
    values, of_data = [], factor(reference)
    for k, rate in enumerate(rates):
        some = permutation(seed, k, n)[: round(1 / rate)]
        values.append(frechet(of(features[torch.from_numpy(some)], 4096), reference, of_data))
    design = np.stack([np.ones(sizes), rates], axis=1)
    line, *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    residual = np.array(values) - design @ line
    variance = (residual**2).sum() / (sizes - 2)
    error = float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))
    return Estimate(float(line[0]), error)


def distances(samples: Statistics, data: Statistics, seed: int = 0, any_protocol: bool = False) -> dict[str, Any]:
    """All that is measured between samples and data.

    Args:
        samples: Of the samples.
        data: Of the data.
        seed: Of the subsets that spreads are taken over.
        any_protocol: Whether statistics made in different ways are compared all the same.

    Returns:
        "fd" (called FID in Inception's space), "fd_error", its jackknife standard error over the samples, "fd_limit"
        and "fd_limit_error", see `limit`; with torch-fidelity installed "kid", "kid_std", "precision" and "recall" too.
        All but "fd" come from the features that are kept, "kept" in number; "fd_error" is scaled to all of them. What
        cannot be had is None.

    Raises:
        DdimError: If they are not comparable, or hold too few pictures.
    """
    if not any_protocol:
        check_comparable(samples, data)
    for one in (samples, data):
        if one.moments.count < 2:
            raise DdimError(one.protocol.data, "holds one picture", "a distance needs two or more, better thousands")
    far = fid_infinity(samples.features, data.moments, seed)
    error, kept = jackknife(samples.features, data.moments), len(samples.features)
    made: dict[str, Any] = {
        "fd": frechet(samples.moments, data.moments),
        "fd_error": None if error is None else error * (kept / samples.moments.count) ** 0.5,
        "kept": kept,
        "fd_limit": far.value if far else None,
        "fd_limit_error": far.error if far else None,
    }
    names = ("kid", "kid_std", "precision", "recall")
    found: dict[str, Any] = {}
    if fidelity.installed() and min(len(samples.features), len(data.features)) >= FEWEST:
        found = fidelity.kid(samples.features, data.features, seed)
        found |= fidelity.precision_recall(samples.features, data.features)
    return made | {name: found.get(name) for name in names}
