from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from bench import GAUSSIAN, MIXTURE, SCHEDULES, falling, randn
from ddim import samplers
from ddim.data.pixels import BIN
from ddim.errors import DdimError
from ddim.evaluation.likelihood import bits
from ddim.objective import elbo
from ddim.plan.plan import Plan
from ddim.process.gaussian import diffuse
from ddim.process.parameterization import Prediction
from ddim.process.schedule import Level
from ddim.sampling.x0_hooks import Clipped

LINEAR = SCHEDULES["linear"]
TIMES = ([1, 2, 3, 1000], [7, 40, 300, 700], list(range(1, 1001)), [500, 900])


def sigmas(levels: tuple[Level, ...], share: float, last: float = 0.03) -> list[float]:
    """A valid sigma per step: a fraction of the largest, except for the last step."""
    return [*(share * level.noise for level in levels[1:-1]), last]


def a(level: Level) -> float:
    """Slope of a denoiser that is linear and wrong."""
    return 0.3 + 0.5 * level.noise


def b(level: Level) -> float:
    """Offset of that denoiser."""
    return 0.1 - 0.2 * level.signal


def exact_j(levels: tuple[Level, ...], sigma: list[float], mean: float, variance: float) -> float:
    """E[log q_sigma(x_{1:T} | x_0) - log p_theta(x_{0:T})] in one dimension, for x_0 ~ N(mean, variance).

    Every variable is represented by its weights on 1 and on the standard normals of x_0 and of each step, down the
    joint of eq. (6). Only eqs. (4), (7) and (9), written here, and E[(x_s - mu_theta(x_t))^2] are used.
    """
    basis = np.eye(len(levels) + 2)
    x0 = mean * basis[0] + math.sqrt(variance) * basis[1]
    top = levels[0]
    x = math.sqrt(top.alpha_bar) * x0 + math.sqrt(1 - top.alpha_bar) * basis[2]
    total = -0.5 * math.log(2 * math.pi * math.e * (1 - top.alpha_bar)) + 0.5 * math.log(2 * math.pi) + 0.5 * x @ x
    for k, (now, to) in enumerate(itertools.pairwise(levels)):
        abar, abar_s, std = now.alpha_bar, to.alpha_bar, sigma[k]
        eps = a(now) * x + b(now) * basis[0]
        f = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if to.t == 0:
            error = x0 - f
            return total + error @ error / (2 * std**2) + 0.5 * math.log(2 * math.pi * std**2)
        kappa = math.sqrt(1 - abar_s - std**2) / math.sqrt(1 - abar)
        predicted = math.sqrt(abar_s) * f + kappa * (x - math.sqrt(abar) * f)
        x = math.sqrt(abar_s) * x0 + kappa * (x - math.sqrt(abar) * x0) + std * basis[k + 3]
        log_width = 0.5 * math.log(2 * math.pi * std**2)
        total += -log_width - 0.5 + log_width + (x - predicted) @ (x - predicted) / (2 * std**2)
    raise AssertionError("levels must end at clean data")


def exact_l(levels: tuple[Level, ...], gamma: np.ndarray, mean: float, variance: float) -> float:
    """sum_t gamma_t E (eps - eps_theta(x_t))^2 for the same data and denoiser."""
    total = 0.0
    for weight, now in zip(gamma, levels[:-1], strict=True):
        # x_t = signal mean + signal sqrt(variance) n + noise eps
        error = [a(now) * now.signal * mean + b(now), a(now) * now.signal * math.sqrt(variance), a(now) * now.noise - 1]
        total += weight * sum(value**2 for value in error)
    return total


