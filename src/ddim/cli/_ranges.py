"""Numbers of options, whose fixed range is checked while the command line is parsed, before torch is imported."""

from __future__ import annotations

import math
from typing import Any

import click

from ddim._io import limits
from ddim.errors import DdimError

SHOWN = 10_000


class Whole(click.IntRange):
    """A whole number in a range.

    Args:
        least: The smallest value.
        most: The largest value; None for any.
    """

    name = "integer"

    def __init__(self, least: int = 0, most: int | None = None):
        super().__init__(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a DdimError if it is outside the range."""
        number = click.INT.convert(value, param, ctx)
        _check(self, number, param)
        return int(number)

    def _describe_range(self) -> str:
        return _described(self)


class Real(click.FloatRange):
    """A finite number in a range.

    Args:
        least: The smallest value; None for any.
        most: The largest value; None for any.
        above: Whether the smallest value is excluded.
    """

    name = "number"

    def __init__(self, least: float | None = None, most: float | None = None, above: bool = False):
        super().__init__(least, most, min_open=above)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a DdimError if it is outside the range."""
        number = click.FLOAT.convert(value, param, ctx)
        _check(self, number, param)
        return float(number)

    def _describe_range(self) -> str:
        return _described(self)


def _described(kind: Whole | Real) -> str:
    """The range in a help text; without bounds that only guard against typing errors."""
    least = "" if kind.min is None or (kind.min in (0, 1) and isinstance(kind, Whole)) else f"{kind.min}"
    if kind.max is not None and kind.max <= SHOWN:
        return f"above {kind.min}, up to {kind.max}" if kind.min_open else f"{kind.min}..{kind.max}"
    return f"above {least}" if kind.min_open else f"{least} or more" if least else ""


def _check(kind: Whole | Real, number: float, param: click.Parameter | None) -> None:
    name = param.opts[0] if param is not None else "value"
    if not math.isfinite(number):
        raise DdimError(f"{name} {number}", "is not a finite number", "use a number such as 1")
    if kind.min is not None and (number < kind.min or (kind.min_open and number == kind.min)):
        less, more = ("not more than", "more than ") if kind.min_open else ("less than", "")
        hint = f"use {more}{kind.min}" + ("" if kind.min_open else " or more")
        raise DdimError(f"{name} {number}", f"is {less} {kind.min}", hint)
    if kind.max is not None and number > kind.max:
        raise DdimError(f"{name} {number}", f"is more than {kind.max}", f"use {kind.max} or less")


COUNT = Whole(1, limits.COUNT)
TIMES = Whole(1, limits.TIMES)
BATCH = Whole(1, limits.BATCH)
MICRO_BATCH = Whole(1, limits.MICRO_BATCH)
SEED = Whole(0, 2**64 - 1)
INDEX = Whole(0, limits.INDEX - 1)
POSITIVE = Real(0, above=True)
