"""Discrete diffusion by enumeration over few categories and timesteps, without sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import SCHEDULES, randn
from ddim.process.categorical import kl, marginal, mixture_weights, posterior, sigma_largest
from ddim.process.schedule import Level, Schedule, from_betas

SHORT = from_betas([0.1, 0.25, 0.3, 0.4, 0.6, 0.9], "short")
TO_PURE_NOISE = from_betas([0.2, 0.3, 0.5, 1.0], "to pure noise")
schedules = st.sampled_from([SHORT, TO_PURE_NOISE, SCHEDULES["linear"], SCHEDULES["cosine"]])


def distributions(*shape: int, seed: int, sharp: float = 1.0) -> Tensor:
    return torch.softmax(sharp * randn(*shape, seed=seed), dim=-1)


def uniform(K: int) -> Tensor:
    return torch.full((K,), 1 / K, dtype=torch.float64)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Level, Level, float, Tensor]:
    """A step over any two timesteps, t > s >= 0, a valid sigma and a random pi over 2 to 5 categories."""
    schedule = draw(schedules)
    s = draw(st.integers(0, schedule.T - 1))
    t = draw(st.integers(s + 1, schedule.T))
    now, following = schedule.level(t), schedule.level(s)
    fraction = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]) | st.floats(0, 1))
    pi = distributions(draw(st.integers(2, 5)), seed=draw(st.integers(0, 99)), sharp=2.0)
    return now, following, fraction * sigma_largest(now, following), pi


def kernel(now: Level, following: Level, sigma: float, pi: Tensor) -> Tensor:
    """q_sigma(x_s | x_t, x_0) for all ids: axes x_0, x_t, x_s."""
    K = len(pi)
    x0, x_t = torch.arange(K)[:, None].expand(K, K), torch.arange(K)[None, :].expand(K, K)
    return posterior(x_t, x0, now, following, sigma, pi)


def chain(now: Level, following: Level, pi: Tensor) -> Tensor:
    """q(x_t | x_s) of the Markov chain that keeps x_s with probability abar_t / abar_s: axes x_s, x_t."""
    keep = now.alpha_bar / following.alpha_bar
    return keep * torch.eye(len(pi), dtype=torch.float64) + (1 - keep) * pi


def markov_posterior(now: Level, following: Level, pi: Tensor) -> Tensor:
    """q(x_s | x_t, x_0) of that chain by Bayes' rule: axes x_0, x_t, x_s; nan where x_t is impossible."""
    joint = marginal(torch.arange(len(pi)), following, pi)[:, None, :] * chain(now, following, pi).T[None]
    return joint / joint.sum(dim=-1, keepdim=True)


@given(schedules, st.integers(2, 5))
def test_the_marginal_is_that_of_the_forward_chain(schedule: Schedule, K: int) -> None:
    """Eq. (17): abar_t is the probability that x_0 is unchanged after t steps, each of which may redraw it from pi."""
    pi = distributions(K, seed=K)
    ids = torch.arange(K)
    state = torch.eye(K, dtype=torch.float64)
    for t in range(1, min(schedule.T, 6) + 1):
        now, before = schedule.level(t), schedule.level(t - 1)
        state = state @ chain(now, before, pi)
        torch.testing.assert_close(marginal(ids, now, pi), state, rtol=0, atol=1e-12)
        x0 = distributions(3, K, seed=t)
        torch.testing.assert_close(marginal(x0, now, pi), x0 @ state, rtol=0, atol=1e-12)
    torch.testing.assert_close(marginal(x0, now), marginal(x0, now, uniform(K)), rtol=0, atol=0)


@given(steps())
def test_mixture_weights_are_a_distribution(step: tuple[Level, Level, float, Tensor]) -> None:
    """Eq. (18): weights >= 0 that sum to 1, sigma of them on x_t; x_0 is unchanged with probability abar_s."""
    now, following, sigma, _ = step
    keep, to_x0, fresh = mixture_weights(now, following, sigma)
    assert min(keep, to_x0, fresh) >= 0
    assert keep == sigma
    assert keep + to_x0 + fresh == pytest.approx(1, abs=1e-15)
    assert keep * now.alpha_bar + to_x0 == pytest.approx(following.alpha_bar, abs=1e-15)


@given(steps())
def test_sigma_above_the_largest_is_an_error(step: tuple[Level, Level, float, Tensor]) -> None:
    """Eq. (18): up to (1 - abar_s) / (1 - abar_t), the smaller bound; just above it a weight is negative."""
    now, following, _, _ = step
    largest = sigma_largest(now, following)
    assert largest == pytest.approx((1 - following.alpha_bar) / (1 - now.alpha_bar), rel=1e-10)
    assert now.alpha_bar * largest <= following.alpha_bar
    assert mixture_weights(now, following, largest)[2] == pytest.approx(0, abs=1e-15)
    above = largest * 1.0001 + 1e-9
    assert (1 - following.alpha_bar) - (1 - now.alpha_bar) * above < 0
    for sigma in (above, -1e-9, math.nan):
        with pytest.raises(ValueError, match="outside"):
            mixture_weights(now, following, sigma)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_weights_are_not_negative_by_rounding(name: str) -> None:
    """Eq. (18): at the largest sigma, in both directions, between any two timesteps."""
    for following, now in itertools.combinations(SCHEDULES[name].levels(range(0, 1001, 25)), 2):
        assert min(mixture_weights(now, following, sigma_largest(now, following))) >= 0
        assert min(mixture_weights(following, now, sigma_largest(following, now))) >= 0


