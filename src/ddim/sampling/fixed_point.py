"""Going back over a one-step plan by solving each of its rows for the state it started from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.parameterization import Denoiser, v_from_pair
from ddim.sampling.loop import trajectory

RESIDUAL = 5e-6  # of all rows together, root mean square per dimension
LIMIT = 40
MEMORY = 3


@dataclass(frozen=True, slots=True)
class InvertedRow:
    """The state that a row of a plan started from.

    Args:
        index: The row's number k.
        row: The row.
        x: The state, float64, (N, ...).
        calls: How many network calls it took.
        residual: Root mean square per dimension of what the row makes of x minus what it should, float64, (N,).
    """

    index: int
    row: Row
    x: Tensor
    calls: int
    residual: Tensor


def invert_rows(
    denoise: Denoiser,
    plan: Plan,
    end: Tensor,
    tolerance: float | None = None,
    limit: int = LIMIT,
    index: Tensor | None = None,
) -> Iterator[InvertedRow]:
    """Go back over a one-step plan: find, row by row from the last, the state that the row carries to the known one.

    Written with x and v = signal eps - noise x0, a row is y = J x + K v(x), for DDIM J = cos(delta) and
    K = sin(delta). The iteration x + (y - row(x)) / J, which keeps v, is sped up by Anderson's method over its last
    four points, in float64 and for each sample by itself. It starts from v as the rows before suggest it, at no call.

    Args:
        denoise: The denoiser; called with float64 states of all N samples, those that have converged included.
        plan: Without noise or clipping, of one state and one prediction, ending above t = 0.
        end: What the plan is to end with, (N, ...).
        tolerance: The largest residual of a row; 5e-6 / S if left out, about what float32 networks allow.
        limit: The most calls for one row.
        index: What to call each sample in messages, int64, (N,).

    Yields:
        One `InvertedRow` per row, the last row first; the last one's x is the start of the plan.

    Raises:
        DdimError: If the plan is not such a one, or a sample has not converged within the limit.
    """
    _one_step(plan)
    tolerance = RESIDUAL / plan.calls if tolerance is None else tolerance
    y, seen = end.double(), list[tuple[float, Tensor]]()
    for k, row in reversed([*enumerate(plan.rows)]):
        x, v, calls, residual = _solve_row(denoise, row, y, _v_ahead(row, seen), tolerance, limit)
        missed = residual > tolerance
        if missed.any():
            numbers = torch.arange(len(y)) if index is None else index.cpu()
            names = sorted(set(numbers[missed.cpu()].tolist()))
            where = f"samples {', '.join(map(str, names))}: plan row {k} (t = {row.now.t:g} to {row.next.t:g})"
            wrong = f"is not solved after {calls} calls: residual {float(residual.max()):.2g}, not {tolerance:.2g}"
            raise DdimError(where, wrong, "use more steps, or method reversible")
        yield InvertedRow(k, row, x, calls, residual)
        y, seen = x, [(row.query.angle, v), *seen[:1]]


def _one_step(plan: Plan) -> None:
    for k, row in enumerate(plan.rows):
        where = f"plan row {k} (t = {row.now.t:g} to {row.next.t:g})"
        if plan.clip_x0 or row.z or row.sigma or row.memory > 1:
            raise DdimError(where, "cannot be solved: it clips, adds noise or looks back", "use plain DDIM, eta = 0")
        if row.next.variance == 0:
            wrong = "cannot be solved: it keeps nothing of x but the predicted x_0"
            raise DdimError(where, wrong, "let the plan end at t = 1")


def _in_x_and_v(row: Row) -> tuple[float, float]:
    """J and K of a one-step row, from x0 = signal x - noise v and eps = noise x + signal v."""
    x, x0, eps = (sum(weights) for weights in (row.x, row.x0, row.eps))
    level = row.query
    return x + x0 * level.signal + eps * level.noise, eps * level.signal - x0 * level.noise


def _v_ahead(row: Row, seen: list[tuple[float, Tensor]]) -> Tensor | None:
    """v at a row's level on the straight line through the two before it, in the angle."""
    if len(seen) < 2:
        return seen[0][1] if seen else None
    (near, v), (far, older) = seen
    return v + (v - older) * ((row.query.angle - near) / (near - far))


def _solve_row(
    denoise: Denoiser, row: Row, y: Tensor, v: Tensor | None, tolerance: float, limit: int
) -> tuple[Tensor, Tensor, int, Tensor]:
    """The best state found, v there, the calls made, and the residual, (N,)."""
    j, k = _in_x_and_v(row)
    x = y / j if v is None else (y - k * v) / j
    plan = Plan("row", (row,))
    best = torch.full((len(y),), math.inf, dtype=torch.float64, device=y.device)
    kept, v, calls = x, torch.zeros_like(x), 0
    missed, moved = list[Tensor](), list[Tensor]()
    while calls < limit:
        calls += 1
        [step] = trajectory(denoise, plan, x)
        f = y - step.x
        residual = f.flatten(1).square().mean(1).sqrt()
        better = (residual < best) & ~(best <= tolerance)
        choose = better.view(-1, *[1] * (y.ndim - 1))
        kept, v = torch.where(choose, x, kept), torch.where(choose, v_from_pair(step.x0, step.eps, row.query), v)
        best = torch.where(better, residual, best)
        live = ~(best <= tolerance)
        if not live.any():
            break
        missed, moved = [f.flatten(1), *missed[:MEMORY]], [(x + f / j).flatten(1), *moved[:MEMORY]]
        x = torch.where(live.view_as(choose), _anderson(missed, moved).view_as(x), kept)
    return kept, v, calls, best


def _anderson(missed: list[Tensor], moved: list[Tensor]) -> Tensor:
    """Anderson (1965): of the last points, the combination whose misses, (N, d), are least; each sample by itself."""
    if len(missed) == 1:
        return moved[0]
    steps, ways = (torch.stack([*map(torch.sub, every, every[1:])], 2) for every in (missed, moved))
    gram, side = steps.mT @ steps, steps.mT @ missed[0][:, :, None]
    size = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    ridge = 1e-14 * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights, _ = torch.linalg.solve_ex(gram / size + ridge, side / size)
    result: Tensor = moved[0] - (ways @ weights)[:, :, 0]
    return result
