from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import SCHEDULES, randn
from ddim.gaussian import diffuse, posterior_weights, sigma, sigma_hat

LINEAR = SCHEDULES["linear"]
ZERO = SCHEDULES["linear+zero-terminal-snr"]
pairs = st.tuples(st.sampled_from([LINEAR, ZERO]), st.integers(1, 1000), st.integers(1, 1000)).filter(
    lambda drawn: drawn[1] != drawn[2]
)


@given(st.floats(1, 1000))
def test_diffuse(t: float) -> None:
    """Eq. (4): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; the misprint abar_t x_0 + ... would fail."""
    level, x0, eps = LINEAR.level(t), randn(3, 2, seed=1), randn(3, 2, seed=2)
    expected = math.sqrt(level.alpha_bar) * x0 + math.sqrt(1 - level.alpha_bar) * eps
    torch.testing.assert_close(diffuse(x0, eps, level), expected, rtol=0, atol=1e-13)
    assert diffuse(x0.float(), eps.float(), level).dtype == torch.float32


@given(pairs, st.floats(0, 1))
def test_the_posterior_keeps_the_marginal(drawn: tuple, part: float) -> None:
    """Eq. (7): its mean and variance, averaged over q(x_t | x_0), give those of q(x_s | x_0), for every legal sigma."""
    schedule, t, s = drawn
    now, following = schedule.level(t), schedule.level(s)
    std = part * following.noise
    of_x0, of_eps = posterior_weights(now, following, std)
    # eps = (x_t - signal x_0) / noise is standard normal under q(x_t | x_0).
    assert of_x0 == math.sqrt(following.alpha_bar)
    assert of_eps**2 + std**2 == pytest.approx(1 - following.alpha_bar, rel=1e-9)


@pytest.mark.parametrize("std", [-1e-6, 1.0 + 1e-6])
def test_an_illegal_sigma_is_refused(std: float) -> None:
    now, following = LINEAR.level(500), LINEAR.level(400)
    with pytest.raises(ValueError, match="outside"):
        posterior_weights(now, following, std * following.noise)


@given(pairs)
def test_sigma_of_eta_one_is_the_forward_chains_posterior(drawn: tuple) -> None:
    """Eq. (16): at eta = 1 it is the std of q(x_s | x_t, x_0) of the Markov chain, found here by Bayes' rule."""
    schedule, t, s = drawn[0], max(drawn[1:]), min(drawn[1:])
    now, following = schedule.level(t), schedule.level(s)
    kept = now.alpha_bar / following.alpha_bar  # x_t = sqrt(kept) x_s + sqrt(1 - kept) noise
    precision = 1 / following.variance + kept / (1 - kept)
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
def test_neighbours_give_the_numbers_of_ddpm(name: str) -> None:
    """Ho et al. 2020: beta_tilde_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t, and beta_t itself for sigma-hat."""
    made = SCHEDULES[name]
    for t in range(2, 1001):
        now, before = made.level(t), made.level(t - 1)
        beta = 1 - now.alpha_bar / before.alpha_bar
        beta_tilde = (1 - before.alpha_bar) / (1 - now.alpha_bar) * beta
        assert sigma(now, before) ** 2 == pytest.approx(beta_tilde, abs=1e-12)
        assert sigma_hat(now, before) ** 2 == pytest.approx(beta, abs=1e-12)
        assert sigma(now, before) < sigma_hat(now, before) or now.alpha_bar == 0


def test_the_last_step_is_noiseless_but_for_sigma_hat() -> None:
    first, clean = LINEAR.level(1), LINEAR.level(0)
    assert sigma(first, clean) == 0.0
    assert sigma_hat(first, clean) == pytest.approx(first.noise, rel=1e-12)