def test_range_of_sigma_to_a_noisier_level() -> None:
    """Eq. (18): to a noisier level the other bound, abar_s / abar_t, applies, where the weight of x_0 is 0."""
    now, noisier, clean = SHORT.level(2), SHORT.level(5), SHORT.level(0)
    largest = sigma_largest(now, noisier)
    assert largest == noisier.alpha_bar / now.alpha_bar
    assert mixture_weights(now, noisier, largest)[1] == pytest.approx(0, abs=1e-16)
    with pytest.raises(ValueError, match="outside"):
        mixture_weights(now, noisier, largest * 1.001)
    # From clean data x_t is x_0: sigma has no effect.
    ids = torch.arange(3)
    for sigma in (0.0, 0.1, sigma_largest(clean, now)):
        actual = posterior(ids, ids, clean, now, sigma, uniform(3))
        torch.testing.assert_close(actual, marginal(ids, now, uniform(3)), rtol=0, atol=1e-15)


@given(steps())
def test_the_posterior_preserves_marginals(step: tuple[Level, Level, float, Tensor]) -> None:
    """Eq. (19): averaged over q(x_t | x_0) it is q(x_s | x_0), for every valid sigma, pi and pair of timesteps."""
    now, following, sigma, pi = step
    ids = torch.arange(len(pi))
    q = kernel(now, following, sigma, pi)
    averaged = torch.einsum("at,ats->as", marginal(ids, now, pi), q)
    torch.testing.assert_close(averaged, marginal(ids, following, pi), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.sum(dim=-1), torch.ones_like(q[..., 0]), rtol=0, atol=1e-12)
    assert q.min() >= 0


@given(steps(), st.integers(0, 99))
def test_the_posterior_is_linear_in_x0(step: tuple[Level, Level, float, Tensor], seed: int) -> None:
    """Eq. (19): for a distribution over x_0 it is the average over its ids."""
    now, following, sigma, pi = step
    K = len(pi)
    x0, x_t = distributions(7, K, seed=seed), torch.arange(7) % K
    mixed = torch.einsum("na,nas->ns", x0, kernel(now, following, sigma, pi)[:, x_t].movedim(1, 0))
    torch.testing.assert_close(posterior(x_t, x0, now, following, sigma, pi), mixed, rtol=0, atol=1e-12)
    flat = posterior(x_t, x0, now, following, sigma)
    torch.testing.assert_close(flat, posterior(x_t, x0, now, following, sigma, uniform(K)), rtol=0, atol=0)


@pytest.mark.parametrize(("t", "s"), [(6, 5), (2, 1), (6, 2), (5, 0)])
def test_a_mask_with_the_largest_sigma_is_absorbing_diffusion(t: int, s: int) -> None:
    """Eq. (19): with pi on one id it is the Markov posterior of D3PM's absorbing chain (Austin et al. 2021)."""
    now, following = SHORT.level(t), SHORT.level(s)
    mask = 3
    pi = torch.nn.functional.one_hot(torch.tensor(mask), 4).double()
    bayes = markov_posterior(now, following, pi)
    actual = kernel(now, following, sigma_largest(now, following), pi)
    for x0 in range(3):
        for x_t in (x0, mask):  # no other x_t is possible
            torch.testing.assert_close(actual[x0, x_t], bayes[x0, x_t], rtol=0, atol=1e-14)
    assert bayes[0, 1].isnan().all()
    if s:  # a smaller sigma remasks tokens (ReMDM)
        assert kernel(now, following, 0.5 * sigma_largest(now, following), pi)[0, 0, mask] > 0.01


def test_the_markov_chain_of_uniform_noise_is_not_in_the_family() -> None:
    """Eq. (19): multinomial diffusion's posterior differs by more than 0.03 somewhere, whatever the weights of (18).

    For x_t != x_0 the error at each id is affine in sigma; at two ids, with a + b sigma and a' + b' sigma, no sigma
    brings both below |a b' - a' b| / (|b| + |b'|).
    """
    pi = uniform(4)
    now, following = Level(2, math.log(0.3 / 0.7)), Level(1, math.log(0.55 / 0.45))
    largest = sigma_largest(now, following)
    least, most = kernel(now, following, 0.0, pi)[0, 1], kernel(now, following, largest, pi)[0, 1]
    a, b = least - markov_posterior(now, following, pi)[0, 1], (most - least) / largest
    pairs = itertools.combinations(range(4), 2)
    assert max(abs(a[i] * b[j] - a[j] * b[i]) / (abs(b[i]) + abs(b[j])) for i, j in pairs) > 0.03


