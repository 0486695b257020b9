"""The time that a run may take, of which some is kept for what has to be done at its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

UNKNOWN = 0.02  # of the budget, kept until it is known how long the work at the end takes
SPARE = 1.5  # times the longest that it has taken
END = 2.0  # seconds in which a process comes to its end; of a short budget at most 5 %


class Clock:
    """A clock against a budget. Without one, nothing is ever used.

    Args:
        seconds: The budget, or None.
        began: When this process began to use it, by `time.monotonic`; now if left out.
        ending: The pieces of work that the end consists of.

    Attributes:
        before: Seconds that earlier processes used.
        longest: The most seconds that each piece of the work at the end has taken.
    """

    def __init__(self, seconds: float | None, began: float | None = None, ending: Sequence[str] = ("save",)):
        self.seconds, self.before, self.ending = seconds, 0.0, ending
        self.began = time.monotonic() if began is None else began
        self.longest: dict[str, float] = {}

    @property
    def used(self) -> float:
        """Seconds used, by this process and those before it."""
        return self.before + time.monotonic() - self.began

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Note how long a piece of the work takes that will be done at the end too."""
        begun = time.monotonic()
        yield
        self.longest[what] = max(self.longest.get(what, 0.0), time.monotonic() - begun)

    @property
    def share(self) -> float:
        """What of the time for training is used, 0 at the start and 1 when the end's work must begin."""
        if self.seconds is None:
            return 0.0
        kept = SPARE * sum(self.longest.values()) + min(END, 0.05 * self.seconds)
        if not self.longest.keys() >= {*self.ending}:
            kept += UNKNOWN * self.seconds
        return min(self.used / max(self.seconds - kept, 1e-9), 1.0)
