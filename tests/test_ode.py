from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import GAUSSIAN, GRIDS, SCHEDULES, apply, equal_ratios, falling, levels_of, randn
from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.process.ode import euler, from_xbar, to_xbar, ve_velocity, velocity
from ddim.process.parameterization import Prediction, x0_from_eps
from ddim.process.schedule import Level, Schedule
from ddim.samplers import ddim, probability_flow, runge_kutta
from ddim.sampling.loop import run, trajectory

LINEAR = SCHEDULES["linear"]
ZERO = SCHEDULES["linear+zero-terminal-snr"]
WITH_SIGNAL = {name: schedule for name, schedule in SCHEDULES.items() if schedule.level(schedule.T).signal}
SOLVERS: dict[str, Callable[[Sequence[Level]], Plan]] = {
    "eq. (13)": ddim,
    "eq. (15)": probability_flow,
    "order 2": lambda levels: runge_kutta(levels, LINEAR, 2),
    "order 4": lambda levels: runge_kutta(levels, LINEAR, 4),
}


class Mixture:
    """A mixture of Gaussians in two dimensions, with its density, score and denoiser."""

    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = torch.tensor([[-2.0, 1.0], [1.0, 0.5], [0.0, -3.0]], dtype=torch.float64)
    roots = torch.tensor([[[1.0, 0.0], [0.5, 0.3]], [[0.2, 0.0], [0.0, 0.2]], [[0.7, 0.0], [-0.6, 0.1]]]).double()
    covariances = roots @ roots.mT

    def log_density(self, x: Tensor, signal: float, variance: float) -> Tensor:
        """The log-density, (N,), of signal x_0 + N(0, variance I) at x (N, 2)."""
        return (self.weights.log() + self._parts(x, signal, variance)[0]).logsumexp(1)

    def score(self, x: Tensor, signal: float, variance: float) -> Tensor:
        """The gradient of `log_density`, (N, 2), by automatic differentiation."""
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.log_density(x, signal, variance).sum(), x)[0]

    def denoise(self, x: Tensor, level: Level, /) -> Prediction:
        """E[eps | x_t] by Bayes' rule: that of each component, weighted by its posterior probability."""
        logs, whitened = self._parts(x, level.signal, level.variance)
        responsibilities = (self.weights.log() + logs).softmax(1)
        eps = level.noise * (responsibilities[:, :, None] * whitened).sum(1)
        return Prediction(x0_from_eps(eps, x, level), eps)

    def _parts(self, x: Tensor, signal: float, variance: float) -> tuple[Tensor, Tensor]:
        spread = signal**2 * self.covariances + variance * torch.eye(2, dtype=torch.float64)
        centred_x = x[:, None] - signal * self.means
        whitened = torch.linalg.solve(spread, centred_x[..., None])[..., 0]
        logs = -0.5 * (centred_x * whitened).sum(2) - 0.5 * torch.logdet(spread) - math.log(2 * math.pi)
        return logs, whitened


MIXTURE = Mixture()


@pytest.mark.parametrize("direction", [1, -1])
def test_euler_is_the_step_of_ddim(direction: int) -> None:
    """Eq. (13): in xbar = x / sqrt(abar), the step is what every row of `ddim` does in x, sampling and encoding."""
    for name, schedule in WITH_SIGNAL.items():
        x, eps = randn(4, seed=1), randn(4, seed=2)
        for row in ddim(falling(schedule, [1, 40, 500, 1000])[::direction], clean_as=schedule.level(1)).rows:
            moved = apply(row, [x], [x0_from_eps(eps, x, row.now)], [eps])
            actual = from_xbar(euler(to_xbar(x, row.now), eps, row.now, row.next), row.next)
            torch.testing.assert_close(actual, moved, rtol=1e-11, atol=1e-11, msg=name)


@given(st.floats(1, 1000))
def test_the_velocity_is_the_derivative_of_the_flow(t: float) -> None:
    """Eq. (14): for Gaussian data, d xbar / d v of the flow in closed form, by a central difference in v."""
    now, x = LINEAR.level(t), randn(5, 4, seed=3)
    step = 1e-4 * now.ratio
    ends = [Level(0, -2 * math.log(now.ratio + sign * step)) for sign in (1, -1)]
    up, down = (to_xbar(GAUSSIAN.flow(x, now, end), end) for end in ends)
    actual = velocity(GAUSSIAN.denoise, to_xbar(x, now), now)
    torch.testing.assert_close(actual, (up - down) / (2 * step), rtol=1e-6, atol=1e-7)


