from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal

from bench import SCHEDULES, randn
from ddim.errors import DdimError
from ddim.process.gaussian import chain_weights
from ddim.process.joint import Inference
from ddim.process.schedule import Level

LINEAR = SCHEDULES["linear"]
NAMES = ["linear", "cosine", "linear+zero-terminal-snr"]
DIRECTIONS = ["backward", "forward"]


@st.composite
def families(draw: st.DrawFn, smallest: float = 0.0) -> Inference:
    """Any member: 1 to 5 timesteps in tau, up to 2 outside, every sigma from `smallest` to all of its level's noise."""
    schedule = SCHEDULES[draw(st.sampled_from(NAMES))]
    times = draw(st.lists(st.integers(1, 1000), min_size=3, max_size=7, unique=True))
    outside = draw(st.integers(0, 2))
    levels = schedule.levels(sorted(times[outside:]))
    parts = draw(st.lists(st.floats(smallest, 1), min_size=len(levels) - 1, max_size=len(levels) - 1))
    sigma = tuple(part * level.noise for part, level in zip(parts, levels, strict=False))
    return Inference(levels, sigma, schedule.levels(times[:outside]))


def covariance(family: Inference) -> Tensor:
    """Cov(x_i, x_j | x_0) in closed form: noise_i noise_j times the correlations of the steps between them."""
    levels = (*family.levels, *family.outside)
    out = torch.diag(torch.tensor([level.variance for level in levels], dtype=torch.float64))
    for i, j in itertools.combinations(range(len(family.levels)), 2):
        correlation = 1.0
        for k in range(i, j):
            variance = levels[k].variance
            correlation *= math.sqrt(max(variance - family.sigma[k] ** 2, 0.0) / variance)
        out[i, j] = out[j, i] = levels[i].noise * levels[j].noise * correlation
    return out


def signals(family: Inference) -> Tensor:
    return torch.tensor([level.signal for level in (*family.levels, *family.outside)], dtype=torch.float64)


@dataclass(frozen=True)
class LinearPath:
    """A path as linear weights: of x_0 (count,), and of the draws (count, count)."""

    of_x0: Tensor
    of_draws: Tensor