@given(steps(), st.integers(0, 99))
def test_kl_and_its_bound_by_the_cross_entropy(step: tuple[Level, Level, float, Tensor], seed: int) -> None:
    """Eqs. (20) and (21): the KL of two categoricals; at most (abar_s - sigma abar_t) times the cross-entropy."""
    now, following, sigma, pi = step
    K = len(pi)
    predicted, x0, x_t = distributions(9, K, seed=seed), torch.arange(9) % K, torch.arange(9) // K % K
    value = kl(x_t, x0, predicted, now, following, sigma, pi)
    q = kernel(now, following, sigma, pi)[x0, x_t]
    p = torch.einsum("na,nas->ns", predicted, kernel(now, following, sigma, pi)[:, x_t].movedim(1, 0))
    expected = [sum(a * math.log(a / b) for a, b in zip(*rows, strict=True) if a) for rows in zip(q, p, strict=True)]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    cross_entropy = -predicted[torch.arange(9), x0].log()
    bound = (following.alpha_bar - sigma * now.alpha_bar) * cross_entropy
    assert (value <= bound + 1e-12).all()
    assert (value >= -1e-12).all()
    if following.t == 0:
        torch.testing.assert_close(value, cross_entropy, rtol=1e-12, atol=1e-12)
    perfect = torch.nn.functional.one_hot(x0, K).double()
    assert kl(x_t, x0, perfect, now, following, sigma, pi).abs().max() == 0


def test_kl_with_zero_probabilities() -> None:
    """Eqs. (20) and (21): infinite only where p excludes what q allows; a gradient where both exclude it."""
    now, following = SHORT.level(3), SHORT.level(0)
    certain = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    value = kl(torch.tensor(2), torch.tensor(0), certain, now, following, 0.0)
    (gradient,) = torch.autograd.grad(value, certain)
    assert value.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(gradient, torch.tensor([-2.0, 0, 0], dtype=torch.float64))
    assert kl(torch.tensor(2), torch.tensor(2), certain, now, following, 0.0) == math.inf


@pytest.mark.parametrize("times", [(1, 2, 3, 4, 5, 6), (2, 5, 6), (6,)])
@pytest.mark.parametrize("fraction", [0.0, 0.7, 1.0])
def test_the_objective_bounds_the_likelihood(times: tuple[int, ...], fraction: float) -> None:
    """Eqs. (20) and (21): their sum and the KL at the top are E_q[log q - log p] over all paths, and >= -log p(x_0)."""
    K, pi = 3, distributions(3, seed=5)
    levels = SHORT.levels((0, *times))
    ids, every = torch.arange(K), torch.cartesian_prod(torch.arange(K), torch.arange(K))
    network = {level: distributions(K, K, seed=int(level.t), sharp=2.0) for level in levels}  # f_theta: x_t to x_0
    top = marginal(ids, levels[-1], pi)
    bound = torch.xlogy(top, top / pi).sum(dim=-1)
    likelihood, p_steps, q_steps = pi, [], []
    for following, now in reversed(list(itertools.pairwise(levels))):
        sigma = fraction * sigma_largest(now, following)
        value = kl(every[:, 1], every[:, 0], network[now][every[:, 1]], now, following, sigma, pi).view(K, K)
        bound = bound + (marginal(ids, now, pi) * value).sum(dim=-1)
        p_steps.append(posterior(ids, network[now], now, following, sigma, pi))
        q_steps.append(kernel(now, following, sigma, pi))
        likelihood = likelihood @ p_steps[-1]

    over_paths = torch.zeros(K, dtype=torch.float64)
    for x0, *path in itertools.product(range(K), repeat=len(times) + 1):
        q, p = top[x0, path[0]], pi[path[0]]
        for k, (x_t, x_s) in enumerate(itertools.pairwise([*path, x0])):
            q, p = q * q_steps[k][x0, x_t, x_s], p * p_steps[k][x_t, x_s]
        over_paths[x0] += torch.xlogy(q, q) - torch.xlogy(q, p)
    torch.testing.assert_close(bound, over_paths, rtol=1e-10, atol=1e-10)
    assert (bound >= -likelihood.log() - 1e-12).all()
    torch.testing.assert_close(likelihood.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_mismatched_arguments_are_errors() -> None:
    now, following, ids = SHORT.level(3), SHORT.level(2), torch.arange(3)
    with pytest.raises(ValueError):
        marginal(ids, now)
    with pytest.raises(ValueError, match=r"\b4\b"):
        posterior(ids, distributions(3, 3, seed=1), now, following, 0.0, uniform(4))
    with pytest.raises(ValueError):
        marginal(ids, now, uniform(4)[None])
