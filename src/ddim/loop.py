"""The one loop over time: it runs a plan and yields every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.denoiser import Denoiser, Prediction, as_planned
from ddim.plan import Plan, Row
from ddim.seeds import Noise


@dataclass(frozen=True, slots=True)
class Step:
    """What one row of a plan did.

    Args:
        index: The row's number k.
        row: The row.
        x: The state after the row, (N, ...).
        x0: The x_0 predicted in this row, (N, ...).
        eps: The noise predicted in this row, (N, ...).
    """

    index: int
    row: Row
    x: Tensor
    x0: Tensor
    eps: Tensor


def trajectory(
    denoise: Denoiser,
    plan: Plan,
    start: Tensor | Noise,
    noise: Noise | None = None,
    earlier: Sequence[Tensor] = (),
) -> Iterator[Step]:
    """Run a plan, one network call per row, and yield each step.

    Progress, traces, early stop and streaming are the caller's: iterate, or take the last step's `x`.

    Args:
        denoise: The denoiser.
        plan: What to run.
        start: The first state (N, ...), or a `Noise` that draws it and every row's noise.
        noise: The rows' noise, where `start` is a tensor and the plan is stochastic.
        earlier: States older than the start, one for each level of `plan.before`.

    Yields:
        One `Step` per row; the last one's `x` is the result. Of a plan with a lattice it is float64, on the lattice.

    Raises:
        ValueError: If the plan needs noise or earlier states and they were not given.
    """
    if isinstance(start, Noise):
        noise = noise or start
        start = start.start()
    if plan.stochastic and noise is None:
        raise ValueError("this plan adds noise: give `noise`, or a `Noise` as the start")
    if len(earlier) != len(plan.before):
        raise ValueError(f"this plan starts from {1 + len(plan.before)} states, {1 + len(earlier)} were given")
    denoise = as_planned(denoise, plan)
    given = [start, *earlier]
    if plan.lattice:
        given = [_on_lattice(state.double(), plan.lattice) for state in given]
    states: deque[Tensor] = deque(given, maxlen=max(plan.memory, len(given)))
    predictions: deque[Prediction] = deque(maxlen=plan.memory)
    for k, row in enumerate(plan.rows):
        with torch.no_grad():
            predictions.appendleft(denoise(states[0], row.query))
            fresh = noise.row(k).to(states[0].dtype) if row.z and noise is not None else None
            states.appendleft(_update(row, states, predictions, fresh, plan.lattice))
        yield Step(k, row, states[0], predictions[0].x0, predictions[0].eps)


def run(
    denoise: Denoiser,
    plan: Plan,
    start: Tensor | Noise,
    noise: Noise | None = None,
    earlier: Sequence[Tensor] = (),
) -> Tensor:
    """The last state of `trajectory`: (N, ...)."""
    step = None
    for step in trajectory(denoise, plan, start, noise, earlier):  # noqa: B007
        pass
    assert step is not None
    return step.x


def _update(
    row: Row, states: deque[Tensor], predictions: deque[Prediction], fresh: Tensor | None, lattice: float
) -> Tensor:
    kept = [*zip(row.x, states, strict=False)]
    added = [
        *zip(row.x0, (p.x0 for p in predictions), strict=False),
        *zip(row.eps, (p.eps for p in predictions), strict=False),
    ]
    if fresh is not None:
        added.append((row.z, fresh))
    if not lattice:
        return _sum([*kept, *added], states[0].dtype)
    # Whole multiples of the lattice add without rounding in float64, so only the rest is put on it.
    whole = [(weight, state) for weight, state in kept if weight == int(weight)]
    others = [*(term for term in kept if term[0] != int(term[0])), *added]
    rest = _sum(others or [(0.0, states[0])], torch.float64)
    return _sum([(1.0, _on_lattice(rest, lattice)), *whole], torch.float64)


def _sum(terms: list[tuple[float, Tensor]], dtype: torch.dtype) -> Tensor:
    weight, tensor = terms[0]
    out = (tensor * weight).to(dtype)  # a denoiser in a lower precision must not lower the state's
    for weight, tensor in terms[1:]:
        if weight:
            out.add_(tensor, alpha=weight)
    return out


def _on_lattice(x: Tensor, lattice: float) -> Tensor:
    return (x / lattice).round() * lattice
