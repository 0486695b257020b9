from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import (
    GAUSSIAN,
    ORDERS,
    SAMPLERS,
    SCHEDULES,
    apply,
    eased_in,
    equal_angles,
    equal_ratios,
    falling,
    levels_of,
    observed_order,
    randn,
    with_signal,
)
from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.process.parameterization import Prediction
from ddim.process.schedule import Level
from ddim.samplers import ddim
from ddim.sampling.loop import run, trajectory

LINEAR = SCHEDULES["linear"]
Sampler = Callable[..., Plan]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
DETERMINISTIC = {name: make for name, make in SAMPLERS.items() if not make(falling(LINEAR, [500, 1000])).stochastic}


def root(value: float) -> float:
    return math.sqrt(max(value, 0.0))


@every_sampler
@pytest.mark.parametrize("grid", ["equal-angle", "log-snr"])
def test_every_row_is_exact_on_straight_lines(sampler: Sampler, grid: str) -> None:
    """On x_t = signal x_0 + noise eps a row's mean is signal' x_0 + sqrt(1 - abar' - sigma^2) eps.

    A plan that is not `straight` must still get the part in x_0 right.
    """
    x0 = randn(5, seed=1)
    for schedule in SCHEDULES.values():
        plan = sampler(levels_of(schedule, grid, 10))
        eps = randn(5, seed=2) * plan.straight
        states = [row.now.signal * x0 + row.now.noise * eps for row in plan.rows]
        for k, row in enumerate(plan.rows):
            past = states[k::-1]
            mean = apply(row, past, [x0] * len(past), [eps] * len(past))
            expected = row.next.signal * x0 + root(row.next.variance - row.sigma**2) * eps
            size = 1 + max(map(abs, (*row.x, *row.x0, *row.eps)))
            torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12 * size)


@every_sampler
@pytest.mark.parametrize("name", ["linear", "cosine", "linear+zero-terminal-snr"])
def test_marginals_are_preserved(sampler: Sampler, name: str) -> None:
    """Lemma 1: with the true x_0 as prediction, x_t | x_0 is N(signal x_0, 1 - abar_t) at every level, whatever sigma.

    Each state is followed as its weights on x_0, x_T's noise and the noise of every row.
    """
    plan = sampler(levels_of(SCHEDULES[name], "linear", 20))
    size = 1 + max(abs(weight) for row in plan.rows for weight in (*row.x, *row.x0, *row.eps))
    basis = np.eye(len(plan) + 2)
    states, predicted = [plan.start.signal * basis[0] + plan.start.noise * basis[1]], []
    preserved = []
    for k, row in enumerate(plan.rows):
        predicted.insert(0, torch.from_numpy((states[0] - row.now.signal * basis[0]) / row.now.noise))
        mean = apply(row, [torch.from_numpy(s) for s in states], [torch.from_numpy(basis[0])] * (k + 1), predicted)
        states.insert(0, mean.numpy() + row.z * basis[k + 2])
        assert states[0][0] == pytest.approx(row.next.signal, abs=1e-12 * size)
        preserved.append(abs((states[0][1:] ** 2).sum() - row.next.variance) < 1e-12 * size)
    assert all(preserved) == (plan.keeps_marginals and plan.straight)


@pytest.mark.parametrize("name", SCHEDULES)
def test_eta_one_is_ddpm(name: str) -> None:
    """Ho et al. 2020, eq. (7): at S = T and eta = 1 each row has their posterior's mean and variance beta_tilde."""
    schedule = SCHEDULES[name]
    plan = ddim(levels_of(schedule, "linear", 1000), eta=1.0)
    abar = schedule.alpha_bar
    for row in plan.rows:
        t = int(row.now.t)
        alpha = abar[t] / abar[t - 1]
        beta = 1 - alpha
        of_x0 = math.sqrt(abar[t - 1]) * beta / (1 - abar[t])
        of_xt = math.sqrt(alpha) * (1 - abar[t - 1]) / (1 - abar[t])
        assert row.x0[0] == pytest.approx(of_x0 + of_xt * math.sqrt(abar[t]), abs=1e-12)
        assert row.eps[0] == pytest.approx(of_xt * math.sqrt(1 - abar[t]), abs=1e-12)
        assert row.z**2 == pytest.approx((1 - abar[t - 1]) / (1 - abar[t]) * beta, abs=1e-12)


