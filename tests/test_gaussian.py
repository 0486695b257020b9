from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import SCHEDULES, randn
from ddim.process.gaussian import (
    chain_weights,
    diffuse,
    forward_weights,
    marginal_after,
    posterior_weights,
    sigma,
    sigma_hat,
)
from ddim.process.schedule import Level, from_betas

LINEAR = SCHEDULES["linear"]
ZERO = SCHEDULES["linear+zero-terminal-snr"]
pairs = st.tuples(st.sampled_from([LINEAR, ZERO]), st.integers(1, 1000), st.integers(1, 1000)).filter(
    lambda drawn: drawn[1] != drawn[2]
)


@given(st.floats(1, 1000))
def test_diffuse_is_the_forward_marginal(t: float) -> None:
    """Eq. (4): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; the misprint abar_t x_0 + ... would fail."""
    level, x0, eps = LINEAR.level(t), randn(3, 2, seed=1), randn(3, 2, seed=2)
    expected = math.sqrt(level.alpha_bar) * x0 + math.sqrt(1 - level.alpha_bar) * eps
    torch.testing.assert_close(diffuse(x0, eps, level), expected, rtol=0, atol=1e-13)
    assert diffuse(x0.float(), eps.float(), level).dtype == torch.float32


@given(pairs, st.floats(0, 1))
def test_the_posterior_preserves_the_marginal(drawn: tuple, fraction: float) -> None:
    """Eq. (7): its mean and variance, averaged over q(x_t | x_0), give those of q(x_s | x_0), for every valid sigma."""
    schedule, t, s = drawn
    now, following = schedule.level(t), schedule.level(s)
    std = fraction * following.noise
    of_x0, of_eps = posterior_weights(now, following, std)
    # eps = (x_t - signal x_0) / noise is standard normal under q(x_t | x_0).
    assert of_x0 == math.sqrt(following.alpha_bar)
    assert of_eps**2 + std**2 == pytest.approx(1 - following.alpha_bar, rel=1e-9)


@pytest.mark.parametrize("std", [-1e-6, 1.0 + 1e-6, math.nan])
def test_an_invalid_sigma_is_an_error(std: float) -> None:
    now, following = LINEAR.level(500), LINEAR.level(400)
    with pytest.raises(ValueError, match="outside"):
        posterior_weights(now, following, std * following.noise)


@given(pairs)
def test_sigma_of_eta_one_is_the_forward_chains_posterior(drawn: tuple) -> None:
    """Eq. (16): at eta = 1 it is the std of q(x_s | x_t, x_0) of the Markov chain, computed here by Bayes' rule."""
    schedule, t, s = drawn[0], max(drawn[1:]), min(drawn[1:])
    now, following = schedule.level(t), schedule.level(s)
    keep = now.alpha_bar / following.alpha_bar  # x_t = sqrt(keep) x_s + sqrt(1 - keep) noise
    precision = 1 / following.variance + keep / (1 - keep)
    assert sigma(now, following) ** 2 == pytest.approx(1 / precision, rel=1e-8)


@given(pairs, st.floats(0, 1))
def test_eta_multiplies_the_standard_deviation(drawn: tuple, eta: float) -> None:
    """Eq. (16): eta = 0.5 is exactly half of eta = 1; eta on the variance would give 0.71."""
    schedule, t, s = drawn[0], max(drawn[1:]), min(drawn[1:])
    now, following = schedule.level(t), schedule.level(s)
    assert sigma(now, following, 0.5) == sigma(now, following, 1.0) / 2
    assert sigma(now, following, 0.0) == 0.0
    assert sigma(now, following, eta) == pytest.approx(eta * sigma(now, following, 1.0), rel=1e-14)
    assert sigma(now, following, 1.0) <= following.noise


