"""Row-by-row comparison of two plans."""

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
        theirs: The index of the first plan's row, or None if only the second has one.
        ours: The index of the second plan's row, or None if only the first has one.
        x0: The difference of the weights of x_0, theirs minus ours.
        eps: The difference of the weights of eps, theirs minus ours.
        z: The difference of the weights of the fresh noise, theirs minus ours.
    """

    theirs: int | None
    ours: int | None
    x0: float = math.nan
    eps: float = math.nan
    z: float = math.nan


def differences(theirs: Plan, ours: Plan) -> list[Difference]:
    """The rows in which two plans differ, in the order they are run.

    Args:
        theirs: A plan whose rows have one x_0, one eps and fresh noise, such as those of `ddim.emulate` and
            `samplers.ddim`.
        ours: Another such plan. If both evaluate the network at the same timesteps, rows at the same timestep are
            compared; otherwise rows at the same index.

    Returns:
        One entry for each pair whose levels or weights differ, and for each row without a counterpart.
    """
    result = []
    for i, k in _pairs(theirs.rows, ours.rows):
        if i is None or k is None:
            result.append(Difference(i, k))
            continue
        mine, other = ours.rows[k], theirs.rows[i]
        off = [a - b for a, b in zip(_weights(other), _weights(mine), strict=True)]
        same = mine.now == other.now and mine.next == other.next
        if not same or max(abs(value) for value in off) > TOLERANCE * mine.size:
            result.append(Difference(i, k, *off))
    return result


def clipping(theirs: Plan, ours: Plan) -> str:
    """A description of how clipping differs between two plans; "" if it does not."""
    first, second = _clips(theirs), _clips(ours)
    return f"{theirs.sampler} {first}, {ours.sampler} {second}" if first != second else ""


def _clips(plan: Plan) -> str:
    if not plan.clip_x0:
        return "does not clip x0"
    return "clips x0 and " + ("leaves eps as predicted" if plan.eps_kept else "derives eps again")


def _weights(row: Row) -> tuple[float, float, float]:
    return sum(row.x0), sum(row.eps), row.z


def _pairs(theirs: Sequence[Row], ours: Sequence[Row]) -> list[tuple[int | None, int | None]]:
    """The pairs of row indices to compare; of several rows at one timestep, the last one is compared."""
    if {row.now.t for row in theirs} != {row.now.t for row in ours}:
        return [*itertools.zip_longest(range(len(theirs)), range(len(ours)))]
    last = {row.now.t: i for i, row in enumerate(theirs)}
    at = {row.now.t: k for k, row in enumerate(ours)}
    return [(i, at[row.now.t] if last[row.now.t] == i else None) for i, row in enumerate(theirs)]