def test_eta_is_on_the_standard_deviation() -> None:
    """Eq. (16): each row's sigma at eta = 0.5 is exactly half of the one at eta = 1."""
    levels = levels_of(LINEAR, "quadratic", 10)
    half, whole = ddim(levels, eta=0.5), ddim(levels, eta=1.0)
    assert [row.sigma * 2 for row in half.rows] == [row.sigma for row in whole.rows]
    assert sum(row.sigma for row in whole.rows) > 0


def test_sigma_hat() -> None:
    """Section 5: mean as for eta = 1, noise of std sqrt(1 - abar_t / abar_s), none at the last step, x_0 clipped."""
    levels = levels_of(LINEAR, "linear", 10)
    hat, ddpm = ddim(levels, sigma="hat"), ddim(levels, eta=1.0)
    for row, like in zip(hat.rows, ddpm.rows, strict=True):
        assert replace(row, z=0.0) == replace(like, z=0.0)
        expected = math.sqrt(1 - row.now.alpha_bar / row.next.alpha_bar) if row.next.t else 0.0
        assert row.z == pytest.approx(expected, abs=1e-14)
        assert row.z > like.z or not row.next.t
    assert hat.clip_x0
    assert not ddpm.clip_x0
    assert not ddim(levels, sigma="hat", clip_x0=False).clip_x0
    assert (hat.keeps_marginals, ddpm.keeps_marginals) == (False, True)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_vector_of_sigmas_is_used_unchanged(kind: Callable) -> None:
    levels = levels_of(LINEAR, "linear", 4)
    values = [0.1, 0.25, 0.125, 0.0]
    plan = ddim(levels, sigma=kind(values))
    assert [row.z for row in plan.rows] == [row.sigma for row in plan.rows] == pytest.approx(values, abs=1e-7)


@pytest.mark.parametrize("direction", ["falling", "rising"])
def test_ddim_is_euler_in_xbar(direction: str) -> None:
    """Eq. (14): at eta 0 each row is one Euler step of d xbar = eps d v, with v = sqrt((1 - abar) / abar)."""
    levels = levels_of(LINEAR, "equal-angle", 20)
    x = randn(4, seed=3)
    for row in ddim(levels if direction == "falling" else levels[::-1]).rows:
        eps = randn(4, seed=4)
        abar, abar_next = row.now.alpha_bar, row.next.alpha_bar
        v, v_next = root((1 - abar) / abar), root((1 - abar_next) / abar_next)
        x0 = x / math.sqrt(abar) - v * eps
        result = apply(row, [x], [x0], [eps])
        expected = math.sqrt(abar_next) * (x / math.sqrt(abar) + (v_next - v) * eps)
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


