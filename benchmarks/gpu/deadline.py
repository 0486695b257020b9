"""A time limit, and the list of what was skipped because of it."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

MARGIN = 1.15  # factor on predicted times
END = 4.0  # seconds reserved for the report and the end of the process
Result = TypeVar("Result")


class Deadline:
    """A time limit.

    Args:
        seconds: The limit in seconds.
        clock: Function that returns the time in seconds.
        started: Start on that clock; None for now.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic, started: float | None = None):
        self.seconds, self.clock = seconds, clock
        self.started = clock() if started is None else started
        self.left_out: list[str] = []
        self.failed: list[str] = []

    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def leave(self, what: str, why: str) -> None:
        """Record and print that something is skipped, and why."""
        self.left_out.append(f"{what}: {why}")
        print(f"       left out: {self.left_out[-1]}", flush=True)

    def fits(self, what: str, predicted: float) -> bool:
        """Whether so many seconds are left; if not, `what` is recorded as skipped."""
        left = self.seconds - END - self.spent()
        if predicted * MARGIN <= left:
            return True
        reason = f"would take about {predicted:.0f} s, {left:.0f} s are left"
        self.leave(what, reason if left > 0 else "the time is over")
        return False

    def attempt(self, what: str, predicted: float, job: Callable[[], Result]) -> Result | None:
        """The result of a job; None if it does not fit into the time or memory, or fails, which is recorded."""
        if not self.fits(what, predicted):
            return None
        try:
            return job()
        except torch.cuda.OutOfMemoryError:
            self.leave(what, "out of device memory")
        except Exception as error:  # a failed part must not end the run
            traceback.print_exc(file=sys.stderr)
            first = (str(error).splitlines() or [""])[0]
            self.failed.append(f"{what}: {type(error).__name__}: {first}")
            print(f"       FAILED: {self.failed[-1]}", flush=True)
        return None
