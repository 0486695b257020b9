"""Time budget of a run, with time reserved for the final work (saving, preview)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

UNMEASURED = 0.02  # fraction of the budget reserved until the duration of the final work has been measured
SAFETY_FACTOR = 1.5  # safety factor on the longest measured duration
EXIT_TIME = 2.0  # seconds reserved for the process to exit; at most 5 % of the budget


class Clock:
    """Tracks the time used of a budget.

    Args:
        seconds: The budget; None for no limit, in which case `share` stays 0.
        started: Start time of this process's use of the budget, from `time.monotonic`; default: now.
        ending: Names of the tasks that make up the final work.

    Attributes:
        before: Seconds used by earlier processes.
        longest: The longest duration of each task so far, in seconds.
    """

    def __init__(self, seconds: float | None, started: float | None = None, ending: Sequence[str] = ("save",)):
        self.seconds, self.before, self.ending = seconds, 0.0, ending
        self.started = time.monotonic() if started is None else started
        self.longest: dict[str, float] = {}

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
        self.longest[task] = max(self.longest.get(task, 0.0), time.monotonic() - start)

    @property
    def share(self) -> float:
        """Fraction of the training time used: 0 at the start, 1 when the final work must start."""
        if self.seconds is None:
            return 0.0
        reserved = SAFETY_FACTOR * sum(self.longest.values()) + min(EXIT_TIME, 0.05 * self.seconds)
        if not self.longest.keys() >= {*self.ending}:
            reserved += UNMEASURED * self.seconds
        return min(self.used / max(self.seconds - reserved, 1e-9), 1.0)