def test_xbar_round_trip() -> None:
    x, level = randn(3, 4, seed=4), LINEAR.level(700)
    xbar = to_xbar(x, level)
    torch.testing.assert_close(xbar, x / math.sqrt(level.alpha_bar), rtol=1e-14, atol=0)
    torch.testing.assert_close(xbar / math.sqrt(level.ratio**2 + 1), x, rtol=1e-13, atol=0)
    torch.testing.assert_close(from_xbar(xbar, level), x, rtol=1e-15, atol=0)
    assert to_xbar(x.float(), level).dtype == from_xbar(x.float(), level).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\bt = 1000\b"):
        to_xbar(x, ZERO.level(1000))


def test_the_ode_of_ddim_is_the_probability_flow_of_the_ve_sde() -> None:
    """Proposition 1: eps_theta d v / d t = -1/2 (d v^2 / d t) grad log p_t(xbar), p_t the data plus N(0, v^2).

    The left side uses conditional expectations at x = sqrt(abar) xbar, the right side the density of xbar.
    abar = exp(-(a t + b t^2 / 2)), the VP-SDE's, so that both rates are automatic derivatives.
    """
    for time in torch.linspace(0.002, 1, 60, dtype=torch.float64):
        t = time.clone().requires_grad_()
        v2 = torch.expm1(0.1 * t + 19.9 * t**2 / 2)
        dv2_dt = torch.autograd.grad(v2, t, retain_graph=True)[0].item()
        dv_dt = torch.autograd.grad(v2.sqrt(), t)[0].item()
        level = Level(time.item(), -math.log(v2.item()))
        xbar = randn(40, 2, seed=5) * math.sqrt(4 + v2.item())
        actual = velocity(MIXTURE.denoise, xbar, level) * dv_dt
        flow = ve_velocity(MIXTURE.score(xbar, 1.0, v2.item()), dv2_dt)
        torch.testing.assert_close(actual, flow, rtol=1e-10, atol=1e-10 * dv_dt)


@given(st.floats(1, 1000), st.floats(0, 1000))
def test_probability_flow_is_eq_15(t: float, s: float) -> None:
    """Eq. (15): as the paper prints it, in abar, falling and rising."""
    if abs(t - s) < 1e-3:
        return
    now, following = LINEAR.levels([t, s])
    [row] = probability_flow([now, following]).rows
    x, eps = randn(6, seed=6), randn(6, seed=7)
    a_t, a_s = now.alpha_bar, following.alpha_bar
    change = 0.5 * ((1 - a_s) / a_s - (1 - a_t) / a_t) * math.sqrt(a_t / (1 - a_t))
    expected = math.sqrt(a_s) * (x / math.sqrt(a_t) + change * eps)
    # The tolerance is that of the printed form, where 1 - abar cancels near clean data.
    torch.testing.assert_close(apply(row, [x], [], [eps]), expected, rtol=1e-9, atol=1e-9)
    assert (row.z, row.sigma, row.at) == (0, 0, None)


def test_eq_15_has_a_second_order_error_on_a_straight_line() -> None:
    """It is off by (v_s - v_t)^2 / (2 v_t) eps in xbar, so `Plan.straight` is False and setting it is an error."""
    plan = probability_flow(levels_of(LINEAR, "linear", 10))
    assert not plan.straight
    for row in plan.rows:
        noise = row.x[0] * row.now.noise + row.eps[0]
        error = (row.next.ratio - row.now.ratio) ** 2 / (2 * row.now.ratio)
        assert noise - row.next.noise == pytest.approx(row.next.signal * error, rel=1e-9)
    with pytest.raises(DdimError, match=r"^plan row 0 \(t = 1000 to 900\): "):
        replace(plan, straight=True).check()


def centred(plan: Plan, x: Tensor) -> Tensor:
    """xbar - mean at a plan's end, on Gaussian data: proportional to its value at the start."""
    return to_xbar(run(GAUSSIAN.denoise, plan, x), plan.end) - GAUSSIAN.mean


