"""Timesteps: the sub-sequences tau of 1..T at which the network is evaluated (section 4.2).

Every spacing returns rising integer timesteps in 1..T without duplicates, S of them unless a warning reports another
number. A sampler runs from the last to the first and then to clean data, always to the neighbouring entry of the list:
no step is computed from T // S.

| name                | timesteps                                                                                 |
|---------------------|-------------------------------------------------------------------------------------------|
| equal-angle         | equal steps of arccos sqrt(alpha_bar): equal rotations                                    |
| linear              | the paper's floor(c i), c = T / S                                                         |
| quadratic           | the paper's floor(c i^2), c = T / S^2; warns if zeros and duplicates had to be removed    |
| official-linear     | the authors' code: range(0, T, T // S), counted from 1 here                               |
| official-quadratic  | the authors' code: linspace(0, sqrt(0.8 T), S)^2 truncated, counted from 1 here           |
| leading, trailing,  | diffusers' timestep spacings, counted from 1 here                                         |
| linspace            |                                                                                           |
| log-snr             | equal steps of log(alpha_bar / (1 - alpha_bar))                                           |
| angle-log-snr       | equal steps of arccos sqrt(alpha_bar) + 0.15 log(noise / signal)                          |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ddim.errors import DdimError, warn
from ddim.names import Predicts
from ddim.process.schedule import Level, Schedule
from ddim.process.start import RATIO, start_time

DEFAULT = "equal-angle"
LOG_SHARE = 0.15
"""The weight of log(noise / signal) relative to the angle in `angle-log-snr`."""
LEAST = 0.01
"""The noise / signal that `angle-log-snr` treats as clean data."""


def tau(
    schedule: Schedule, name: str | Sequence[float], steps: int | None = None, top: int | None = None
) -> list[float]:
    """Section 4.2: the sub-sequence tau by the name of a spacing, or a user's rising list of timesteps, validated.

    Args:
        schedule: The schedule of the timesteps.
        name: One of `NAMED`, or a strictly rising list of timesteps in (0, T], integers or not.
        steps: S, the number of timesteps, 1..T; omit it with a list.
        top: The last timestep of a named spacing, at most T, instead of the formula's: the formula is evaluated with
            `top` in place of T, and if it ends below, the timesteps are stretched to end at `top`.

    Returns:
        Strictly rising timesteps in (0, T].

    Raises:
        DdimError: For an unknown name, S out of range, duplicates or timesteps out of range.

    Warns:
        DdimWarning: If the number of timesteps differs from S, or the last one is not T.
    """
    if not isinstance(name, str):
        times = check(schedule, name)
        if steps is not None and steps != len(times):
            raise DdimError(f"steps {steps}", f"do not match a grid of {len(times)} timesteps", "omit steps")
        label = "grid"
    else:
        if name not in NAMED:
            raise DdimError(f"grid {name!r}", "is unknown", f"choose one of {', '.join(NAMED)}")
        if not isinstance(steps, int | np.integer) or not 1 <= steps <= schedule.T:
            raise DdimError(f"steps {steps}", f"is not an integer in 1..{schedule.T}", "choose one in that range")
        if top is not None and not steps <= top <= schedule.T:
            raise DdimError(f"top {top}", f"is outside {steps}..{schedule.T}", "choose a timestep in that range")
        label = f"grid {name}"
        raw = NAMED[name](schedule, steps, top or schedule.T)
        raw = raw if top is None else _ending_at(raw, top)
        times = [float(t) for t in sorted(set(raw)) if t >= 1]
        if len(times) != steps:
            limit = top or schedule.T
            warn(f"{label}: {steps} steps requested, its formula gives {len(times)} distinct timesteps in 1..{limit}")
    if times[-1] != schedule.T and top is None:
        last = schedule.level(times[-1])
        warn(
            f"{label}: starts at t = {times[-1]:g}, not T = {schedule.T}; "
            f"pure noise replaces x at alpha_bar {last.alpha_bar:.2g}"
        )
    return times


def check(schedule: Schedule, times: Sequence[float]) -> list[float]:
    """Validate a list of timesteps: rising, without duplicates, in (0, T]. Returns it as floats.

    Raises:
        DdimError: With the first invalid entry as its subject.
    """
    checked = [float(t) for t in times]
    if not checked:
        raise DdimError("grid", "is empty", "pass at least one timestep")
    for i, t in enumerate(checked):
        if not 0 < t <= schedule.T:
            raise DdimError(f"grid entry {t:g}", f"is outside (0, {schedule.T}]", "use timesteps in 1..T")
        if i and t <= checked[i - 1]:
            problem = "is a duplicate" if t == checked[i - 1] else f"comes after {checked[i - 1]:g}"
            raise DdimError(f"grid entry {t:g}", problem, "list timesteps in rising order, each once")
    return checked


def _linear(schedule: Schedule, steps: int, top: int) -> list[int]:
    return [i * top // steps for i in range(1, steps + 1)]


def _quadratic(schedule: Schedule, steps: int, top: int) -> list[int]:
    return [i * i * top // steps**2 for i in range(1, steps + 1)]


def _official_linear(schedule: Schedule, steps: int, top: int) -> list[int]:
    return [t + 1 for t in range(0, top, top // steps)]


def _official_quadratic(schedule: Schedule, steps: int, top: int) -> list[int]:
    return [int(t) + 1 for t in np.linspace(0, np.sqrt(top * 0.8), steps) ** 2]


def _leading(schedule: Schedule, steps: int, top: int) -> list[int]:
    return [i * (top // steps) + 1 for i in range(steps)]


def _trailing(schedule: Schedule, steps: int, top: int) -> list[int]:
    return [int(t) for t in np.round(np.arange(top, 0, -top / steps))]


def _linspace(schedule: Schedule, steps: int, top: int) -> list[int]:
    return [int(t) + 1 for t in np.linspace(0, top - 1, steps).round()]


def _equal_angle(schedule: Schedule, steps: int, top: int) -> list[int]:
    last = schedule.level(top).angle
    return _whole([schedule.time_at_angle(last * i / steps) for i in range(1, steps)], top)


def _log_snr(schedule: Schedule, steps: int, top: int) -> list[int]:
    first = schedule.level(1).log_snr
    last = schedule.level(top).log_snr
    inner = steps - 1
    if math.isinf(last):  # zero terminal SNR: the step from T is infinitely long, so space evenly up to top - 1
        last, inner = schedule.level(top - 1).log_snr, steps - 2
    points = np.linspace(first, last, inner + 1)[: steps - 1] if steps > 1 else np.empty(0)
    return _whole([schedule.time_at_log_snr(float(value)) for value in points], top)


def _angle_log_snr(schedule: Schedule, steps: int, top: int) -> list[int]:
    times = np.arange(1, top + 1)
    angles = np.array([schedule.level(float(t)).angle for t in times])
    ratios = np.minimum(np.exp(-schedule.log_snr[:top] / 2), RATIO)  # above RATIO only the angle matters
    mark = angles + LOG_SHARE * np.log(ratios)
    clean = math.atan(LEAST) + LOG_SHARE * math.log(LEAST)  # does not depend on the schedule's level at t = 1
    points = np.linspace(clean, mark[-1], steps + 1)[1:-1]
    if clean >= mark[-1] or (steps > 1 and points[0] < mark[0]):  # t = 1 is noisier than the first point
        points = np.linspace(mark[0], mark[-1], steps)[:-1]
    return _whole([float(t) for t in np.interp(points, mark, times)], top)


def _ending_at(times: Sequence[int], top: int) -> list[int]:
    """The timesteps, stretched about t = 1 so that the last one is `top`."""
    last = max(times)
    return (
        [*times] if last == top else [top if t == last else round(1 + (t - 1) * (top - 1) / (last - 1)) for t in times]
    )


def _whole(times: Sequence[float], top: int) -> list[int]:
    """The timesteps rounded to distinct integers below `top`, followed by `top`."""
    rounded: list[int] = []
    for t in times:
        rounded.append(max(round(t), rounded[-1] + 1 if rounded else 1))
    for place in range(1, len(rounded) + 1):
        rounded[-place] = min(rounded[-place], top - place)
    return [*rounded, top]


NAMED: dict[str, Callable[[Schedule, int, int], list[int]]] = {
    "equal-angle": _equal_angle,
    "linear": _linear,
    "quadratic": _quadratic,
    "official-linear": _official_linear,
    "official-quadratic": _official_quadratic,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "log-snr": _log_snr,
    "angle-log-snr": _angle_log_snr,
}


def sampling_levels(
    schedule: Schedule,
    predicts: Predicts,
    grid: str | Sequence[float] = DEFAULT,
    steps: int | None = None,
    encode: bool = False,
    top: int | None = None,
    requested: bool = True,
) -> tuple[Level, ...]:
    """The levels of a sampling run, from the noisiest down to clean data.

    For a network that predicts eps, every named spacing starts where noise / signal is about 60: see
    `ddim.process.start`. If that is below T, a spacing that was requested warns. A list of timesteps is used unchanged.

    Args:
        schedule: The schedule.
        predicts: What the network predicts.
        grid: The name of a spacing (see `ddim.timesteps`) or a rising list of timesteps.
        steps: S, the number of timesteps; omit it with a list.
        encode: Return rising levels, from clean data to the noisiest.
        top: The noisiest timestep of a named spacing, for runs that start from a partly noised image.
        requested: Whether the user named the spacing; a default does not warn.

    Raises:
        DdimError: See `ddim.timesteps.tau`; or if `top` is given with a list of timesteps.

    Warns:
        DdimWarning: See `ddim.timesteps.tau`; or if sampling starts below T because the network predicts eps.
    """
    if top is not None and not isinstance(grid, str):
        raise DdimError(f"top {top}", "is given with a list of timesteps", "end the list there")
    if top is None and predicts == "eps" and isinstance(grid, str) and steps:
        top = max(start_time(schedule, predicts), min(steps, schedule.T))
        if top < schedule.T and requested:
            reason = f"this network predicts eps, and noise / signal is {schedule.level(top).ratio:.3g} there"
            warn(f"grid {grid}: starts at t = {top}, not T = {schedule.T}: {reason}")
    times = [0.0, *tau(schedule, grid, steps, top)]
    return schedule.levels(times if encode else times[::-1])
