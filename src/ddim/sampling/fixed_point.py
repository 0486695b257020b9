"""Inverting a one-step plan: each row is solved for its input state by a fixed-point iteration."""

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

RESIDUAL = 5e-6  # sum over all rows, root mean square per dimension
LIMIT = 40  # network evaluations per row
MEMORY = 3  # older points of Anderson's method


@dataclass(frozen=True, slots=True)
class InvertedRow:
    """The input state of a row of a plan.

    Args:
        index: The row's number k.
        row: The row.
        x: The state, float64, (N, ...).
        nfe: Number of network evaluations.
        residual: Root mean square per dimension of the row's output at x minus its target, float64, (N,).
    """

    index: int
    row: Row
    x: Tensor
    nfe: int
    residual: Tensor


def invert_rows(
    denoise: Denoiser,
    plan: Plan,
    end: Tensor,
    tolerance: float | None = None,
    limit: int = LIMIT,
    index: Tensor | None = None,
) -> Iterator[InvertedRow]:
    """Invert a one-step plan: from the last row to the first, find the state that the row maps to a given output.

    In terms of x and v = signal eps - noise x0, a row is y = J x + K v(x); for DDIM J = cos(delta) and K = sin(delta).
    The iteration x + (y - row(x)) / J, which treats v as constant, is accelerated by Anderson's method over its last
    four points, in float64 and separately for each sample. The initial v is extrapolated from the rows that are already
    solved, without a network evaluation.

    Args:
        denoise: The denoiser; called with float64 states of all N samples, including converged ones.
        plan: Without noise or clipping, of one state and one prediction, ending above t = 0.
        end: The final state of the plan, (N, ...).
        tolerance: The largest residual of a row; by default 5e-6 / S, about what float32 networks allow.
        limit: The largest number of network evaluations per row.
        index: The samples' numbers in error messages, int64, (N,).

    Yields:
        One `InvertedRow` per row, the last row first; x of the last one yielded is the start of the plan.

    Raises:
        DdimError: If the plan does not meet these conditions, or a sample does not converge within the limit.
    """
    _one_step(plan)
    tolerance = RESIDUAL / plan.nfe if tolerance is None else tolerance
    y, solved = end.double(), list[tuple[float, Tensor]]()
    for k, row in reversed([*enumerate(plan.rows)]):
        x, v, nfe, residual = _solve_row(denoise, row, y, _extrapolate_v(row, solved), tolerance, limit)
        failed = residual > tolerance
        if failed.any():
            numbers = torch.arange(len(y)) if index is None else index.cpu()
            names = sorted(set(numbers[failed.cpu()].tolist()))
            where = f"samples {', '.join(map(str, names))}: plan row {k} (t = {row.now.t:g} to {row.next.t:g})"
            problem = f"is not solved after {nfe} NFE: residual {float(residual.max()):.2g}, not {tolerance:.2g}"
            raise DdimError(where, problem, "use more steps, or method reversible")
        yield InvertedRow(k, row, x, nfe, residual)
        y, solved = x, [(row.query.angle, v), *solved[:1]]


def _one_step(plan: Plan) -> None:
    for k, row in enumerate(plan.rows):
        where = f"plan row {k} (t = {row.now.t:g} to {row.next.t:g})"
        if plan.clip_x0 or row.z or row.sigma or row.memory > 1:
            raise DdimError(where, "cannot be solved: it clips, adds noise or is multistep", "use plain DDIM, eta = 0")
        if row.next.variance == 0:
            problem = "cannot be solved: it keeps only the predicted x_0 of x"
            raise DdimError(where, problem, "use a plan that ends at t = 1")


def _in_x_and_v(row: Row) -> tuple[float, float]:
    """J and K of a one-step row, from x0 = signal x - noise v and eps = noise x + signal v."""
    x, x0, eps = (sum(weights) for weights in (row.x, row.x0, row.eps))
    level = row.query
    return x + x0 * level.signal + eps * level.noise, eps * level.signal - x0 * level.noise


def _extrapolate_v(row: Row, solved: list[tuple[float, Tensor]]) -> Tensor | None:
    """v at a row's level, extrapolated linearly in the angle from the last two solved rows."""
    if len(solved) < 2:
        return solved[0][1] if solved else None
    (near, v), (far, older) = solved
    return v + (v - older) * ((row.query.angle - near) / (near - far))


def _solve_row(
    denoise: Denoiser, row: Row, y: Tensor, v: Tensor | None, tolerance: float, limit: int
) -> tuple[Tensor, Tensor, int, Tensor]:
    """The state with the smallest residual, its v, the network evaluations, and the residual, (N,)."""
    j, k = _in_x_and_v(row)
    x = y / j if v is None else (y - k * v) / j
    plan = Plan("row", (row,))
    best = torch.full((len(y),), math.inf, dtype=torch.float64, device=y.device)
    solution, v, nfe = x, torch.zeros_like(x), 0
    residuals, points = list[Tensor](), list[Tensor]()
    while nfe < limit:
        nfe += 1
        [step] = trajectory(denoise, plan, x)
        f = y - step.x
        residual = f.flatten(1).square().mean(1).sqrt()
        better = (residual < best) & ~(best <= tolerance)
        choose = better.view(-1, *[1] * (y.ndim - 1))
        solution, v = (
            torch.where(choose, x, solution),
            torch.where(choose, v_from_pair(step.x0, step.eps, row.query), v),
        )
        best = torch.where(better, residual, best)
        live = ~(best <= tolerance)
        if not live.any():
            break
        residuals, points = [f.flatten(1), *residuals[:MEMORY]], [(x + f / j).flatten(1), *points[:MEMORY]]
        x = torch.where(live.view_as(choose), _anderson(residuals, points).view_as(x), solution)
    return solution, v, nfe, best


def _anderson(residuals: list[Tensor], points: list[Tensor]) -> Tensor:
    """Anderson (1965): the combination of the last points with the smallest residual, (N, d), for each sample."""
    if len(residuals) == 1:
        return points[0]
    steps, shifts = (torch.stack([*map(torch.sub, history, history[1:])], 2) for history in (residuals, points))
    gram, side = steps.mT @ steps, steps.mT @ residuals[0][:, :, None]
    size = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    ridge = 1e-14 * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights, _ = torch.linalg.solve_ex(gram / size + ridge, side / size)
    result: Tensor = points[0] - (shifts @ weights)[:, :, 0]
    return result
