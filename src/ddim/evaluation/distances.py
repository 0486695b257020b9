"""Distances between samples and data, with error estimates."""

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
FEWEST = 8  # smallest number of images for KID, precision and recall


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate with its standard error.

    Args:
        value: The estimate.
        error: Its standard error; None if it cannot be computed.
    """

    value: float
    error: float | None


def jackknife(features: Tensor, reference: Moments, groups: int = GROUPS) -> float | None:
    """Grouped jackknife standard error of the Frechet distance over the choice of samples.

    Args:
        features: Features of the samples, (N, D), in random order.
        reference: Moments of the data.
        groups: Number of groups, each of which is left out in turn.

    Returns:
        The error; None for fewer than two samples per group.
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
    """The Frechet distance extrapolated to infinitely many samples (Chong & Forsyth 2020).

    The bias of the distance of N samples is about c / N. A line is fitted to the distances of subsets against 1 / N and
    extrapolated to 1 / N = 0. The error is the fit's alone, without the sampling error. For samples
    very close to the data the estimate may be slightly negative; it is not clipped at 0, which would bias it.

    Args:
        features: Features of the samples, (N, D).
        reference: Moments of the data, treated as exact.
        seed: Seed of the random subsets.
        sizes: Number of subsets, with sizes from N / 4 to N, evenly spaced in 1 / N.

    Returns:
        The estimate; None if N / 4 <= D.
    """
    n = len(features)
    if n // 4 <= features.shape[1]:
        return None
    rates = np.linspace(4 / n, 1 / n, sizes)
    values, of_data = [], factor(reference)
    for k, rate in enumerate(rates):
        subset = permutation(seed, k, n)[: round(1 / rate)]
        values.append(frechet(of(features[torch.from_numpy(subset)], 4096), reference, of_data))
    design = np.stack([np.ones(sizes), rates], axis=1)
    line, *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    residual = np.array(values) - design @ line
    variance = (residual**2).sum() / (sizes - 2)
    error = float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))
    return Estimate(float(line[0]), error)


def distances(samples: Statistics, data: Statistics, seed: int = 0, any_protocol: bool = False) -> dict[str, Any]:
    """All distances between samples and data.

    Args:
        samples: Statistics of the samples.
        data: Statistics of the data.
        seed: Seed of the random subsets.
        any_protocol: Whether to allow statistics computed with different protocols.

    Returns:
        "fd" (FID in Inception's feature space); "fd_error", its jackknife standard error over the samples; "fd_limit"
        and "fd_limit_error", see `fid_infinity`; "kid", "kid_std", "precision" and "recall", if torch-fidelity is
        installed. All but "fd" use the stored features, whose number is "kept"; "fd_error" is scaled to the number of
        all samples. A value that cannot be computed is None.

    Raises:
        DdimError: If the statistics are not comparable, or are of fewer than two images.
    """
    if not any_protocol:
        check_comparable(samples, data)
    for stats in (samples, data):
        if stats.moments.count < 2:
            raise DdimError(stats.protocol.data, "has one image", "use two or more, better thousands")
    limit = fid_infinity(samples.features, data.moments, seed)
    error, stored = jackknife(samples.features, data.moments), len(samples.features)
    result: dict[str, Any] = {
        "fd": frechet(samples.moments, data.moments),
        "fd_error": None if error is None else error * (stored / samples.moments.count) ** 0.5,
        "kept": stored,
        "fd_limit": limit.value if limit else None,
        "fd_limit_error": limit.error if limit else None,
    }
    names = ("kid", "kid_std", "precision", "recall")
    extra: dict[str, Any] = {}
    if fidelity.installed() and min(len(samples.features), len(data.features)) >= FEWEST:
        extra = fidelity.kid(samples.features, data.features, seed)
        extra |= fidelity.precision_recall(samples.features, data.features)
    return result | {name: extra.get(name) for name in names}
