"""The sampling loop: it runs a plan and yields every step."""

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
    """The result of one row of a plan.

    Args:
        index: The row's number k.
        row: The row.
        x: The state after the row, (N, ...).
        prediction: The denoiser's prediction in this row.
    """

    index: int
    row: R
    x: Tensor
    prediction: Any

    @property
    def x0(self) -> Tensor:
        """The x_0 predicted in this row, (N, ...); for discrete data its probabilities, (N, ..., K)."""
        x0: Tensor = self.prediction.x0
        return x0

    @property
    def eps(self) -> Tensor:
        """The noise predicted in this row, (N, ...); not defined for discrete data."""
        eps: Tensor = self.prediction.eps
        return eps


def trajectory(
    denoise: AnyDenoiser,
    plan: BasePlan[R],
    start: Tensor | Noise,
    noise: Noise | None = None,
    earlier: Sequence[Tensor] = (),
) -> Iterator[Step[R]]:
    """Run a plan, one network evaluation per row, and yield each step.

    Progress, traces, early stopping and streaming are up to the caller: iterate, or take the last step's `x`.

    Args:
        denoise: The denoiser.
        plan: The plan.
        start: The first state (N, ...), or a `Noise` that draws it and every row's noise.
        noise: The rows' noise, if `start` is a tensor and the plan is stochastic.
        earlier: States older than the start, one for each level of `plan.before`.

    Yields:
        One `Step` per row; the last one's `x` is the result. With a lattice the states are float64, on the lattice.

    Raises:
        ValueError: If the plan needs noise or earlier states that are not passed.
    """
    if isinstance(start, Noise):
        noise = noise or start
        start = start.start()
    if plan.stochastic and noise is None:
        raise ValueError("this plan adds noise: pass `noise`, or a `Noise` as the start")
    if len(earlier) != len(plan.before):
        raise ValueError(f"this plan starts from {1 + len(plan.before)} states, not {1 + len(earlier)}")
    denoise = as_planned(denoise, plan)
    initial = plan.begin([start, *earlier])
    states: deque[Tensor] = deque(initial, maxlen=max(plan.memory, len(initial)))
    predictions: deque[Any] = deque(maxlen=plan.memory)
    for k, row in enumerate(plan.rows):
        grad_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # the same as no_grad, whose overhead is as long as a step of a small state
        try:
            predictions.appendleft(denoise(states[0], row.query))
            fresh = noise.row(k) if row.draws and noise is not None else None
            states.appendleft(plan.advance(row, states, predictions, fresh))
        finally:
            torch.set_grad_enabled(grad_enabled)
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