@pytest.mark.parametrize("name", SCHEDULES)
def test_sigma_of_neighbouring_timesteps_is_that_of_ddpm(name: str) -> None:
    """Ho et al. 2020: beta_tilde_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t, and beta_t itself for sigma-hat."""
    schedule = SCHEDULES[name]
    for t in range(2, 1001):
        now, before = schedule.level(t), schedule.level(t - 1)
        beta = 1 - now.alpha_bar / before.alpha_bar
        beta_tilde = (1 - before.alpha_bar) / (1 - now.alpha_bar) * beta
        assert sigma(now, before) ** 2 == pytest.approx(beta_tilde, abs=1e-12)
        assert sigma_hat(now, before) ** 2 == pytest.approx(beta, abs=1e-12)
        assert sigma(now, before) < sigma_hat(now, before) or now.alpha_bar == 0


def test_the_last_step_adds_noise_only_with_sigma_hat() -> None:
    first, clean = LINEAR.level(1), LINEAR.level(0)
    assert sigma(first, clean) == 0.0
    assert sigma_hat(first, clean) == pytest.approx(first.noise, rel=1e-12)


rising = pairs.map(lambda drawn: (drawn[0].level(min(drawn[1:])), drawn[0].level(max(drawn[1:]))))


def normal(x: float, mean: float, std: float) -> float:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("beta", [0.3, 1e-4, 1e-10])
def test_chain_weights_of_neighbours_follow_from_beta(beta: float) -> None:
    """Eq. (3): sqrt(1 - beta) and sqrt(beta), to full precision where 1 - abar_t / abar_s would cancel."""
    levels = from_betas([beta] * 4).levels(range(5))
    for now, following in itertools.pairwise(levels):
        of_x, std = chain_weights(now, following)
        assert of_x == pytest.approx(math.sqrt(1 - beta), rel=1e-14, abs=0)
        assert std == pytest.approx(math.sqrt(beta), rel=1e-14, abs=0)


@given(rising, st.integers(1, 1000))
def test_chain_weights_compose(pair: tuple[Level, Level], t: int) -> None:
    """Eq. (3): two steps are one, and from clean data it is eq. (4)."""
    clean, (now, following) = LINEAR.level(0), pair
    assert chain_weights(clean, now) == pytest.approx((now.signal, now.noise), rel=1e-12)
    (first, noise), (second, more) = chain_weights(clean, now), chain_weights(now, following)
    assert first * second == pytest.approx(following.signal, rel=1e-12)
    assert (second * noise) ** 2 + more**2 == pytest.approx(following.variance, rel=1e-12)


@pytest.mark.parametrize(("t", "s"), [(400, 500), (400, 400), (0, 0)])
@pytest.mark.parametrize("kernel", [chain_weights, lambda now, following: forward_weights(now, following, 0.0)])
def test_a_forward_step_to_a_cleaner_level_is_an_error(kernel: Callable, t: int, s: int) -> None:
    with pytest.raises(ValueError):
        kernel(LINEAR.level(s), LINEAR.level(t))


