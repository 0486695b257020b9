"""Two plans compared, row by row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ddim.plan.plan import TOLERANCE, Plan
from ddim.plan.row import Row


@dataclass(frozen=True, slots=True)
class Difference:
    """Two rows that differ.

    Args:
        theirs: The number of the first plan's row, or None where only the other has one.
        ours: The number of the other plan's row, or None where only the first has one.
        x0: The weight of x_0, theirs less ours.
        eps: That of eps.
        z: That of the fresh noise.
    """

    theirs: int | None
    ours: int | None
    x0: float = math.nan
    eps: float = math.nan
    z: float = math.nan


def differences(theirs: Plan, ours: Plan) -> list[Difference]:
    """The rows in which two plans differ, in the order they are run.

    Args:
        theirs: A plan of one x_0, one eps and fresh noise a row, as those of `ddim.emulate` and `samplers.ddim` are.
        ours: Another one. If both call the network at the same times, the rows of one time are compared; else the first
            row with the first, and so on.

    Returns:
        One entry for each pair whose levels or weights differ, and for each row that has no counterpart.
    """
    found = []
    for i, k in _pairs(theirs.rows, ours.rows):
        if i is None or k is None:
            found.append(Difference(i, k))
            continue
        mine, other = ours.rows[k], theirs.rows[i]
        off = [a - b for a, b in zip(_weights(other), _weights(mine), strict=True)]
        same = mine.now == other.now and mine.next == other.next
        if not same or max(abs(value) for value in off) > TOLERANCE * mine.size:
            found.append(Difference(i, k, *off))
    return found


def clipping(theirs: Plan, ours: Plan) -> str:
    """How clipping differs, in words; "" where it does not."""
    told, other = _clips(theirs), _clips(ours)
    return f"{theirs.sampler} {told}, {ours.sampler} {other}" if told != other else ""


def _clips(made: Plan) -> str:
    if not made.clip_x0:
        return "does not clip x0"
    return "clips x0 and " + ("leaves eps as predicted" if made.eps_kept else "derives eps again")


def _weights(row: Row) -> tuple[float, float, float]:
    return sum(row.x0), sum(row.eps), row.z


def _pairs(theirs: Sequence[Row], ours: Sequence[Row]) -> list[tuple[int | None, int | None]]:
    """Which row is compared with which; of rows at one time the last one counts, which goes on from there."""
    if {row.now.t for row in theirs} != {row.now.t for row in ours}:
        return [*itertools.zip_longest(range(len(theirs)), range(len(ours)))]
    last = {row.now.t: i for i, row in enumerate(theirs)}
    at = {row.now.t: k for k, row in enumerate(ours)}
    return [(i, at[row.now.t] if last[row.now.t] == i else None) for i, row in enumerate(theirs)]