def test_ddim_on_gaussian_data_is_the_product_of_its_factors() -> None:
    """Eq. (13): multiplied out over a whole plan, in float64."""
    levels = levels_of(LINEAR, "quadratic", 20)
    x = randn(6, 4, seed=5)
    ours = run(GAUSSIAN.denoise, ddim(levels), x)
    torch.testing.assert_close(ours, GAUSSIAN.ddim_map(x, levels), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("direction", ["sampling", "encoding"])
def test_the_order_of_convergence(name: str, direction: str) -> None:
    """Between two levels of the mixture's ODE: halving the step divides the error of a sampler of order p by 2^p."""
    coarse, fine = (equal_ratios(LINEAR, steps, 600, 50) for steps in (80, 160))
    if direction == "encoding":
        coarse, fine = coarse[::-1], fine[::-1]
    observed = observed_order(DETERMINISTIC[name], eased_in(coarse, LINEAR), eased_in(fine, LINEAR))
    assert observed == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.parametrize("direction", ["sampling", "encoding"])
def test_ddims_order_of_convergence_to_clean_data(direction: str) -> None:
    observed = orders("eta 0", [equal_angles(LINEAR, steps) for steps in (200, 400, 800)], direction)
    assert observed == pytest.approx([1, 1], abs=0.15)


def orders(name: str, grids: list[tuple[Level, ...]], direction: str) -> list[float]:
    """By how many powers of 2 the error falls from each grid to the next."""
    errors = []
    for grid in grids:
        levels = grid if direction == "sampling" else grid[::-1]
        x = GAUSSIAN.flow(randn(6, 4, seed=5), LINEAR.level(1000), levels[0])
        reached = run(GAUSSIAN.denoise, DETERMINISTIC[name](levels), x)
        errors.append((reached - GAUSSIAN.flow(x, levels[0], levels[-1])).abs().max().item())
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


STRAIGHT = {name: make for name, make in DETERMINISTIC.items() if make(falling(LINEAR, [500, 1000])).straight}
# Those with an argument for the level at which the network is evaluated on clean data.
WITH_CLEAN_AS = {name: make for name, make in STRAIGHT.items() if "clean_as" in inspect.signature(make).parameters}
VALID_TIMES = st.lists(
    st.floats(0.01, 1000) | st.integers(1, 1_000_000).map(lambda k: k / 1000), min_size=1, max_size=8, unique=True
).filter(lambda times: np.diff(sorted({0, 1000, *times})).min() > 1e-3 - 1e-9)


@pytest.mark.parametrize("name", DETERMINISTIC)
@given(schedule=st.sampled_from([*SCHEDULES]), times=VALID_TIMES, rising=st.booleans())
def test_any_valid_timesteps_give_a_plan(name: str, schedule: str, times: list[float], rising: bool) -> None:
    """A thousandth of a step beside one of a thousand steps: weights are finite, and rows exact on straight lines."""
    levels = falling(SCHEDULES[schedule], sorted(times))
    if name == "eq. (15)" and rising:  # it divides by the noise it starts from
        levels = levels[:-1]
    if len(with_signal(levels)) > 1:
        plan = DETERMINISTIC[name](levels[::-1] if rising else levels)
        assert plan.check() is plan


@pytest.mark.parametrize("name", STRAIGHT)
@pytest.mark.parametrize("direction", ["sampling", "encoding"])
def test_a_row_without_history_equals_ddim(name: str, direction: str) -> None:
    """With x = signal x_0 + noise eps put in, its weights of x_0 and eps are those of eq. (12): order 1 is DDIM."""
    levels = levels_of(LINEAR, "equal-angle", 5)
    plan = STRAIGHT[name](levels if direction == "sampling" else levels[::-1])
    alone = [row for row in plan.rows if row.memory == 1]
    assert plan.rows[0] in alone
    for row in alone:
        x, x0, eps = (sum(weights) for weights in (row.x, row.x0, row.eps))
        [like] = ddim([row.now, row.next]).rows
        expected = [*like.x0, *like.eps] if row.now.t else [row.next.signal, row.next.noise]
        assert [x * row.now.signal + x0, x * row.now.noise + eps] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", STRAIGHT)
def test_decoding_inverts_encoding_if_eps_is_constant(name: str) -> None:
    """Eq. (13) run backwards: on a straight line Euler, and all that extrapolates from it, is exact both ways."""
    levels = levels_of(LINEAR, "equal-angle", 10)
    eps = randn(2, 3, seed=6)

    def constant(x: Tensor, level: Level, /) -> Prediction:
        x0 = (x - level.noise * eps) / level.signal if level.signal else x
        return Prediction(x0, eps)

    x = randn(2, 3, seed=7)
    encode, decode = STRAIGHT[name](levels[::-1]), STRAIGHT[name](levels)
    assert "encode" in str(encode).splitlines()[0]
    assert Plan.from_json(encode.to_json()) == encode
    encoded = run(constant, encode, x)
    rounding = 1e-12 * max(row.size for row in (*encode.rows, *decode.rows))
    torch.testing.assert_close(encoded, levels[0].signal * x + levels[0].noise * eps, rtol=0, atol=rounding)
    torch.testing.assert_close(run(constant, decode, encoded), x, rtol=0, atol=10 * rounding)


@pytest.mark.parametrize("name", WITH_CLEAN_AS)
def test_encoding_evaluates_the_network_at_a_trained_timestep(name: str) -> None:
    levels = levels_of(LINEAR, "equal-angle", 10)[::-1]
    evaluated = []

    def spy(x: Tensor, level: Level, /) -> Prediction:
        evaluated.append(level.t)
        return GAUSSIAN.denoise(x, level)

    plan = WITH_CLEAN_AS[name](levels, clean_as=LINEAR.level(1))
    run(spy, plan, randn(2, 4))
    assert evaluated == [1.0, *[row.now.t for row in plan.rows[1:]]]
    assert Plan.from_json(plan.to_json()) == plan
    evaluated.clear()
    run(spy, WITH_CLEAN_AS[name](levels), randn(2, 4))
    assert evaluated == [levels[1].t, *[row.now.t for row in plan.rows[1:]]]


@every_sampler
def test_one_step_gives_the_denoised_x0(sampler: Sampler) -> None:
    plan = sampler(falling(LINEAR, [1000]))
    x = randn(3, 4, seed=8) / 50
    assert not plan.stochastic
    [step] = trajectory(GAUSSIAN.denoise, replace(plan, clip_x0=False), x)
    predicted = GAUSSIAN.denoise(x, plan.start).x0
    if plan.straight:
        torch.testing.assert_close(step.x, predicted, rtol=0, atol=0)
    else:
        assert (step.x - predicted).abs().max() > 1  # too long a step for it


LEVELS = levels_of(LINEAR, "linear", 4)


@pytest.mark.parametrize(
    ("levels", "settings", "wrong"),
    [
        (LEVELS, {"eta": math.nan}, "eta nan: "),
        (LEVELS, {"eta": math.inf}, "eta inf: "),
        (LEVELS, {"eta": -1.0}, r"eta -1\.0: "),
        (LEVELS, {"eta": 2.0}, r"^the step from t = 1000 to 750: "),
        (LEVELS, {"sigma": [0.1, 0.1, 0.0]}, r"^sigma: "),
        (LEVELS, {"sigma": [0.1, 0.1, 0.1, 0.1]}, r"^the step from t = 250 to 0: .*\bsigma = 0\.1\b"),
        (LEVELS, {"sigma": [-0.1, 0.1, 0.1, 0.0]}, r"^the step from t = 1000 to 750: .*\bsigma = -0\.1\b"),
        (LEVELS, {"sigma": [math.nan, 0.1, 0.1, 0.0]}, r"^the step from t = 1000 to 750: .*\bsigma = nan\b"),
        (LEVELS, {"sigma": [1.1, 0.1, 0.1, 0.0]}, r"^the step from t = 1000 to 750: .*\bsigma = 1\.1\b"),
        (LEVELS, {"sigma": "hut"}, r"^sigma 'hut': "),
        (LEVELS, {"sigma": "hat", "eta": 1.0}, r"^eta and sigma: "),
        (LEVELS, {"sigma": [0.0] * 4, "eta": 0.5}, r"^eta and sigma: "),
        (LEVELS[::-1], {"eta": 0.5}, r"^encoding: "),
        (LEVELS[::-1], {"sigma": "hat"}, r"^encoding: "),
        ([LEVELS[0], LEVELS[2], LEVELS[1], LEVELS[3]], {}, r"^level t = 750: "),
        ([LEVELS[0], LEVELS[0]], {}, r"^level t = 1000: "),
        ([LEVELS[3], LEVELS[1], LEVELS[2]], {}, r"^level t = 500: "),
        (LEVELS[:1], {}, r"^levels: "),
        ([], {}, r"^levels: "),
    ],
)
def test_invalid_arguments_are_errors(levels: list[Level], settings: dict, wrong: str) -> None:
    with pytest.raises(DdimError, match=wrong):
        ddim(levels, **settings)