def linear_path(family: Inference, direction: str) -> LinearPath:
    """The weights of a path, from basis vectors for x_0 and the draws; exact, without sampling."""
    count = len(family.levels) + len(family.outside)
    basis = torch.eye(count + 1, dtype=torch.float64)
    calls = []

    def draw(k: int) -> Tensor:
        calls.append(k)
        return basis[k + 1]

    path = getattr(family, direction)(basis[0], draw)
    assert sorted(calls) == list(range(count))
    return LinearPath(path[:, 0], path[:, 1:])


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(family=families())
def test_both_directions_give_the_joint_distribution(direction: str, family: Inference) -> None:
    """Eq. (6): both orders give the same joint Gaussian, with the marginals of Lemma 1 for every valid sigma."""
    path = linear_path(family, direction)
    cov = path.of_draws @ path.of_draws.T
    torch.testing.assert_close(path.of_x0, signals(family), rtol=0, atol=1e-12)
    torch.testing.assert_close(cov.diagonal(), 1 - signals(family) ** 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(cov, covariance(family), rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_sigma_one_draw_determines_the_path(direction: str) -> None:
    """Eq. (6): at eta = 0 all of tau lies on one straight line x_t = signal x_0 + noise eps; outside does not."""
    levels, outside = LINEAR.levels([1, 300, 700, 1000]), LINEAR.levels([500])
    path = linear_path(Inference.of_eta(levels, 0.0, outside), direction)
    first = 3 if direction == "backward" else 0
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[:4, first] = torch.tensor([level.noise for level in levels], dtype=torch.float64)
    expected[4, 4] = outside[0].noise
    torch.testing.assert_close(path.of_draws, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_eta_one_is_the_markov_chain(name: str, direction: str) -> None:
    """Eq. (6): at eta = 1 it is the joint of eq. (3), here composed step by step; at other eta it is not.

    The misprint sqrt((1 - abar_t) / abar_s) in sigma would fail.
    """
    levels = SCHEDULES[name].levels([1, 2, 250, 700, 1000])
    chain = torch.zeros(5, 5, dtype=torch.float64)
    state, before = torch.zeros(5, dtype=torch.float64), Level(0, math.inf)
    for i, level in enumerate(levels):
        of_x, std = chain_weights(before, level)
        state = of_x * state + std * torch.eye(5, dtype=torch.float64)[i]
        chain[i], before = state, level
    deviation = {
        eta: (covariance - chain @ chain.T).abs().max().item()
        for eta in (0.0, 0.5, 1.0)
        for weights in [linear_path(Inference.of_eta(levels, eta), direction).of_draws]
        for covariance in [weights @ weights.T]
    }
    assert deviation[1.0] < 1e-7  # at zero terminal SNR sigma is all of the noise, and its root is coarse
    assert deviation[0.0] > deviation[0.5] > 0.05
    half, whole = (Inference.of_eta(levels, eta).sigma for eta in (0.5, 1.0))
    assert [2 * value for value in half] == list(whole)  # eta is on the standard deviation


@given(families(smallest=0.05), st.integers(0, 1000))
def test_log_prob_is_the_density_of_the_joint_gaussian(family: Inference, seed: int) -> None:
    """Eqs. (52) and (53): both factorisations are the density of the joint Gaussian, with timesteps outside tau."""
    x0 = randn(3, 2, 2, seed=seed)
    draws = 2 * randn(len(family.levels) + len(family.outside), *x0.shape, seed=seed + 1)
    path = family.backward(x0, lambda k: draws[k])
    down, up = family.log_prob(path, x0), family.log_prob_forward(path, x0)
    joint = MultivariateNormal(torch.zeros(len(path), dtype=torch.float64), covariance(family))
    mean = signals(family) * x0[..., None]
    expected = joint.log_prob(path.movedim(0, -1) - mean).sum(dim=(1, 2))
    assert down.shape == (3,)
    torch.testing.assert_close(down, up, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(down, expected, rtol=1e-9, atol=1e-9)


@given(families(smallest=0.05))
def test_timesteps_outside_tau_are_independent(family: Inference) -> None:
    """Eqs. (52) and (53): given x_0 the joint is that of tau times one marginal (4) per timestep outside."""
    x0 = randn(4, 3, seed=1)
    on_tau, count = replace(family, outside=()), len(family.levels)
    draws = randn(count + len(family.outside), *x0.shape, seed=2)
    path = family.forward(x0, lambda k: draws[k])
    alone = [replace(family, levels=(level,), sigma=(), outside=()) for level in family.outside]
    parts = [on_tau.log_prob(path[:count], x0)]
    parts += [marginal.log_prob(path[count + i : count + i + 1], x0) for i, marginal in enumerate(alone)]
    torch.testing.assert_close(family.log_prob(path, x0), torch.stack(parts).sum(dim=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_path_has_the_dtype_of_x0(direction: str) -> None:
    family = Inference.of_eta(LINEAR.levels([10, 500]), 0.5, LINEAR.levels([3]))
    x0 = randn(2, 3, dtype=torch.float32)
    path = getattr(family, direction)(x0, lambda k: randn(2, 3, seed=k, dtype=torch.float32))
    assert path.dtype == torch.float32
    assert path.shape == (3, 2, 3)
    assert family.log_prob(path, x0).shape == (2,)


@pytest.mark.parametrize("method", ["log_prob", "log_prob_forward"])
def test_log_prob_without_a_density_is_an_error(method: str) -> None:
    levels, x0 = LINEAR.levels([10, 500, 900]), randn(2, 3)
    with pytest.raises(ValueError, match=r"\bsigma = 0\b"):
        getattr(Inference(levels, (0.02, 0.0)), method)(randn(3, 2, 3), x0)
    with pytest.raises(ValueError, match=r"\(3, 2, 3\)"):
        getattr(Inference(levels, (0.02, 0.1)), method)(randn(2, 2, 3), x0)


ONE, TWO, THREE = LINEAR.levels([100, 200, 300])
CLEAN = LINEAR.level(0)


@pytest.mark.parametrize(
    ("levels", "sigma", "outside", "message"),
    [
        ((), (), (), r"^levels: "),
        ((CLEAN, ONE), (0.0,), (), r"^level t = 0: "),
        ((ONE,), (), (CLEAN,), r"^level t = 0: "),
        ((ONE, THREE, TWO), (0.1, 0.1), (), r"^level t = 200: "),
        ((ONE, ONE), (0.1,), (), r"^level t = 100: "),
        ((ONE, TWO), (0.1,), (ONE,), r"^level t = 100: "),
        ((ONE,), (), (TWO, TWO), r"^level t = 200: "),
        ((ONE, TWO), (), (), r"^sigma: "),
        ((ONE, TWO), (0.1, 0.1), (), r"^sigma: "),
        ((ONE, TWO), (-0.1,), (), r"^level t = 100: .*\bsigma = -0\.1\b"),
        ((ONE, TWO), (math.nan,), (), r"^level t = 100: .*\bsigma = nan\b"),
        ((ONE, TWO, THREE), (0.1, 1.0), (), r"^level t = 200: .*\bsigma = 1\b"),
    ],
)
def test_invalid_levels_and_sigmas_are_errors(levels: tuple, sigma: tuple, outside: tuple, message: str) -> None:
    with pytest.raises(DdimError, match=message):
        Inference(levels, sigma, outside)


@pytest.mark.parametrize(
    ("levels", "eta", "message"),
    [
        ([TWO, ONE], 1.0, r"^level t = 100: "),
        ([CLEAN, ONE], 1.0, r"^level t = 0: "),
        ([ONE, TWO], 9.0, r"^level t = 100: "),
    ],
)
def test_of_eta_validates_its_levels(levels: list[Level], eta: float, message: str) -> None:
    with pytest.raises(DdimError, match=message):
        Inference.of_eta(levels, eta)
