"""The one loop over time: it runs a plan and yields every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ddim.plan.base import BasePlan, BaseRow, as_planned
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise

R = TypeVar("R", bound=BaseRow)


@dataclass(frozen=True, slots=True)
class Step(Generic[R]):
    """What one row of a plan did.

    Args:
        index: The row's number k.
        row: The row.
        x: The state after the row, (N, ...).
        prediction: What the denoiser said in this row.
    """

    index: int
    row: R
    x: Tensor
    prediction: Any

    @property
    def x0(self) -> Tensor:
        """The x_0 predicted in this row, (N, ...); of categories the probabilities, (N, ..., K)."""
        made: Tensor = self.prediction.x0
        return made

    @property
    def eps(self) -> Tensor:
        """The noise predicted in this row, (N, ...); categories have none."""
        made: Tensor = self.prediction.eps
        return made


def trajectory(
    denoise: AnyDenoiser,
    plan: BasePlan[R],
    start: Tensor | Noise,
    noise: Noise | None = None,
    earlier: Sequence[Tensor] = (),
) -> Iterator[Step[R]]:
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
    given = plan.begin([start, *earlier])
    states: deque[Tensor] = deque(given, maxlen=max(plan.memory, len(given)))
    predictions: deque[Any] = deque(maxlen=plan.memory)
    for k, row in enumerate(plan.rows):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # as no_grad does, which costs as much as a small state's step
        try:
            predictions.appendleft(denoise(states[0], row.query))
            fresh = noise.row(k) if row.draws and noise is not None else None
            states.appendleft(plan.advance(row, states, predictions, fresh))
        finally:
            torch.set_grad_enabled(before)
        yield Step(k, row, states[0], predictions[0])


def run(
    denoise: AnyDenoiser,
    plan: BasePlan[R],
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
