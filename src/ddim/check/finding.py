"""The result of one check: a measured value and its limit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Args:
        name: What was measured.
        measured: The number, or a short text.
        limit: The limit, such as "<= 1e-09" or "0.85..1.15"; empty for information only.
        passed: Whether `measured` is within the limit; True without a limit.
        note: One line: what the value means, or where it was measured.
    """

    name: str
    measured: float | str
    limit: str
    passed: bool
    note: str = ""

    @property
    def result(self) -> str:
        """ "pass", "FAIL" or "info"."""
        return "FAIL" if not self.passed else "pass" if self.limit else "info"

    @property
    def value(self) -> str:
        """The measured value as text."""
        return self.measured if isinstance(self.measured, str) else f"{self.measured:.3g}"

    def __str__(self) -> str:
        limit = f" ({self.limit})" if self.limit else ""
        return f"{self.result}  {self.name}: {self.value}{limit}" + (f"; {self.note}" if self.note else "")


def info(name: str, measured: float | str, note: str = "") -> Finding:
    """A finding for information only."""
    return Finding(name, measured, "", True, note)


def skipped(name: str, why: str) -> Finding:
    """A check that does not apply."""
    return Finding(name, "skipped", "", True, why)


def at_most(name: str, measured: float, limit: float, note: str = "") -> Finding:
    """A number that must not exceed a limit; nan fails."""
    return Finding(name, measured, f"<= {limit:.3g}", measured <= limit, note)


def between(name: str, measured: float, low: float, high: float, note: str = "") -> Finding:
    """A number that must lie in an interval."""
    return Finding(name, measured, f"{low:.3g}..{high:.3g}", low <= measured <= high, note)


def largest(values: Iterable[float]) -> float:
    """The largest of numbers >= 0; nan if one is nan, 0 if there are none."""
    numbers = list(values)
    return math.nan if any(math.isnan(value) for value in numbers) else max(numbers, default=0.0)
