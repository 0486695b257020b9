"""Distances with rank-deficient covariances: not negative, 0 for equal sets, exact up to rounding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ddim.errors import DdimError
from ddim.evaluation import Moments, frechet
from ddim.evaluation.moments import factor, of
from ddim.evaluation.text_quality import divergence


def draws(seed: int, n: int, d: int, decay: float = 0.0) -> torch.Tensor:
    scales = torch.logspace(0, -decay, d, dtype=torch.float64)
    return 3 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scales


def from_inner_products(a: torch.Tensor, b: torch.Tensor) -> float:
    """The same distance without covariances: tr (C_a C_b)^1/2 from an N x M matrix of inner products."""
    x, y = a - a.mean(0), b - b.mean(0)
    n, m = len(a) - 1, len(b) - 1
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cross = torch.linalg.svdvals(x @ y.T).sum() / (n * m) ** 0.5
    return float(shift + x.square().sum() / n + y.square().sum() / m - 2 * cross)


@pytest.mark.parametrize("n", [2, 3, 20, 63, 64, 65, 200])
def test_the_distance_of_a_set_to_itself_is_zero(n: int) -> None:
    for seed in range(3):
        x = draws(seed, n, 64)
        assert frechet(of(x), of(x)) == 0.0
        assert 0.0 <= frechet(of(x), of(x.flip(0), 7)) < 1e-9  # another order of summation


@pytest.mark.parametrize("decay", [0.0, 6.0])
@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 40), (40, 5), (64, 63), (500, 20), (20, 500)])
def test_the_distance_is_exact_for_any_rank(n: int, m: int, decay: float) -> None:
    a, b = draws(1, n, 64, decay), draws(2, m, 64, decay) + 0.1
    expected = from_inner_products(a, b)
    assert frechet(of(a), of(b)) == pytest.approx(expected, abs=1e-10, rel=1e-11)
    assert frechet(of(a), of(b), factor(of(b))) == pytest.approx(expected, abs=1e-10, rel=1e-11)


def test_equal_vectors_have_a_zero_covariance() -> None:
    point, other = torch.ones(2, 4), torch.zeros(3, 4)
    assert frechet(of(point), of(point)) == 0.0
    assert frechet(of(point), of(other)) == pytest.approx(4)
    assert frechet(of(point), of(draws(0, 9, 4))) > 0


def test_fewer_than_two_vectors_have_no_covariance() -> None:
    for n in (0, 1):
        with pytest.raises(DdimError):
            frechet(of(draws(0, n, 4)), of(draws(0, 9, 4)))


def test_an_indefinite_covariance_is_an_error() -> None:
    scatter = torch.diag(torch.tensor([2.0, 1.0, -0.5], dtype=torch.float64))
    wrong = Moments(3, 10, torch.zeros(3, dtype=torch.float64), scatter)
    with pytest.raises(DdimError, match=r"^statistics: "):
        frechet(wrong, of(draws(0, 9, 3)))


def test_the_divergence_of_counts_is_not_negative() -> None:
    for k in range(1, 40):
        a = Counter({str(i): i + 1 for i in range(k)})
        b = Counter({str(i): 10**6 * (i + 1) + (i % 2) for i in range(k)})
        assert 0.0 <= divergence(a, b) < 1e-9
        assert divergence(a, a) == 0.0
