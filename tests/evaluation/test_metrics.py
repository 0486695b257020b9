"""Distances against closed forms and torch-fidelity, and the accuracy of their error estimates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddim import evaluation
from ddim.errors import DdimError
from ddim.evaluation import Moments, Protocol, Statistics, fidelity, frechet
from ddim.evaluation.distances import distances, fid_infinity, jackknife
from ddim.evaluation.moments import of
from evaluation.kit import random_images, small


def draws(n: int, dim: int = 5, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def statistics(features: Tensor, **changes: Any) -> Statistics:
    plain = {"data": "draws", "count": len(features), "grid": "8x8x1", "extractor": "e", "extractor_sha256": "0"}
    return Statistics(of(features), features, Protocol(**(plain | changes)))


def moments(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments(len(mean), 2, mean.double(), covariance.double())


def test_gaussians_with_diagonal_covariances() -> None:
    """|m - n|^2 + sum (s_i - r_i)^2 for diagonal covariances."""
    m, n, s, r = (torch.tensor(values, dtype=torch.float64) for values in ([1, 2], [0, 4], [2, 1], [1, 3]))
    distance = frechet(moments(m, torch.diag(s**2)), moments(n, torch.diag(r**2)))
    assert distance == pytest.approx(1 + 4 + 1 + 4, rel=1e-12)


def test_the_distance_is_rotation_invariant() -> None:
    a, b = draws(50), draws(60, seed=1, scale=2.0, shift=0.3)
    rotation, _ = torch.linalg.qr(draws(5, seed=2).double())
    assert frechet(of(a.double() @ rotation), of(b.double() @ rotation)) == pytest.approx(
        frechet(of(a), of(b)), rel=1e-10
    )


def test_the_distance_is_symmetric_and_zero_for_equal_sets() -> None:
    a, b = of(draws(50)), of(draws(60, seed=1, scale=2.0))
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-10)
    assert abs(frechet(a, a)) < 1e-10
    flat = of(torch.cat([draws(30), torch.zeros(30, 40)], 1))  # a rank-deficient covariance
    assert abs(frechet(flat, flat)) < 1e-10


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 5))
def test_moments_do_not_depend_on_batches_or_order(n: int, batch: int, seed: int) -> None:
    features = draws(n, seed=seed, shift=1e3)
    mixed = features[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    for other in (of(features, batch), of(mixed, batch)):
        assert torch.allclose(other.mean, features.double().mean(0), rtol=1e-12)
        assert torch.allclose(other.covariance, torch.cov(features.double().T), rtol=1e-9, atol=1e-12)


def test_the_distance_does_not_depend_on_batches_or_order() -> None:
    a, b = draws(1000, shift=100.0), draws(1000, seed=1, shift=100.0)
    mixed = a[torch.randperm(1000, generator=torch.Generator().manual_seed(3))]
    assert frechet(of(mixed, 7), of(b, 333)) == pytest.approx(frechet(of(a), of(b)), rel=1e-6)


def test_parity_with_torch_fidelity() -> None:
    fidelity.need("parity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    for dim, n in ((5, 50), (64, 300), (64, 40)):  # the last with fewer vectors than dimensions
        a, b = draws(n, dim), draws(n + 20, dim, seed=1, scale=1.3, shift=0.2)
        expected = fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x in (a, b)), False)
        assert frechet(of(a), of(b)) == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)


def test_kid_precision_and_recall() -> None:
    a, b = draws(60), draws(80, seed=1, shift=0.5)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    result = fidelity.kid(a, b, subsets=400)
    x, y = a.double(), b.double()
    off = lambda k: float((k.sum() - k.trace()) / (len(k) * (len(k) - 1)))  # noqa: E731
    exact = off(kernel(x, x)) + off(kernel(y, y)) - 2 * float(kernel(x, y).mean())
    assert result["kid_subset"] == 30
    assert abs(result["kid"] - exact) < 4 * result["kid_std"] / math.sqrt(400)
    same = fidelity.precision_recall(a, a)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    far = fidelity.precision_recall(a, a + 100)
    assert (far["precision"], far["recall"]) == (0.0, 0.0)
    narrow = fidelity.precision_recall(0.1 * a, b - 0.5)
    assert narrow["precision"] > 0.9 > 0.3 > narrow["recall"]


def test_the_jackknife_error_is_the_standard_deviation_over_seeds() -> None:
    data = moments(torch.zeros(5), torch.eye(5))
    values, errors = [], []
    for seed in range(60):
        features = draws(400, seed=seed, scale=1.2)
        values.append(frechet(of(features), data))
        errors.append(jackknife(features, data))
    assert np.mean([e for e in errors if e]) == pytest.approx(np.std(values), rel=0.3)
    assert jackknife(draws(19), data) is None


def test_the_extrapolation_removes_the_bias_of_few_samples() -> None:
    """For equal distributions the distance of N samples is about c / N, and extrapolates to about 0."""
    data = moments(torch.zeros(20), torch.eye(20))
    plain, extrapolated = [], []
    for seed in range(12):
        features = draws(400, 20, seed=seed)
        estimate = fid_infinity(features, data)
        assert estimate is not None
        plain.append(frechet(of(features), data))
        extrapolated.append(estimate.value)
    assert abs(np.mean(extrapolated)) < 0.15 * np.mean(plain)
    assert fid_infinity(draws(80, 20), data) is None


@pytest.mark.slow
def test_the_error_is_scaled_to_all_samples() -> None:
    """The jackknife error of the stored features is scaled to the number of all samples."""
    features, data = draws(4000), statistics(draws(3000, seed=1))
    whole = statistics(features)
    few = Statistics(whole.moments, features[:1000], whole.protocol)
    exact, scaled = (distances(stats, data)["fd_error"] for stats in (whole, few))
    assert scaled == pytest.approx(exact, rel=0.6)
    assert (distances(few, data)["kept"], distances(few, data)["fd"]) == (1000, distances(whole, data)["fd"])


def test_all_distances_rank_two_sets() -> None:
    close = distances(statistics(draws(500)), statistics(draws(500, seed=1)))
    worse = distances(statistics(draws(500, shift=1.0)), statistics(draws(500, seed=1)))
    assert close["fd"] < 0.2 < worse["fd"]
    assert abs(close["kid"]) < 5 * close["kid_std"] < worse["kid"]
    assert worse["precision"] < close["precision"] <= 1


@pytest.mark.parametrize(
    "changes", [{"extractor": "f"}, {"extractor_sha256": "1"}, {"grid": "9x9x1"}, {"resize": "crop, box"}]
)
def test_different_protocols_need_any_protocol(changes: dict[str, str]) -> None:
    a, b = statistics(draws(50), resize="crop, lanczos"), statistics(draws(50, seed=1), **({"resize": ""} | changes))
    with pytest.raises(DdimError, match=r"^statistics: "):
        distances(a, b)
    assert distances(a, b, any_protocol=True)["fd"] > 0


def test_samples_can_be_compared_with_resized_data() -> None:
    assert distances(statistics(draws(50)), statistics(draws(50, seed=1), resize="crop, lanczos", split="test"))


def test_incomparable_statistics_are_errors() -> None:
    with pytest.raises(DdimError, match=r"^statistics: "):
        frechet(of(draws(9)), of(draws(9, 6)))
    with pytest.raises(DdimError, match=r"^statistics: "):
        distances(statistics(draws(9)), statistics(draws(9, 6)))
    with pytest.raises(DdimError, match=r"^draws: "):
        distances(statistics(draws(1)), statistics(draws(9)))
    with pytest.raises(DdimError, match=r"^statistics: "):
        frechet(of(draws(9) * math.nan), of(draws(9)))


def test_halves_of_a_set_are_close() -> None:
    images, extractor = random_images(2000), small()
    whole = evaluation.measure(images, extractor)
    assert abs(evaluation.distances(whole, whole)["fd"]) < 1e-3
    halves = [evaluation.measure(images[k::2], extractor) for k in (0, 1)]
    other = evaluation.measure(255 - images, extractor)
    near = evaluation.distances(*halves)
    assert 0 < near["fd"] < 1e-2 * evaluation.distances(whole, other)["fd"]