@pytest.mark.parametrize("times", TIMES, ids=len)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_j_is_l_gamma_plus_a_constant(times: list[int], share: float) -> None:
    """Theorem 1: J_sigma = L_gamma + C in closed form on Gaussian data, for a denoiser that is not the ideal one."""
    levels = falling(LINEAR, times)
    sigma, mean, variance = sigmas(levels, share), 0.4, 0.7
    actual = exact_l(levels, elbo.gamma_from_sigma(levels, sigma), mean, variance)
    actual += elbo.constant(levels, sigma, 1, mean**2 + variance)
    assert actual == pytest.approx(exact_j(levels, sigma, mean, variance), rel=1e-8)


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 4)])
def test_with_the_true_noise_the_bound_is_the_constant(shape: tuple[int, ...]) -> None:
    """Theorem 1: with eps_theta = eps, L_gamma is 0 and J_sigma is C, in any number of dimensions."""
    levels = falling(LINEAR, [40, 300, 700])
    x0, eps = randn(1, *shape, seed=1), randn(1, *shape, seed=2)
    plan = samplers.ddim(levels, eta=0.5)
    parts = elbo.terms(lambda x, level: Prediction(x0, eps), plan, x0, lambda k: eps, 0.03)
    actual = elbo.constant(levels, sigmas(levels, 0.5), x0.numel(), x0.square().sum().item())
    assert actual == pytest.approx(sum(parts).item(), rel=1e-10)


def test_the_printed_gamma_differs() -> None:
    """1 / (2 d sigma^2 abar), as printed, is off by powers of ten; so is omitting one of the two terms with x_0."""
    levels = falling(LINEAR, [500, 999, 1000])
    sigma = [step.sigma for step in samplers.ddim(levels, eta=1.0).rows[:-1]]
    exact = elbo.gamma_from_sigma(levels, [*sigma, 0.1])[0]
    assert 1 / (2 * sigma[0] ** 2 * levels[0].alpha_bar) > 1e6 * exact
    assert levels[0].variance / (2 * sigma[0] ** 2 * levels[0].alpha_bar) > 1e6 * exact


@pytest.mark.parametrize("t", [2, 50, 999])
def test_gamma_at_eta_one_is_that_of_ddpm(t: int) -> None:
    """Ho et al. 2020, eq. (12): beta^2 / (2 sigma^2 alpha (1 - abar)) for neighbouring timesteps."""
    levels = LINEAR.levels([t, t - 1, 0])
    sigma = samplers.ddim(levels, eta=1.0).rows[0].sigma
    alpha = LINEAR.alpha_bar[t] / LINEAR.alpha_bar[t - 1]
    expected = (1 - alpha) ** 2 / (2 * sigma**2 * alpha * (1 - LINEAR.alpha_bar[t]))
    assert elbo.gamma_from_sigma(levels, [sigma, 1.0])[0] == pytest.approx(expected, rel=1e-7)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True), st.floats(0.01, 1.0))
def test_gamma_is_positive_for_every_valid_sigma(times: list[int], share: float) -> None:
    levels = falling(LINEAR, sorted(times))
    assert (elbo.gamma_from_sigma(levels, sigmas(levels, share)) > 0).all()


@pytest.mark.parametrize("bad", [[0.1], [0.0, 0.1], [2.0, 0.1], [0.1, 0.0]])
def test_gamma_of_an_invalid_sigma_is_an_error(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"sigma"):
        elbo.gamma_from_sigma(falling(LINEAR, [100, 900]), bad)


def wrong(x: Tensor, level: Level, /) -> Prediction:
    """A denoiser that is neither linear nor right."""
    eps = torch.tanh(a(level) * x + b(level))
    return Prediction((x - level.noise * eps) / level.signal, eps)