@given(rising, st.floats(0.01, 1), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_forward_weights_satisfy_bayes_rule(pair: tuple[Level, Level], fraction: float, point: list[float]) -> None:
    """Eq. (8): q(x_t | x_s, x_0) q(x_s | x_0) = q(x_s | x_t, x_0) q(x_t | x_0), with (4) and (7) as printed."""
    s, t = pair
    std = fraction * s.noise
    x0, x_s, x_t = point[0], s.signal * point[0] + s.noise * point[1], t.signal * point[0] + t.noise * point[2]
    of_x, of_x0, forward_std = forward_weights(s, t, std)
    left = normal(x_t, of_x * x_s + of_x0 * x0, forward_std) + normal(x_s, s.signal * x0, s.noise)
    eps = (x_t - math.sqrt(t.alpha_bar) * x0) / math.sqrt(1 - t.alpha_bar)
    mean = math.sqrt(s.alpha_bar) * x0 + math.sqrt(max(1 - s.alpha_bar - std**2, 0)) * eps
    assert left == pytest.approx(normal(x_s, mean, std) + normal(x_t, t.signal * x0, t.noise), rel=1e-8, abs=1e-8)


@given(rising, st.floats(-3, 3))
def test_forward_without_sigma_is_deterministic(pair: tuple[Level, Level], eps: float) -> None:
    """Eq. (8): at sigma = 0, x_s and x_0 determine x_t: it lies on their straight line in eps."""
    s, t = pair
    of_x, of_x0, std = forward_weights(s, t, 0.0)
    assert std == 0
    assert of_x * (s.signal * 0.7 + s.noise * eps) + of_x0 * 0.7 == pytest.approx(t.signal * 0.7 + t.noise * eps)


@given(rising)
def test_forward_is_the_markov_chain_at_eta_one(pair: tuple[Level, Level]) -> None:
    """Eq. (8): with the sigma of eq. (16) it does not depend on x_0 and is the chain of eq. (3)."""
    s, t = pair
    of_x, of_x0, std = forward_weights(s, t, sigma(t, s))
    chain_x, chain_std = chain_weights(s, t)
    # of_x^2 is noise_t^2 / noise_s^2 times a difference of two numbers near 1; where it is small its root is coarse.
    scale = t.variance / s.variance * 1e-15
    slack = min(scale / chain_x if chain_x else math.inf, math.sqrt(scale))
    assert of_x == pytest.approx(chain_x, rel=1e-12, abs=slack)
    assert of_x0 == pytest.approx(0.0, abs=1e-15 + slack)
    assert std == pytest.approx(chain_std, rel=1e-12)


@given(st.floats(0, 1), st.integers(1, 900))
def test_forward_is_not_markov_elsewhere(fraction: float, t: int) -> None:
    """Eq. (8): x_t depends on x_0 as well as x_s, with opposite signs below and above eta = 1."""
    now, following = LINEAR.level(t), LINEAR.level(t + 100)
    weights = [forward_weights(now, following, fraction * 0.9 * sigma(following, now))[1]]
    weights += [forward_weights(now, following, sigma(following, now) * 0.05 + 0.95 * now.noise)[1]]
    assert weights[0] < -1e-6 < 1e-6 < weights[1]


def test_forward_from_clean_data() -> None:
    """Eq. (8): x_0 does not determine eps, so from t = 0 it is eq. (4); the only valid sigma is 0."""
    clean, following = LINEAR.level(0), LINEAR.level(300)
    assert forward_weights(clean, following, 0.0) == (0.0, following.signal, following.noise)
    with pytest.raises(ValueError, match="outside"):
        forward_weights(clean, following, 1e-6)
    with pytest.raises(ValueError, match="outside"):
        forward_weights(following, LINEAR.level(301), following.noise * (1 + 1e-6))


@given(pairs, st.floats(0, 1))
def test_the_marginal_of_one_level_gives_that_of_the_next(drawn: tuple, fraction: float) -> None:
    """Eqs. (22), (23), (24) and (25): Lemma 1, for every valid sigma, to cleaner and to noisier levels."""
    now, following = drawn[0].level(drawn[1]), drawn[0].level(drawn[2])
    after = marginal_after(now.signal, now.variance, now, following, fraction * following.noise)
    assert after == pytest.approx((following.signal, following.variance), rel=1e-12)


@given(pairs, st.floats(0, 1), st.floats(-2, 2), st.floats(0, 2))
def test_marginal_after_is_the_integral_over_x_t(drawn: tuple, fraction: float, signal: float, variance: float) -> None:
    """Eqs. (22), (23), (24) and (25): mean and variance are those of the integral over x_t, here by quadrature."""
    now, following = drawn[0].level(drawn[1]), drawn[0].level(drawn[2])
    std, x0 = fraction * following.noise, 1.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    x_t = signal * x0 + math.sqrt(variance) * nodes
    kappa = math.sqrt(max(following.variance - std**2, 0.0) / now.variance)
    means = following.signal * x0 + kappa * (x_t - now.signal * x0)
    mean, second = weights @ means / weights.sum(), weights @ (means**2 + std**2) / weights.sum()
    after = marginal_after(signal, variance, now, following, std)
    assert after[0] * x0 == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert after[1] == pytest.approx(second - mean**2, rel=1e-9, abs=1e-9 * (1 + second))


@pytest.mark.parametrize(("t", "std", "wrong"), [(0, 0.1, "."), (9, 2.0, "outside"), (9, -0.1, "outside")])
def test_marginal_after_an_invalid_step_is_an_error(t: int, std: float, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        marginal_after(1.0, 0.0, LINEAR.level(t), LINEAR.level(400), std)
