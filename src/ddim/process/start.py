"""Where sampling starts, and how many steps it takes where nobody says.

A network that predicts eps says next to nothing about x_0 where there is hardly any signal: an error e in eps is an
error e noise / signal in x_0, and noise / signal at T is 15 on one schedule and 20,000 on another. So its named
spacings start where noise / signal is about `RATIO`, whatever share of T that is; docs/solvers.md has the measurements.
Networks that predict v or x_0 start at T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ddim.process.schedule import Schedule

RATIO = 60.0
"""Noise / signal at which the spacings of a network that predicts eps start."""


def start_time(schedule: Schedule, predicts: str) -> int:
    """The whole time at which named spacings start.

    Args:
        schedule: The schedule.
        predicts: What the network predicts: "eps", "v" or "x0".

    Returns:
        For eps, the time whose log(noise / signal) is nearest to that of `RATIO`: T where there is less noise at T.
        For v and x_0, T.
    """
    if predicts != "eps":
        return schedule.T
    return 1 + int(np.argmin(np.abs(schedule.log_snr / 2 + math.log(RATIO))))


def default_steps(steps: int, schedule: Schedule, predicts: str) -> int:
    """A default number of steps, bounded by the number of times that the schedule has up to `start_time`."""
    return min(steps, start_time(schedule, predicts))


def default_counts(counts: Sequence[int], schedule: Schedule) -> list[int]:
    """Those of a table's default numbers of steps that are at most T; T alone where none is."""
    return [steps for steps in counts if steps <= schedule.T] or [schedule.T]