@pytest.mark.parametrize("steps", [1, 5, 10, 20, 100])
def test_the_two_euler_methods_differ_by_the_closed_form_factor(steps: int) -> None:
    """On data of variance c^2: (15) / (13) = prod(1 + (v - v')^2 / (2 (c^2 + v v'))), and the truth lies between.

    (13) multiplies xbar - mean by (c^2 + v v') / (c^2 + v^2) and (15) by (c^2 + (v^2 + v'^2) / 2) / (c^2 + v^2), the
    flow by sqrt((c^2 + v'^2) / (c^2 + v^2)).
    """
    levels = levels_of(LINEAR, "linear", steps)
    x = randn(3, 4, seed=9)
    factor = torch.ones(4, dtype=torch.float64)
    for now, following in itertools.pairwise(levels):
        v, w = now.ratio, following.ratio
        factor = factor * (1 + (v - w) ** 2 / (2 * (GAUSSIAN.variance + v * w)))
    by_13, by_15 = centred(ddim(levels), x), centred(probability_flow(levels), x)
    torch.testing.assert_close(by_15 / by_13, factor.expand(3, 4), rtol=1e-9, atol=0)
    last = levels[-2].ratio ** 2 / (2 * GAUSSIAN.variance)  # what the last step alone adds
    assert (factor - 1 >= last).all()
    truth = to_xbar(GAUSSIAN.flow(x, levels[0], levels[-1]), levels[-1]) - GAUSSIAN.mean
    assert (by_13.abs() < truth.abs()).all()
    assert (truth.abs() < by_15.abs()).all()


