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
        first: The index of the first plan's row, or None if only the second has one.
        second: The index of the second plan's row, or None if only the first has one.
        x0: The difference of the weights of x_0, first minus second.
        eps: The difference of the weights of eps, first minus second.
        z: The difference of the weights of the fresh noise, first minus second.
    """

    first: int | None
    second: int | None
    x0: float = math.nan
    eps: float = math.nan
    z: float = math.nan


def differences(first: Plan, second: Plan) -> list[Difference]:
    """The rows in which two plans differ, in the order they are run.

    Args:
        first: A plan whose rows have one x_0, one eps and fresh noise, such as those of `ddim.emulate` and
            `samplers.ddim`.
        second: Another such plan. If both evaluate the network at the same timesteps, rows at the same timestep are
            compared; otherwise rows at the same index.

    Returns:
        One entry for each pair whose levels or weights differ, and for each row without a counterpart.
    """
    differing = []
    for i, k in _pairs(first.rows, second.rows):
        if i is None or k is None:
            differing.append(Difference(i, k))
            continue
        row, other = first.rows[i], second.rows[k]
        delta = [a - b for a, b in zip(_weights(row), _weights(other), strict=True)]
        same = row.now == other.now and row.next == other.next
        if not same or max(abs(value) for value in delta) > TOLERANCE * other.size:
            differing.append(Difference(i, k, *delta))
    return differing


def clipping(first: Plan, second: Plan) -> str:
    """A description of how clipping differs between two plans; "" if it does not."""
    a, b = _clips(first), _clips(second)
    return f"{first.sampler} {a}, {second.sampler} {b}" if a != b else ""


def _clips(plan: Plan) -> str:
    if not plan.clip_x0:
        return "does not clip x0"
    return "clips x0 and " + ("leaves eps as predicted" if plan.eps_kept else "recomputes eps")


def _weights(row: Row) -> tuple[float, float, float]:
    return sum(row.x0), sum(row.eps), row.z


def _pairs(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[int | None, int | None]]:
    """The pairs of row indices to compare; of several rows at one timestep, the last one is compared."""
    if {row.now.t for row in first} != {row.now.t for row in second}:
        return [*itertools.zip_longest(range(len(first)), range(len(second)))]
    last = {row.now.t: i for i, row in enumerate(first)}
    at = {row.now.t: k for k, row in enumerate(second)}
    return [(i, at[row.now.t] if last[row.now.t] == i else None) for i, row in enumerate(first)]
