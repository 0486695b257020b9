"""The timestep at which sampling starts, and the default number of steps.

At low signal a predicted eps determines x_0 poorly: an error e in eps is an error e noise / signal in x_0, and
noise / signal at T ranges from 15 to 20,000 between schedules. For networks that predict eps, named spacings therefore
start where noise / signal is about `RATIO`, whatever fraction of T that is; docs/solvers.md has the measurements.
For networks that predict v or x_0 they start at T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ddim.process.schedule import Schedule

RATIO = 60.0
"""The noise / signal at which spacings start for networks that predict eps."""


def start_time(schedule: Schedule, predicts: str) -> int:
    """The integer timestep at which named spacings start.

    Args:
        schedule: The schedule.
        predicts: What the network predicts: "eps", "v" or "x0".

    Returns:
        For eps, the timestep whose log(noise / signal) is nearest to log(`RATIO`), which is T if noise / signal stays
        below `RATIO`. For v and x_0, T.
    """
    if predicts != "eps":
        return schedule.T
    return 1 + int(np.argmin(np.abs(schedule.log_snr / 2 + math.log(RATIO))))


def default_steps(steps: int, schedule: Schedule, predicts: str) -> int:
    """A default number of steps, bounded by the number of timesteps of the schedule up to `start_time`."""
    return min(steps, start_time(schedule, predicts))


def default_counts(counts: Sequence[int], schedule: Schedule) -> list[int]:
    """The default step counts of a table that are at most T, or [T] if there are none."""
    return [steps for steps in counts if steps <= schedule.T] or [schedule.T]