def test_the_two_euler_methods_converge_to_each_other_as_one_over_s() -> None:
    gaps = []
    for steps in (100, 200, 400, 800):
        levels = equal_ratios(LINEAR, steps)
        x = randn(3, 4, seed=10)
        gaps.append((centred(probability_flow(levels), x) / centred(ddim(levels), x) - 1).max().item() * steps)
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 1  # S times the difference falls to a limit that is not 0
    assert gaps[2] / gaps[3] == pytest.approx(1, abs=0.05)
    # The limit: sum (v - v')^2 / (2 (c^2 + v v')) at v' = v e^-h is h times an integral over log v.
    first, last, least = LINEAR.level(1000).ratio, LINEAR.level(10).ratio, GAUSSIAN.variance.min().item()
    length = math.log(first / last)
    integral = 0.25 * math.log((least + first**2) / (least + last**2))
    assert gaps[3] == pytest.approx(length * integral, rel=0.1)


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("direction", [1, -1])
def test_runge_kutta_is_the_textbook_method_in_xbar(order: int, direction: int) -> None:
    levels = LINEAR.levels([1000, 700, 300, 50, 7])[::direction]
    x = randn(8, 2, seed=11) * 2
    xbar = to_xbar(x, levels[0])

    def slope(state: Tensor, v: float) -> Tensor:
        return velocity(MIXTURE.denoise, state, Level(0, -2 * math.log(v)))

    for now, following in itertools.pairwise(levels):
        v, h = now.ratio, following.ratio - now.ratio
        first = slope(xbar, v)
        if order == 2:
            xbar = xbar + h / 2 * (first + slope(xbar + h * first, v + h))
        else:
            second = slope(xbar + h / 2 * first, v + h / 2)
            third = slope(xbar + h / 2 * second, v + h / 2)
            fourth = slope(xbar + h * third, v + h)
            xbar = xbar + h / 6 * (first + 2 * second + 2 * third + fourth)
    plan = runge_kutta(levels, LINEAR, order)
    assert (plan.nfe, plan.memory) == (4 * order, order)
    torch.testing.assert_close(run(MIXTURE.denoise, plan, x), from_xbar(xbar, levels[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("grid", GRIDS)
def test_runge_kutta_is_exact_where_eps_is_constant(order: int, direction: int, grid: str) -> None:
    """Every state, also of the stages, lies on the straight line signal x_0 + noise eps."""
    x0, eps = randn(5, seed=12), randn(5, seed=13)

    def constant(x: Tensor, level: Level, /) -> Prediction:
        return Prediction(x0_from_eps(eps, x, level), eps)

    for name, schedule in WITH_SIGNAL.items():
        levels = levels_of(schedule, grid, 10)[::direction]
        plan = runge_kutta(levels, schedule, order)
        start = levels[0].signal * x0 + levels[0].noise * eps
        tolerance = 1e-12 + 1e-14 * max(level.ratio for level in levels)  # xbar's rounding; 2e4 for the cosine
        for step in trajectory(constant, plan, start):
            line = step.row.next.signal * x0 + step.row.next.noise * eps
            torch.testing.assert_close(step.x, line, rtol=0, atol=tolerance, msg=f"{name}, t = {step.row.next.t}")


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("direction", [1, -1])
def test_the_levels_at_which_runge_kutta_evaluates_the_network(order: int, direction: int) -> None:
    """Once per row, order times per step, halfway in v; never at t = 0, where the step is that of `ddim`."""
    queried: list[Level] = []

    def spy(x: Tensor, level: Level, /) -> Prediction:
        queried.append(level)
        return GAUSSIAN.denoise(x, level)

    levels = falling(LINEAR, [100, 400, 1000])[::direction]
    plan = runge_kutta(levels, LINEAR, order, clean_as=LINEAR.level(1))
    run(spy, plan, randn(2, 4))
    assert queried == [row.query for row in plan.rows]
    [single] = [row for row in plan.rows if 0 in (row.now.t, row.next.t)]
    assert single in ddim(levels, clean_as=LINEAR.level(1)).rows
    stages = queried[:-1] if direction > 0 else queried[1:]
    assert len(stages) == 2 * order
    steps = [(1000, 400), (400, 100)] if direction > 0 else [(100, 400), (400, 1000)]
    for k, (first, last) in enumerate(steps):
        v, w = LINEAR.level(first).ratio, LINEAR.level(last).ratio
        expected = [v, w] if order == 2 else [v, (v + w) / 2, (v + w) / 2, w]
        assert [level.ratio for level in stages[k * order : (k + 1) * order]] == pytest.approx(expected, rel=1e-12)
    assert queried[0].t == (1000 if direction > 0 else 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_middle_stage_is_on_the_schedule(name: str) -> None:
    schedule = SCHEDULES[name]
    levels = schedule.levels([*range(schedule.T - 1, 0, -7)])  # below pure noise
    for row in runge_kutta(levels, schedule).rows:
        assert schedule.level(row.query.t).log_snr == pytest.approx(row.query.log_snr, abs=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_plans_round_trip_through_json(solver: str) -> None:
    plan = SOLVERS[solver](levels_of(LINEAR, "linear", 4))
    loaded = Plan.from_json(plan.to_json())
    assert loaded == plan
    assert loaded.straight == (solver != "eq. (15)")
    x = randn(2, 4, seed=14)
    torch.testing.assert_close(run(GAUSSIAN.denoise, loaded, x), run(GAUSSIAN.denoise, plan, x), rtol=0, atol=0)
    assert ("not exact on straight lines" in str(plan)) != plan.straight
    plan.check_schedule(LINEAR, to_clean=True)


def test_plan_names_contain_the_settings() -> None:
    levels = falling(LINEAR, [500, 1000])
    assert probability_flow(levels, about="two").name == "probability-flow(two)"
    assert probability_flow(levels[1::-1]).name == "probability-flow(encode)"
    assert runge_kutta(levels, LINEAR).name == "runge-kutta(order=4)"
    assert runge_kutta(levels[::-1], LINEAR, 2, about="two").name == "runge-kutta(two, order=2, encode)"


def runge_kutta_on(schedule: Schedule = SCHEDULES["cosine"]) -> Callable[[Sequence[Level]], Plan]:
    return lambda levels: runge_kutta(levels, schedule)


@pytest.mark.parametrize(
    ("make", "levels", "message"),
    [
        (probability_flow, LINEAR.levels([0, 500, 1000]), r"^levels: .*\(15\)"),
        (probability_flow, ZERO.levels([1000, 500, 0]), r"^level t = 1000: .*\(15\)"),
        (probability_flow, ZERO.levels([500, 1000]), r"^level t = 1000: "),
        (runge_kutta_on(ZERO), ZERO.levels([1000, 500, 0]), r"^level t = 1000: .*\bRunge-Kutta\b"),
        (runge_kutta_on(ZERO), ZERO.levels([0, 500, 1000]), r"^level t = 1000: "),
        (probability_flow, LINEAR.levels([500]), r"^levels: "),
        (runge_kutta_on(LINEAR), LINEAR.levels([500, 700, 600]), r"^level t = 600: "),
        (probability_flow, LINEAR.levels([500, 500]), r"^level t = 500: "),
        (runge_kutta_on(), LINEAR.levels([500, 400]), r"^plan: "),
        (lambda levels: runge_kutta(levels, LINEAR, 3), LINEAR.levels([500, 400]), r"^order 3: "),
    ],
)
def test_invalid_levels_and_orders_are_errors(make: Callable, levels: tuple[Level, ...], message: str) -> None:
    with pytest.raises(DdimError, match=message):
        make(levels)