def test_the_terms_are_the_expected_log_ratio_on_paths() -> None:
    """Eqs. (11) and (29): the mean of log q_sigma - log p_theta over whole paths is the sum of the terms, per x_0."""
    levels = falling(LINEAR, [30, 200, 600])
    plan, last, paths = samplers.ddim(levels, eta=0.7), 0.2, 40_000
    x0 = torch.tensor([0.3, -1.2], dtype=torch.float64).expand(paths, 2)
    x = diffuse(x0, randn(paths, 2, seed=9), levels[0])
    ratio = Normal(levels[0].signal * x0, levels[0].noise).log_prob(x) - Normal(0.0, 1.0).log_prob(x)
    for k, row in enumerate(plan.rows):
        f = wrong(x, row.now).x0
        if row.next.t == 0:
            ratio = ratio - Normal(f, last).log_prob(x0)
            break
        kappa = math.sqrt(1 - row.next.alpha_bar - row.sigma**2) / row.now.noise
        q = Normal(row.next.signal * x0 + kappa * (x - row.now.signal * x0), row.sigma)
        p = Normal(row.next.signal * f + kappa * (x - row.now.signal * f), row.sigma)
        x = q.mean + row.sigma * randn(paths, 2, seed=20 + k)
        ratio = ratio + q.log_prob(x) - p.log_prob(x)
    expected = ratio.sum(1)
    actual = torch.stack([*elbo.terms(wrong, plan, x0, lambda k: randn(paths, 2, seed=50 + k), last)]).sum(0)
    spread = math.sqrt((expected.var() + actual.var()).item() / paths)
    assert actual.mean().item() == pytest.approx(expected.mean().item(), abs=4.5 * spread)
    assert spread < 0.02 * abs(expected.mean().item())


def test_step_kl_is_the_kl_of_two_gaussians() -> None:
    """Eqs. (30), (31) and (32): against torch's KL of two normals; also where the plan's noise is not its sigma."""
    levels = falling(LINEAR, [40, 300, 700])
    x0, eps = randn(5, 2, 3, seed=1), randn(5, 2, 3, seed=2)
    for plan in (samplers.ddim(levels, eta=0.4), samplers.ddim(levels, sigma="hat")):
        for row in plan.rows[:-1]:
            x = diffuse(x0, eps, row.now)
            predicted = wrong(x, row.now)
            kappa = math.sqrt(1 - row.next.alpha_bar - row.sigma**2) / row.now.noise
            q = Normal(row.next.signal * x0 + kappa * (x - row.now.signal * x0), row.sigma)
            f = predicted.x0
            p = Normal(row.next.signal * f + kappa * (x - row.now.signal * f), row.z)
            expected = kl_divergence(q, p).flatten(1).sum(1)
            actual = elbo.step_kl(row, Prediction(x0, eps), predicted)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
            assert (actual > 0).all()
            exact = elbo.step_kl(row, Prediction(x0, eps), Prediction(x0, eps))
            assert ((exact == 0) if row.z == row.sigma else (exact > 0)).all()


def test_kernel_mean_is_a_step_of_the_plan() -> None:
    """Eq. (10): p_theta's mean is eq. (7)'s with f_theta for x_0, the last step's f_theta itself."""
    levels = falling(LINEAR, [40, 300])
    first, last = samplers.ddim(levels, eta=0.5).rows
    x = randn(4, 3, seed=3)
    prediction = wrong(x, first.now)
    kappa = math.sqrt(1 - first.next.alpha_bar - first.sigma**2) / math.sqrt(1 - first.now.alpha_bar)
    expected = first.next.signal * prediction.x0 + kappa * (x - first.now.signal * prediction.x0)
    torch.testing.assert_close(elbo.kernel_mean(first, prediction), expected, rtol=1e-10, atol=1e-12)
    prediction = wrong(x, last.now)
    torch.testing.assert_close(elbo.kernel_mean(last, prediction), prediction.x0, rtol=0, atol=0)


