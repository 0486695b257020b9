from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from bench import GRIDS, SCHEDULES, levels_of
from ddim.errors import DdimError, DdimWarning
from ddim.process import schedule, timesteps

LINEAR = SCHEDULES["linear"]


def tau_and_warnings(noise_schedule: schedule.Schedule, name: str, steps: int) -> tuple[list[float], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        times = timesteps.tau(noise_schedule, name, steps)
    assert all(issubclass(warning.category, DdimWarning) for warning in caught)
    return times, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("noise_schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", GRIDS)
def test_every_spacing_rises_in_the_schedule_and_warns_about_changes(
    noise_schedule: schedule.Schedule, name: str
) -> None:
    for steps in (1, 2, 3, 10, 13, 30, 50, 100, 600, 999, 1000):
        times, messages = tau_and_warnings(noise_schedule, name, steps)
        assert timesteps.check(noise_schedule, times) == times
        assert all(t == round(t) for t in times)
        assert times[0] >= 1
        assert len(messages) == (len(times) != steps) + (times[-1] != noise_schedule.T)


@given(T=st.integers(1, 12), data=st.data())
def test_every_spacing_works_on_short_schedules(T: int, data: st.DataObject) -> None:
    noise_schedule = data.draw(st.sampled_from([schedule.linear(T), schedule.from_betas([*[0.1] * (T - 1), 1.0])]))
    steps = data.draw(st.integers(1, T))
    for name in GRIDS:
        times, messages = tau_and_warnings(noise_schedule, name, steps)
        assert timesteps.check(noise_schedule, times) == times
        assert messages or (len(times) == steps and times[-1] == T)


def rising(times: list[int]) -> list[int]:
    """Sorted, without 0 (clean data) and duplicates."""
    return sorted({t for t in times if t > 0})


@given(T=st.integers(1, 400), data=st.data())
def test_linear_and_quadratic_are_the_floors_of_the_paper(T: int, data: st.DataObject) -> None:
    """Section 4.2: tau_i = floor(c i) and floor(c i^2), with c such that tau_S = T."""
    steps = data.draw(st.integers(1, T))
    noise_schedule = schedule.linear(T)
    linear = [math.floor(Fraction(T, steps) * i) for i in range(1, steps + 1)]
    quadratic = [math.floor(Fraction(T, steps**2) * i**2) for i in range(1, steps + 1)]
    assert tau_and_warnings(noise_schedule, "linear", steps) == (linear, [])
    assert tau_and_warnings(noise_schedule, "quadratic", steps)[0] == rising(quadratic)
    assert linear[-1] == quadratic[-1] == T


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 30, 50, 100, 600, 1000])
def test_official_spacings_are_those_of_the_authors_code(steps: int) -> None:
    """The lines of github.com/ermongroup/ddim, runners/diffusion.py; it counts timesteps from 0."""
    T = LINEAR.T
    uniform = list(range(0, T, T // steps))
    quad = [int(s) for s in list(np.linspace(0, np.sqrt(T * 0.8), steps) ** 2)]
    assert tau_and_warnings(LINEAR, "official-linear", steps)[0] == [t + 1 for t in uniform]
    assert tau_and_warnings(LINEAR, "official-quadratic", steps)[0] == rising([t + 1 for t in quad])


def test_official_spacings_warn_about_another_number_of_steps() -> None:
    """30 steps are 31, 600 are 1000; the quadratic one stops at 0.8 T and repeats itself."""
    for name, steps, count in (
        ("linear", 30, 31),
        ("linear", 600, 1000),
        ("quadratic", 100, 96),
        ("quadratic", 1000, 688),
    ):
        times, messages = tau_and_warnings(LINEAR, f"official-{name}", steps)
        assert len(times) == count
        assert f"{count}" in messages[0]
    with pytest.warns(DdimWarning, match=r"\bT = 1000\b"):
        timesteps.tau(LINEAR, "official-quadratic", 10)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 10, 13, 50, 300, 1000])
def test_spacings_are_those_of_diffusers(spacing: str, steps: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert tau_and_warnings(LINEAR, spacing, steps)[0] == [t + 1 for t in scheduler.timesteps.tolist()[::-1]]


@pytest.mark.parametrize("noise_schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("steps", [5, 10, 50])
def test_equal_angle_steps_are_equal_up_to_half_a_timestep(noise_schedule: schedule.Schedule, steps: int) -> None:
    times = timesteps.tau(noise_schedule, "equal-angle", steps)
    last = noise_schedule.level(noise_schedule.T).angle
    for i, t in enumerate(times, start=1):
        exact = last * i / steps
        low, high = (
            noise_schedule.level(max(t - 0.5, 0)).angle,
            noise_schedule.level(min(t + 0.5, noise_schedule.T)).angle,
        )
        assert low - 1e-12 <= exact <= high + 1e-12


@pytest.mark.parametrize("steps", [5, 10])
def test_log_snr_steps_are_equal_up_to_half_a_timestep(steps: int) -> None:
    times = timesteps.tau(LINEAR, "log-snr", steps)
    first, last = LINEAR.level(1).log_snr, LINEAR.level(1000).log_snr
    for t, exact in zip(times, np.linspace(first, last, steps), strict=True):
        assert LINEAR.level(min(t + 0.5, 1000)).log_snr - 1e-9 <= exact <= LINEAR.level(t - 0.5).log_snr + 1e-9


@pytest.mark.filterwarnings("ignore:.*distinct times")
@pytest.mark.parametrize("name", GRIDS)
def test_top_is_the_last_timestep(name: str) -> None:
    times = timesteps.tau(LINEAR, name, 7, top=600)
    assert (len(times) >= 7, times[0] >= 1, times[-1]) == (True, True, 600)
    assert timesteps.check(LINEAR, times) == times
    for top in (6, 1001):
        with pytest.raises(DdimError, match=f"top {top}"):
            timesteps.tau(LINEAR, name, 7, top=top)


def test_a_list_of_timesteps() -> None:
    assert timesteps.tau(LINEAR, [0.5, 3, 1000]) == [0.5, 3.0, 1000.0]
    with pytest.warns(DdimWarning, match=r"\bT = 1000\b"):
        assert timesteps.tau(LINEAR, [1, 900]) == [1.0, 900.0]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], r"^grid: "),
        ([1, 1, 1000], r"^grid entry 1: "),
        ([5, 4, 1000], r"^grid entry 4: "),
        ([0, 1000], r"^grid entry 0: "),
        ([-1, 1000], r"^grid entry -1: "),
        ([1, 1001], r"^grid entry 1001: "),
        ([math.nan], r"^grid entry nan: "),
    ],
)
def test_an_invalid_list_of_timesteps_is_an_error(times: list[float], message: str) -> None:
    with pytest.raises(DdimError, match=message):
        timesteps.tau(LINEAR, times)


def test_unknown_spacings_and_invalid_numbers_of_steps_are_errors() -> None:
    with pytest.raises(DdimError, match=r"^grid 'liner': "):
        timesteps.tau(LINEAR, "liner", 10)
    for steps in (None, 0, -1, 1001):
        with pytest.raises(DdimError, match=rf"steps {steps}: "):
            timesteps.tau(LINEAR, "linear", steps)


def test_the_default_is_a_known_spacing() -> None:
    assert timesteps.DEFAULT in GRIDS
    assert len(levels_of(LINEAR, timesteps.DEFAULT, 10)) == 11
