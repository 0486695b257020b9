"""Time that is left, and what it did not suffice for."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

MARGIN = 1.15  # what a prediction is multiplied with
END = 4.0  # seconds kept for the report, and for the process to end
Made = TypeVar("Made")


class Deadline:
    """A number of seconds to keep to.

    Args:
        seconds: How many.
        clock: What tells the time, in seconds.
        begun: When they began on that clock; now if left out.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic, begun: float | None = None):
        self.seconds, self.clock = seconds, clock
        self.begun = clock() if begun is None else begun
        self.left_out: list[str] = []
        self.failed: list[str] = []

    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.begun

    def leave(self, what: str, why: str) -> None:
        """Say that something is left out, and why."""
        self.left_out.append(f"{what}: {why}")
        print(f"       left out: {self.left_out[-1]}", flush=True)

    def fits(self, what: str, predicted: float) -> bool:
        """Whether so many seconds are left; if not, `what` is left out."""
        left = self.seconds - END - self.spent()
        if predicted * MARGIN <= left:
            return True
        short = f"would take about {predicted:.0f} s, {left:.0f} s are left"
        self.leave(what, short if left > 0 else "the time is over")
        return False

    def attempt(self, what: str, predicted: float, job: Callable[[], Made]) -> Made | None:
        """What a job returns; None if it does not fit into the time or the memory, or fails, which is kept."""
        if not self.fits(what, predicted):
            return None
        try:
            return job()
        except torch.cuda.OutOfMemoryError:
            self.leave(what, "the device's memory does not hold it")
        except Exception as error:  # the rest of the run must not be lost with one part
            traceback.print_exc(file=sys.stderr)
            first = (str(error).splitlines() or [""])[0]
            self.failed.append(f"{what}: {type(error).__name__}: {first}")
            print(f"       FAILED: {self.failed[-1]}", flush=True)
        return None
