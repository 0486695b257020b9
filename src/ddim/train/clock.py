"""Time budget of a run, with time reserved for the final work (saving, preview)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

UNMEASURED = 0.02  # fraction of the budget reserved until the duration of the final work has been measured
FADING = 0.9  # factor per step on the longest duration of a step
SAFETY_FACTOR = 1.5  # safety factor on the longest measured duration
MEASURE_BY = 0.2  # fraction of the training time after which a task of the final work must have been measured
EXIT_TIME = 2.0  # seconds reserved for the process to exit, and a tenth of its start; at most 5 % of the budget


class Clock:
    """Tracks the time used of a budget.

    Args:
        seconds: The budget; None for no limit, in which case `share` stays 0.
        started: Start time of this process's use of the budget, from `time.monotonic`; default: now.
        ending: Names of the tasks that make up the final work.

    Attributes:
        before: Seconds used by earlier processes.
        longest: The longest duration of each task so far, in seconds.
        step: The duration to reserve for a step that begins just before the end, in seconds: the longest of recent
            steps.
    """

    def __init__(self, seconds: float | None, started: float | None = None, ending: Sequence[str] = ("save",)):
        self.seconds, self.before, self.ending = seconds, 0.0, ending
        self.started = time.monotonic() if started is None else started
        self._exit = EXIT_TIME + 0.1 * (time.monotonic() - self.started)  # a loaded machine is slow in both
        self.longest: dict[str, float] = {}
        self.step, self._last = 0.0, math.nan

    @property
    def used(self) -> float:
        """Seconds used by this process and the earlier ones."""
        return self.before + time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds left of the budget; None without one."""
        return None if self.seconds is None else max(self.seconds - self.used, 0.0)

    @contextlib.contextmanager
    def timed(self, task: str) -> Iterator[None]:
        """Measure the duration of a task that is also part of the final work."""
        start = time.monotonic()
        yield
        now = time.monotonic()
        self.longest[task] = max(self.longest.get(task, 0.0), now - start)
        self._last += now - start

    def after_step(self) -> float:
        """The share after a step, whose duration is measured from the previous call."""
        now = time.monotonic()
        if not math.isnan(self._last):
            self.step = max(FADING * self.step, now - self._last)
        self._last = now
        return self.share

    def unmeasured(self, task: str) -> bool:
        """Whether it is time to measure a task of the final work that has not been measured."""
        return task in self.ending and task not in self.longest and self.share >= MEASURE_BY

    @property
    def share(self) -> float:
        """Fraction of the training time used: 0 at the start, 1 when the final work must start."""
        if self.seconds is None:
            return 0.0
        reserved = SAFETY_FACTOR * sum(self.longest.values()) + min(self._exit, 0.05 * self.seconds) + self.step
        if not self.longest.keys() >= {*self.ending}:
            reserved += UNMEASURED * self.seconds
        return min(self.used / max(self.seconds - reserved, 1e-9), 1.0)