def test_last_term_is_a_gaussian_log_density() -> None:
    """Eqs. (33) and (34): a normal density at the data, in terms of x_0 and of eps alike."""
    first = LINEAR.level(1)
    x0, eps = randn(4, 6, seed=4), randn(4, 6, seed=5)
    prediction = wrong(diffuse(x0, eps, first), first)
    actual = elbo.last_term(x0, prediction.x0, 0.02)
    torch.testing.assert_close(actual, -Normal(prediction.x0, 0.02).log_prob(x0).sum(1), rtol=1e-12, atol=1e-12)
    gamma = (1 - first.alpha_bar) / (2 * 0.02**2 * first.alpha_bar)
    in_eps = gamma * (eps - prediction.eps).square().sum(1) + 3 * math.log(2 * math.pi * 0.02**2)
    torch.testing.assert_close(actual, in_eps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sigma", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("mean", [-3.0, -0.999, 0.1234, 1.0])
def test_the_discretised_last_term_is_a_distribution(sigma: float, mean: float) -> None:
    """The 256 probabilities add up to 1, wherever the mean is."""
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    nats = elbo.last_term(values, torch.full_like(values, mean), sigma, BIN)
    assert (nats >= 0).all()
    assert math.isclose(nats.neg().exp().sum().item(), 1.0, rel_tol=1e-10)


def test_the_discretised_term_of_a_wide_gaussian_is_density_times_bin_width() -> None:
    x0 = torch.tensor([[0.2]], dtype=torch.float64) * 255 // 1 / 255
    nats = elbo.last_term(x0, x0 + 0.3, 2.0, BIN)
    assert nats.item() == pytest.approx(-Normal(0.3, 2.0).log_prob(torch.tensor(0.0)).item() - math.log(BIN), abs=1e-5)


def test_log_interval_is_accurate_in_the_tails() -> None:
    """In the middle against the plain difference; in the tails against Phi(-x) ~ phi(x) / x (1 - 1/x^2 + 3/x^4)."""
    lower = torch.tensor([-1.0, 0.3, -4.0, -math.inf, 1.0], dtype=torch.float64)
    upper = torch.tensor([0.5, 0.31, 4.0, 0.2, math.inf], dtype=torch.float64)
    plain = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).log()
    torch.testing.assert_close(elbo.log_interval(lower, upper), plain, rtol=1e-10, atol=1e-12)
    far, tail = torch.tensor([30.0, 200.0], dtype=torch.float64), []
    for x in far.tolist():
        tail.append(-(x**2) / 2 - 0.5 * math.log(2 * math.pi) - math.log(x) + math.log1p(-(x**-2) + 3 * x**-4))
    expected = torch.tensor(tail, dtype=torch.float64)
    torch.testing.assert_close(elbo.log_interval(far, far + 5), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(elbo.log_interval(-far - 5, -far), expected, rtol=1e-8, atol=0)


def test_the_bound_converges_to_the_likelihood_from_above() -> None:
    """With the ideal denoiser the bound of eta = 1 falls to the data's own -log density as S grows (d = 4)."""
    x0 = GAUSSIAN.sample(20_000, seed=1)
    entropy = -GAUSSIAN.log_density(x0, LINEAR.level(0)).mean().item()
    top, bottom = LINEAR.level(1000).log_snr, LINEAR.level(1).log_snr
    gaps = []
    for steps in (40, 80, 160):
        levels = falling(
            LINEAR, [LINEAR.time_at_log_snr(bottom + (top - bottom) * i / steps) for i in range(steps)] + [1000]
        )
        # The optimal sigma_1: the mean posterior variance of x_0 given x_1.
        last = levels[-2].ratio * math.sqrt(GAUSSIAN.error(levels[-2]))
        plan = samplers.ddim(levels, eta=1.0)
        parts = elbo.terms(GAUSSIAN.denoise, plan, x0, lambda k: randn(20_000, 4, seed=k), last)
        gaps.append(torch.stack([*parts]).sum(0).mean().item() - entropy)
    # To leading order d/4 (fall of log-SNR)^2 per step, so 1/S in total.
    assert gaps[0] > 1.7 * gaps[1] > 1.7**2 * gaps[2] > 0


def test_accelerated_bound_adds_timesteps_outside_tau() -> None:
    """Eqs. (54), (55), (56), (57) and (58): the plan's terms and -log N(x_0; f_theta(x_t), sigma_t^2) for t outside."""
    levels = falling(LINEAR, [40, 300, 700])
    plan = samplers.ddim(levels, eta=0.8)
    outside = [(LINEAR.level(100), 0.3), (LINEAR.level(900), 1.5)]
    x0 = MIXTURE.sample(6, seed=3)

    def noise(k: int) -> Tensor:
        return randn(*x0.shape, seed=70 + k)

    actual = elbo.accelerated_bound(wrong, plan, x0, noise, 0.1, outside)
    expected = sum(elbo.terms(wrong, plan, x0, noise, 0.1))
    for k, (level, sigma) in enumerate(outside):
        x = level.signal * x0 + level.noise * noise(3 + k)
        expected = expected - Normal(wrong(x, level).x0, sigma).log_prob(x0).sum(1)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


LEVELS = falling(LINEAR, [10, 500])


@pytest.mark.parametrize(
    ("plan", "last", "message"),
    [
        (samplers.ddim(LEVELS), 0.1, r"^the step from t = 500 to 10: "),
        (samplers.ddim(LEVELS, eta=1.0), 0.0, r"^sigma_1 0: "),
        (samplers.ddim(LEVELS, eta=1.0), math.inf, r"^sigma_1 inf: "),
        (samplers.ddim(LEVELS, eta=1.0), math.nan, r"^sigma_1 nan: "),
        (samplers.ddim(LEVELS[::-1]), 0.1, r"^plan: .*\bt = 0\b"),
        (samplers.runge_kutta(LEVELS, LINEAR), 0.1, r"^the step from t = 500 to 368\.332: .*\(12\)"),
    ],
)
def test_a_plan_without_a_bound_is_an_error(plan: Plan, last: float, message: str) -> None:
    with pytest.raises(DdimError, match=message):
        next(elbo.terms(wrong, plan, randn(2, 2), lambda k: randn(2, 2), last))


def test_a_clipping_plan_has_the_bound_of_the_clipped_model() -> None:
    levels = falling(LINEAR, [40, 300, 700])
    plan, x0 = samplers.ddim(levels, sigma="hat"), randn(5, 3, seed=1).clamp(-1, 1)

    def noise(k: int) -> Tensor:
        return randn(5, 3, seed=30 + k)

    actual = torch.stack([*elbo.terms(wrong, plan, x0, noise, 0.2)])
    by_hand = dataclasses.replace(plan, clip_x0=False)
    assert plan.clip_x0
    torch.testing.assert_close(actual, torch.stack([*elbo.terms(Clipped(wrong), by_hand, x0, noise, 0.2)]))
    assert (actual - torch.stack([*elbo.terms(wrong, by_hand, x0, noise, 0.2)])).abs().max() > 1e-3
    outside = [(LINEAR.level(500), 0.5)]
    clipped = elbo.accelerated_bound(wrong, plan, x0, noise, 0.2, outside)
    torch.testing.assert_close(clipped, elbo.accelerated_bound(Clipped(wrong), by_hand, x0, noise, 0.2, outside))


def test_x0_weights_are_finite_without_signal() -> None:
    """At zero terminal SNR gamma is infinite, c^2 / (2 sigma^2) is not: at eta = 1 half the SNR of T - 1."""
    zero = SCHEDULES["linear+zero-terminal-snr"]
    levels = zero.levels([1000, 999, 0])
    sigma = [samplers.ddim(levels, eta=1.0).rows[0].sigma, 0.1]
    assert math.isinf(elbo.gamma_from_sigma(levels, sigma)[0])
    expected = levels[1].alpha_bar / levels[1].variance / 2
    assert elbo.x0_weights(levels, sigma)[0] == pytest.approx(expected, rel=1e-6)


def test_bits_per_dimension() -> None:
    assert bits(torch.tensor([math.log(2) * 8 * 5]), 5).item() == pytest.approx(8)
