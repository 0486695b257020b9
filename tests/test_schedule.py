from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import SCHEDULES
from ddim.errors import DdimError
from ddim.process import schedule
from ddim.process.schedule import Level, Schedule

every_schedule = pytest.mark.parametrize("schedule_", SCHEDULES.values(), ids=SCHEDULES.keys())


def literal_beta(name: str, t: int, T: int) -> mpmath.mpf:
    """The betas as published, with 40 digits; t starts from 1."""
    u = mpmath.mpf(t - 1) / (T - 1)
    a, b = mpmath.mpf("1e-4"), mpmath.mpf("0.02")
    match name:
        case "linear":
            return a + (b - a) * u
        case "quadratic":
            return a + (b - a) * u**2
        case "scaled-linear":
            a, b = mpmath.sqrt(mpmath.mpf("0.00085")), mpmath.sqrt(mpmath.mpf("0.012"))
            return (a + (b - a) * u) ** 2
        case "sigmoid":
            return a + (b - a) / (1 + mpmath.exp(6 - 12 * u))
        case "cosine":

            def f(time: int) -> mpmath.mpf:
                return (
                    mpmath.cos((mpmath.mpf(time) / T + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2
                )

            return min(1 - f(t) / f(t - 1), mpmath.mpf("0.999"))
    raise AssertionError(f"add the published formula of schedule {name!r} here")


@pytest.mark.parametrize("name", schedule.NAMED)
@pytest.mark.parametrize("T", [10, 1000])
def test_each_named_schedule_equals_its_published_formula(name: str, T: int) -> None:
    schedule_, log_snr = schedule.NAMED[name](T), []
    with mpmath.workdps(40):
        alpha_bar = mpmath.mpf(1)
        for t in range(1, T + 1):
            alpha_bar *= 1 - literal_beta(name, t, T)
            log_snr.append(float(mpmath.log(alpha_bar / (1 - alpha_bar))))
            assert schedule_.level(t).alpha_bar == pytest.approx(float(alpha_bar), rel=1e-10)
    # The cosine schedule's betas lose 4 digits as 1 minus a ratio near 1; the others are accurate to the last digits.
    assert np.abs(schedule_.log_snr - log_snr).max() < (1e-9 if name == "cosine" else 1e-12)


@every_schedule
def test_clean_data_is_exactly_clean(schedule_: Schedule) -> None:
    clean = schedule_.level(0)
    assert clean == Level(0.0, math.inf)
    assert (clean.alpha_bar, clean.variance, clean.signal, clean.noise) == (1.0, 0.0, 1.0, 0.0)
    assert clean.ratio == clean.angle == clean.log_alpha_bar == 0.0
    assert schedule_.alpha_bar[0] == 1.0


@every_schedule
def test_integer_timesteps_return_the_table(schedule_: Schedule) -> None:
    assert [schedule_.level(t).log_snr for t in range(1, schedule_.T + 1)] == schedule_.log_snr.tolist()
    assert [level.alpha_bar for level in schedule_.levels(range(schedule_.T + 1))] == schedule_.alpha_bar.tolist()
    assert np.all(np.diff(schedule_.alpha_bar) < 0)


@every_schedule
@given(st.data())
def test_the_properties_of_a_level_are_consistent(schedule_: Schedule, data: st.DataObject) -> None:
    level = schedule_.level(data.draw(st.floats(0, schedule_.T)))
    assert level.signal**2 + level.noise**2 == pytest.approx(1, abs=1e-15)
    assert level.alpha_bar + level.variance == pytest.approx(1, abs=1e-15)
    assert math.cos(level.angle) == pytest.approx(level.signal, abs=1e-15)
    assert math.sin(level.angle) == pytest.approx(level.noise, abs=1e-15)
    assert math.exp(level.log_alpha_bar) == pytest.approx(level.alpha_bar, rel=1e-14)
    if level.signal:
        assert level.ratio == pytest.approx(level.noise / level.signal, rel=1e-13)


@every_schedule
@given(st.data())
def test_real_timesteps_lie_between_their_neighbours(schedule_: Schedule, data: st.DataObject) -> None:
    t = data.draw(st.floats(0, schedule_.T))
    level, below, above = schedule_.level(t), schedule_.level(math.floor(t)), schedule_.level(math.ceil(t))
    assert level.t == t
    assert below.angle - 1e-15 <= level.angle <= above.angle + 1e-15
    for number in (level.alpha_bar, level.signal, level.noise, level.angle):
        assert math.isfinite(number)
    later = data.draw(st.floats(t, schedule_.T))
    assert schedule_.level(later).log_snr <= level.log_snr + 1e-9
    if later - t > 1e-3:
        assert schedule_.level(later).log_snr < level.log_snr
    # In the middle between two timesteps, so is the angle.
    middle = schedule_.level(math.floor(t) + 0.5) if t < schedule_.T else level
    assert t == schedule_.T or middle.angle == pytest.approx(
        (below.angle + schedule_.level(math.floor(t) + 1).angle) / 2, abs=1e-12
    )


@every_schedule
@given(st.data())
def test_timesteps_are_recovered_from_levels(schedule_: Schedule, data: st.DataObject) -> None:
    t = data.draw(st.floats(0, schedule_.T) | st.integers(0, schedule_.T))
    level = schedule_.level(t)
    assert schedule_.time_at_angle(level.angle) == pytest.approx(t, abs=1e-7)
    assert schedule_.time_at_log_snr(level.log_snr) == pytest.approx(t, abs=1e-7)


def test_the_smallest_float_timestep_has_a_level() -> None:
    assert schedule.linear(4).level(5e-324).alpha_bar == 1.0


@pytest.mark.parametrize("name", schedule.NAMED)
def test_zero_terminal_snr_is_algorithm_1_of_lin_et_al(name: str) -> None:
    before = SCHEDULES[name]
    after = schedule.zero_terminal_snr(before)
    root = np.sqrt(before.alpha_bar[1:])
    assert after.level(after.T).alpha_bar == 0.0
    assert after.level(after.T).log_snr == -math.inf
    assert after.level(1).signal == pytest.approx(before.level(1).signal, rel=1e-14)
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(np.sqrt(after.alpha_bar[1:]), expected, rtol=1e-11, atol=1e-15)


def test_alpha_bar_is_the_cumulative_product_of_1_minus_beta() -> None:
    schedule_ = schedule.from_betas([0.5, 0.25, 1.0])
    np.testing.assert_allclose(schedule_.alpha_bar, [1, 0.5, 0.375, 0.0], rtol=1e-15)


def test_the_variance_near_clean_data_is_precise() -> None:
    """1 - alpha_bar of a beta of 1e-20 would be 0 if it were a difference."""
    assert schedule.from_betas([1e-20]).level(1).variance == pytest.approx(1e-20, rel=1e-12)


@pytest.mark.parametrize(
    "betas",
    [[0.1, 0.0], [0.1, -0.1], [0.1, 1.1], [1.0, 0.5], [0.1, math.nan], [math.inf], [0.1, 1e-30], []],
    ids=["zero", "negative", "above one", "one before the end", "nan", "inf", "constant", "empty"],
)
def test_invalid_betas_are_errors(betas: list[float]) -> None:
    with pytest.raises(DdimError):
        schedule.from_betas(betas)


@pytest.mark.parametrize(
    "table",
    [[], [1.0, 1.0], [1.0, 2.0], [math.nan], [math.inf], [1.0, -math.inf, -math.inf], [-math.inf, 0.0], [[1.0, 0.0]]],
)
def test_invalid_log_snr_tables_are_errors(table: list[float]) -> None:
    with pytest.raises(DdimError):
        Schedule(np.array(table))


@pytest.mark.parametrize("name", schedule.NAMED)
def test_schedules_with_one_timestep(name: str) -> None:
    assert schedule.NAMED[name](1).T == 1
    for T in (0, -1):
        with pytest.raises(DdimError):
            schedule.NAMED[name](T)
    with pytest.raises(DdimError, match=r"^schedule"):
        schedule.zero_terminal_snr(schedule.NAMED[name](1))


@pytest.mark.parametrize("t", [-1, -1e-9, 1000.001, math.nan, math.inf])
def test_timesteps_out_of_range_are_errors(t: float) -> None:
    with pytest.raises(DdimError, match=r"^time.*\b0\.\.1000\b"):
        SCHEDULES["linear"].level(t)


def test_schedules_are_compared_by_value_and_immutable() -> None:
    first, second = schedule.linear(20), schedule.linear(20)
    assert first == second
    assert hash(first) == hash(second)
    assert first != schedule.linear(21)
    assert first != schedule.cosine(20)
    source = np.array([1.0, 0.0])
    schedule_ = Schedule(source)
    source[0] = 5.0
    assert schedule_.level(1).log_snr == 1.0
    with pytest.raises(ValueError, match="read-only"):
        schedule_.log_snr[0] = 2.0
