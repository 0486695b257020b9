"""Tests specific to the multistep samplers; test_samplers.py has the tests of every sampler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import MIXTURE, SCHEDULES, apply, eased_in, equal_ratios, falling, levels_of, observed_order, randn
from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.schedule import Level
from ddim.samplers import adams_bashforth, ddim, deis, dpm_solver_pp, ipndm, unipc
from ddim.sampling.loop import trajectory

LINEAR = SCHEDULES["linear"]
LEVELS = levels_of(LINEAR, "equal-angle", 8)
COORDINATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ratio": np.tan,
    "log-snr": lambda angle: -2 * np.log(np.tan(angle)),
    "angle": lambda angle: angle,
}
random_levels = st.lists(st.floats(-6, 6), min_size=5, max_size=6, unique=True).map(
    lambda values: [Level(float(k), value) for k, value in enumerate(sorted(values))][::-1]
)
separated_levels = random_levels.filter(
    lambda levels: min(a.log_snr - b.log_snr for a, b in itertools.pairwise(levels)) > 0.1
)


def integral(rate: Callable[[np.ndarray], np.ndarray], now: Level, end: Level) -> float:
    """The integral of a rate over the angle from one level to another, by Gauss's rule on 40 intervals."""
    u, weights = np.polynomial.legendre.leggauss(20)
    cuts = np.arctan(np.exp(-np.linspace(now.log_snr, end.log_snr, 41) / 2))
    half, middle = np.diff(cuts) / 2, (cuts[:-1] + cuts[1:]) / 2
    return float((half * (rate(middle[:, None] + half[:, None] * u) @ weights)).sum())


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("quantity", ["eps", "x0", "v"])
@given(levels=separated_levels, rising=st.booleans())
@settings(max_examples=10)
def test_polynomials_are_integrated_exactly(
    quantity: str, coordinate: str, order: int, levels: list[Level], rising: bool
) -> None:
    """Where x0 and eps are polynomials of degree order - 1 in the coordinate: dx/signal = eps dv, dx/noise = x0 d(1/v),
    or dx = x0 dsignal + eps dnoise."""
    of_x0, of_eps = np.array([[0.3, -0.2, 0.1, 0.05], [-0.4, 0.1, 0.2, -0.1]])[:, :order]
    plan = adams_bashforth(levels[::-1] if rising else levels, order, quantity, coordinate)

    def pair(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        powers = COORDINATES[coordinate](angle)[..., None] ** np.arange(order)
        return powers @ of_x0, powers @ of_eps

    def rate(angle: np.ndarray) -> np.ndarray:
        x0, eps = pair(angle)
        both = eps * np.cos(angle) - x0 * np.sin(angle)
        return {"eps": eps / np.cos(angle) ** 2, "x0": -x0 / np.sin(angle) ** 2, "v": both}[quantity]

    def scale(level: Level) -> float:
        return {"eps": level.signal, "x0": level.noise, "v": 1.0}[quantity]

    for k, row in enumerate(plan.rows[order - 1 :], order - 1):
        past = [pair(np.array(earlier.now.angle)) for earlier in plan.rows[k::-1]]
        x0, eps = ([torch.tensor(float(values[i]), dtype=torch.float64) for values in past] for i in (0, 1))
        moved = apply(row, [torch.tensor(0.7, dtype=torch.float64)], x0, eps)
        expected = scale(row.next) * (0.7 / scale(row.now) + integral(rate, row.now, row.next))
        size = row.size * max(abs(float(value)) for values in past for value in values)
        assert float(moved) == pytest.approx(expected, abs=1e-11 * (1 + size))


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("quantity", ["eps", "x0", "v"])
def test_order_one_is_ddim(quantity: str, coordinate: str) -> None:
    for levels in (LEVELS, LEVELS[::-1], levels_of(SCHEDULES["linear+zero-terminal-snr"], "linear", 5)):
        for rising in (levels, levels[::-1]):
            plans = (adams_bashforth(rising, 1, quantity, coordinate), deis(rising, 1), ipndm(rising, 1))  # type: ignore[arg-type]
            assert all(plan.rows == ddim(rising).rows for plan in plans)


def test_deis_is_adams_bashforth_in_the_log_snr() -> None:
    for order in (2, 3, 4):
        assert deis(LEVELS, order).rows == adams_bashforth(LEVELS, order, "eps", "log-snr").rows
        assert deis(LEVELS, order, "ratio").rows == adams_bashforth(LEVELS, order, "eps").rows


def evenly_spaced(top: float, bottom: float, steps: int) -> list[Level]:
    """Levels whose noise / signal falls by equal amounts."""
    return [Level(float(steps - k), -2 * math.log(v)) for k, v in enumerate(np.linspace(top, bottom, steps + 1))]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_adams_bashforth_on_evenly_spaced_levels(order: int) -> None:
    for levels in (evenly_spaced(5.0, 0.5, 10), evenly_spaced(0.5, 5.0, 10)):
        for row, other in zip(ipndm(levels, order).rows, adams_bashforth(levels, order).rows, strict=True):
            assert [*row.x, *row.x0, *row.eps] == pytest.approx([*other.x, *other.x0, *other.eps], abs=1e-11)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_order_of_ipndm_on_evenly_spaced_levels(order: int) -> None:
    """After the first steps, which are short steps of another sampler."""

    def make(levels: Sequence[Level]) -> Plan:
        eased = adams_bashforth(eased_in(levels, LINEAR, parts=10), order)
        return replace(eased, rows=(*eased.rows[: 10 + order], *ipndm(levels, order).rows[order:])).check()

    assert observed_order(make, evenly_spaced(3.0, 0.5, 160), evenly_spaced(3.0, 0.5, 320)) == pytest.approx(
        order, abs=0.15
    )


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("quantity", ["eps", "x0"])
def test_a_high_order_needs_short_first_steps(quantity: str, order: int) -> None:
    """A long first Euler step has a second-order error that later steps do not reduce."""
    coarse, fine = (equal_ratios(LINEAR, steps, 600, 50)[::-1] for steps in (160, 320))
    make = partial(adams_bashforth, order=order, quantity=quantity)
    assert observed_order(make, coarse, fine) < order - 0.5
    assert observed_order(make, eased_in(coarse, LINEAR), eased_in(fine, LINEAR)) == pytest.approx(order, abs=0.15)


# --- the formulas of the papers


def log_ratio(level: Level) -> float:
    """The papers' lambda = log(signal / noise)."""
    return math.log(level.signal / level.noise)


def phi(k: int, z: float) -> float:
    """phi_1 = (e^z - 1) / z, phi_{k+1} = (phi_k - 1 / k!) / z; as a series, without cancellation."""
    return sum(z**n / math.factorial(n + k) for n in range(40))


def test_second_order_dpm_solver_pp_is_algorithm_2() -> None:
    """Algorithm 2 of Lu et al. 2022: D = (1 + 1 / 2r) x0 - x0_1 / 2r, x = noise'/noise x - signal' (e^-h - 1) D."""
    rows = dpm_solver_pp(LEVELS, 2).rows
    assert rows[0] == ddim(LEVELS).rows[0]
    for before, row in itertools.pairwise(rows[:-1]):
        h, h1 = log_ratio(row.next) - log_ratio(row.now), log_ratio(row.now) - log_ratio(before.now)
        whole, r = -row.next.signal * math.expm1(-h), h1 / h
        expected = [row.next.noise / row.now.noise, whole * (1 + 1 / (2 * r)), -whole / (2 * r)]
        assert [*row.x, *row.x0] == pytest.approx(expected, abs=1e-12)
    assert rows[-1] == ddim(LEVELS).rows[-1]


def three_step_row(rows: Sequence[Row], k: int, half: bool) -> Row:
    """DPM-Solver++'s third-order step with divided differences: the second one, D2 = h^2 f''/2, has the weight 2 phi_3,
    for the integral of e^(u - h) u^2 over the step is 2 h^3 phi_3(-h); the original code has phi_3."""
    row = rows[k]
    places = [log_ratio(past.now) for past in rows[k::-1][:3]]
    h = log_ratio(row.next) - places[0]
    r0, r1 = (places[0] - places[1]) / h, (places[1] - places[2]) / h
    first, second = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
    d1 = first + r0 / (r0 + r1) * (first - second)
    d2 = (first - second) / (r0 + r1)
    step = row.next.signal * h
    weights = step * (phi(1, -h) * np.array([1, 0, 0]) + phi(2, -h) * d1 + phi(3, -h) * (1 if half else 2) * d2)
    return replace(row, x=(row.next.noise / row.now.noise,), x0=tuple(map(float, weights)), eps=())


def test_third_order_dpm_solver_pp_is_the_formula_of_the_paper() -> None:
    rows = dpm_solver_pp(LEVELS, 3).rows
    for k in range(2, len(rows) - 1):
        expected = three_step_row(rows, k, half=False)
        assert [*rows[k].x, *rows[k].x0] == pytest.approx([*expected.x, *expected.x0], abs=1e-12)


def test_half_of_the_second_difference_has_order_two() -> None:
    def original(levels: Sequence[Level]) -> Plan:
        plan = dpm_solver_pp(levels, 3)
        original_rows = [three_step_row(plan.rows, k, half=True) for k in range(2, len(plan))]
        return replace(plan, rows=(*plan.rows[:2], *original_rows)).check()

    coarse, fine = (eased_in(equal_ratios(LINEAR, steps, 600, 50), LINEAR) for steps in (80, 160))
    assert observed_order(original, coarse, fine) == pytest.approx(2, abs=0.15)
    assert observed_order(partial(dpm_solver_pp, order=3), coarse, fine) == pytest.approx(3, abs=0.15)


def unified(
    x: Tensor, before: Level, after: Level, predictions: Sequence[tuple[Level, Tensor]], corrects: bool
) -> Tensor:
    """UniP or UniC of Zhao et al. 2023 for data prediction, B(h) = e^-h - 1: from x at `before` to `after`, with the
    predictions, the one at `before` first and, when correcting, the one at `after` last."""
    h = log_ratio(after) - log_ratio(before)
    x0 = predictions[0][1]
    out = after.noise / before.noise * x - after.signal * math.expm1(-h) * x0
    ratios = np.array([(log_ratio(level) - log_ratio(before)) / h for level, _ in predictions[1:]])
    p = len(ratios)
    if not p:
        return out
    big = math.expm1(-h)
    moments = np.array([math.factorial(n) * -h * phi(n + 1, -h) / big for n in range(1, p + 1)])
    simple = p == 1  # the paper sets a_1 = 1/2 both in UniP-2 and in UniC-1, which keeps the order
    a = [0.5] if simple else np.linalg.solve(np.vander(ratios, p, increasing=True).T, moments)
    assert not corrects or ratios[-1] == 1
    for share, ratio, (_, other) in zip(a, ratios, predictions[1:], strict=True):
        out = out - after.signal * big * float(share) * (other - x0) / float(ratio)
    return out


def predict_and_correct(levels: Sequence[Level], order: int, x: Tensor) -> list[Tensor]:
    """The predicted states of UniPC, which carries a predicted and a corrected state."""
    predictions: list[tuple[Level, Tensor]] = []
    predicted, corrected, states = x, x, []
    for k, (now, following) in enumerate(itertools.pairwise(levels)):
        prediction = (now, MIXTURE.denoise(predicted, now).x0)
        if k:
            corrected = unified(corrected, levels[k - 1], now, [*predictions[:order], prediction], corrects=True)
        predictions.insert(0, prediction)
        predicted = unified(corrected, now, following, predictions[:order], corrects=False)
        states.append(predicted)
    return states


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("direction", ["sampling", "encoding"])
def test_unipc_with_one_state_is_unipc_with_two(order: int, direction: str) -> None:
    """The corrected state is the predicted one plus weights of predictions, so it need not be stored."""
    levels = equal_ratios(LINEAR, 8) if direction == "sampling" else equal_ratios(LINEAR, 8)[::-1]
    x = MIXTURE.sample(4, seed=1) * levels[0].signal + randn(4, 3, seed=2) * levels[0].noise
    for step, expected in zip(
        trajectory(MIXTURE.denoise, unipc(levels, order), x), predict_and_correct(levels, order, x), strict=True
    ):
        torch.testing.assert_close(step.x, expected, rtol=1e-12, atol=1e-12)


def test_the_third_order_predictor_of_unipc_is_that_of_dpm_solver_pp() -> None:
    x, past = randn(4), [randn(4, seed=1), randn(4, seed=2), randn(4, seed=3)]
    rows = dpm_solver_pp(LEVELS, 3).rows
    for k in range(2, len(rows) - 1):
        predictions = [(earlier.now, x0) for earlier, x0 in zip(rows[k::-1], past, strict=False)]
        expected = unified(x, rows[k].now, rows[k].next, predictions, corrects=False)
        torch.testing.assert_close(apply(rows[k], [x], past, []), expected, rtol=1e-12, atol=1e-12)


# --- ends and errors


@pytest.mark.parametrize(("coordinate", "first"), [("ratio", 1), ("log-snr", 1), ("angle", 2)])
def test_predictions_at_an_infinite_coordinate_are_omitted(coordinate: str, first: int) -> None:
    levels = levels_of(SCHEDULES["linear+zero-terminal-snr"], "linear", 6)
    for quantity in ("eps", "x0", "v"):
        plan = adams_bashforth(levels, 4, quantity, coordinate)  # type: ignore[arg-type]
        assert [row.memory for row in plan.rows[:3]] == [1, first, first + 1]
        assert plan.rows[-1].memory == (1 if coordinate == "log-snr" else 4)


@pytest.mark.parametrize("sampler", [adams_bashforth, deis, dpm_solver_pp, unipc, ipndm])
def test_a_prediction_on_clean_data_is_not_extrapolated(sampler: Callable[..., Plan]) -> None:
    """The network was evaluated at another level than that of the state."""
    plan = sampler(LEVELS[::-1], 2, clean_as=LINEAR.level(1))
    assert [row.memory for row in plan.rows[:3]] == [1, 1, 2]
    assert plan.rows[0].query == LINEAR.level(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adams_bashforth(LEVELS, 5), r"^order 5: "),
        (lambda: adams_bashforth(LEVELS, 0), r"^order 0: "),
        (lambda: adams_bashforth(LEVELS, 2, "score"), r"^quantity 'score': .*\bx0\b"),  # type: ignore[arg-type]
        (lambda: adams_bashforth(LEVELS, 2, "eps", "time"), r"^coordinate 'time': "),  # type: ignore[arg-type]
        (lambda: deis(LEVELS, 5), r"^order 5: "),
        (lambda: deis(LEVELS, 2, "time"), r"^coordinate 'time': "),  # type: ignore[arg-type]
        (lambda: dpm_solver_pp(LEVELS, 1), r"^order 1: "),
        (lambda: unipc(LEVELS, 4), r"^order 4: "),
        (lambda: ipndm(LEVELS, 5), r"^order 5: "),
        (lambda: ipndm(LEVELS[:1]), r"^levels: "),
        (lambda: unipc([LEVELS[0], LEVELS[2], LEVELS[1]]), r"^level t = 562: "),
    ],
)
def test_invalid_settings_are_errors_of_one_line(make: Callable[[], Plan], message: str) -> None:
    with pytest.raises(DdimError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_close_levels_whose_coordinates_round_to_one_number() -> None:
    """Near zero signal, levels that differ in log-SNR can have equal angles, whose difference is not divided by."""
    levels = [Level(3.0, -72.0), Level(2.0, math.nextafter(-72.0, 0)), Level(1.0, 0.0), *falling(LINEAR, [])]
    assert levels[0].angle == levels[1].angle
    plan = adams_bashforth(levels, 3, "v")
    assert [row.memory for row in plan.rows] == [1, 1, 2]
