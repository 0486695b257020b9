"""Grids: the sub-sequences tau of 1..T at which the network is called (section 4.2).

Every grid returns S whole, rising times in 1..T without duplicates. A sampler goes from the last to the first and
then to clean data, always to the next entry of its own grid: no step is computed from T // S.

| name                | times                                                                                     |
|---------------------|-------------------------------------------------------------------------------------------|
| equal-angle         | equal steps of arccos sqrt(alpha_bar): equal rotations                                    |
| linear              | the paper's floor(c i), c = T / S                                                         |
| quadratic           | the paper's floor(c i^2), c = T / S^2; entries at 0 and duplicates are left out, and said |
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
"""The weight of log(noise / signal) beside the angle in `angle-log-snr`."""
LEAST = 0.01
"""Noise / signal that counts as clean data there."""


def tau(
    schedule: Schedule, name: str | Sequence[float], steps: int | None = None, top: int | None = None
) -> list[float]:
    """Section 4.2: the sub-sequence tau by name, or a user's own rising list of times, checked.

    Args:
        schedule: Whose times.
        name: One of `NAMED`, or a strictly rising list of times in (0, T], whole or not.
        steps: S, the number of network calls wanted, 1..T; left out with a list.
        top: The last time of a named grid, at most T, instead of the formula's own: the formula is used with it in the
            place of T, and where that ends below it, the times are stretched to end there.

    Returns:
        Strictly rising times in (0, T].

    Raises:
        DdimError: For an unknown name, S out of range, duplicates or times out of range.

    Warns:
        DdimWarning: If the grid has another length than asked, or does not end at T, where the noise starts.
    """
    if not isinstance(name, str):
        times = check(schedule, name)
        if steps is not None and steps != len(times):
            raise DdimError(f"steps {steps}", f"are asked of a grid of {len(times)} times", "leave steps out")
        label = "the grid given"
    else:
        if name not in NAMED:
            raise DdimError(f"grid {name!r}", "is unknown", f"choose one of {', '.join(NAMED)}")
        if not isinstance(steps, int | np.integer) or not 1 <= steps <= schedule.T:
            raise DdimError(f"steps {steps}", f"is not a whole number in 1..{schedule.T}", "choose one in that range")
        if top is not None and not steps <= top <= schedule.T:
            raise DdimError(f"top {top}", f"is outside {steps}..{schedule.T}", "choose a time of the schedule")
        label = f"grid {name}"
        raw = NAMED[name](schedule, steps, top or schedule.T)
        raw = raw if top is None else _ending_at(raw, top)
        times = [float(t) for t in sorted(set(raw)) if t >= 1]
        if len(times) != steps:
            warn(
                f"{label}: {steps} steps asked, its formula gives {len(times)} distinct times in 1..{top or schedule.T}"
            )
    if times[-1] != schedule.T and top is None:
        last = schedule.level(times[-1])
        warn(
            f"{label}: starts at t = {times[-1]:g}, not T = {schedule.T}; "
            f"pure noise stands in for x at alpha_bar {last.alpha_bar:.2g}"
        )
    return times


def check(schedule: Schedule, times: Sequence[float]) -> list[float]:
    """The list, if it is a legal grid: rising, without duplicates, in (0, T].

    Raises:
        DdimError: Naming the first entry that breaks a rule.
    """
    checked = [float(t) for t in times]
    if not checked:
        raise DdimError("grid", "is empty", "give at least one time")
    for i, t in enumerate(checked):
        if not 0 < t <= schedule.T:
            raise DdimError(f"grid entry {t:g}", f"is outside (0, {schedule.T}]", "use times of the schedule, 1..T")
        if i and t <= checked[i - 1]:
            wrong = "is a duplicate" if t == checked[i - 1] else f"comes after {checked[i - 1]:g}"
            raise DdimError(f"grid entry {t:g}", wrong, "list times in rising order, each once")
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
    if math.isinf(last):  # zero terminal SNR: T itself is a step of infinite length
        last, inner = schedule.level(top - 1).log_snr, steps - 2
    points = np.linspace(first, last, inner + 1)[: steps - 1] if steps > 1 else np.empty(0)
    return _whole([schedule.time_at_log_snr(float(value)) for value in points], top)


def _angle_log_snr(schedule: Schedule, steps: int, top: int) -> list[int]:
    times = np.arange(1, top + 1)
    angles = np.array([schedule.level(float(t)).angle for t in times])
    ratios = np.minimum(np.exp(-schedule.log_snr[:top] / 2), RATIO)  # further up the angle alone counts
    mark = angles + LOG_SHARE * np.log(ratios)
    clean = math.atan(LEAST) + LOG_SHARE * math.log(LEAST)  # the same on every schedule, whatever t = 1 is
    points = np.linspace(clean, mark[-1], steps + 1)[1:-1]
    if clean >= mark[-1] or (steps > 1 and points[0] < mark[0]):  # t = 1 is noisier than the first of these
        points = np.linspace(mark[0], mark[-1], steps)[:-1]
    return _whole([float(t) for t in np.interp(points, mark, times)], top)


def _ending_at(times: Sequence[int], top: int) -> list[int]:
    """The times, stretched about t = 1 so that the last one is `top`."""
    last = max(times)
    return (
        [*times] if last == top else [top if t == last else round(1 + (t - 1) * (top - 1) / (last - 1)) for t in times]
    )


def _whole(times: Sequence[float], top: int) -> list[int]:
    """The nearest whole times below `top`, pushed apart where two would meet, and `top` itself."""
    whole: list[int] = []
    for t in times:
        whole.append(max(round(t), whole[-1] + 1 if whole else 1))
    for place in range(1, len(whole) + 1):
        whole[-place] = min(whole[-place], top - place)
    return [*whole, top]


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
) -> tuple[Level, ...]:
    """The grid's levels from the noisiest down, then clean data.

    For a network that predicts eps, every named grid ends where noise / signal is about 60, which is warned about where
    that is below T: see `ddim.process.start`. A list of times is taken as it is.

    Args:
        schedule: The schedule.
        predicts: What the network predicts.
        grid: A grid's name (see `ddim.timesteps`) or a rising list of times.
        steps: S, the number of network evaluations; left out with a list.
        encode: Rising instead, from clean data to the noisiest.
        top: The noisiest time of a named grid, where a run starts from an image partly noised.

    Raises:
        DdimError: See `ddim.timesteps.tau`; or if top is given beside a list of times.

    Warns:
        DdimWarning: As `ddim.timesteps.tau`, or if the grid ends below T because the network predicts eps.
    """
    if top is not None and not isinstance(grid, str):
        raise DdimError(f"top {top}", "is given beside a list of times", "let the list end there")
    if top is None and predicts == "eps" and isinstance(grid, str) and steps:
        top = max(start_time(schedule, predicts), min(steps, schedule.T))
        if top < schedule.T:
            why = f"this network predicts eps, and noise / signal is {schedule.level(top).ratio:.3g} there"
            warn(f"grid {grid}: starts at t = {top}, not T = {schedule.T}: {why}")
    times = [0.0, *tau(schedule, grid, steps, top)]
    return schedule.levels(times if encode else times[::-1])
