"""Sampling in parallel over time: the rows of a window are evaluated as one batch, repeatedly, until they converge.

Picard iteration (Shih et al. 2023, "Parallel Sampling of Diffusion Models"), for any plan over real-valued data, with
or without noise: the network is evaluated at the current estimate of every state in a window, the rows are applied in
order, and the window moves past the converged states. It takes more network evaluations than sequential sampling, in
fewer rounds: it is faster only if one sample does not occupy the device, so on a large GPU, and never on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.plan.base import as_planned
from ddim.plan.plan import Plan
from ddim.process.parameterization import AnyDenoiser, Prediction, predict, v_from_pair
from ddim.process.rng import Noise
from ddim.process.schedule import Level
from ddim.sampling.guidance import Guided

FrozenDenoiser = Callable[[Tensor, Level], Any]
"""A denoiser that reuses the network's output at one state for nearby states."""


@runtime_checkable
class BatchDenoiser(Protocol):
    """A denoiser that evaluates many states at once, such as `ddim.model.denoisers.NetworkDenoiser`."""

    def evaluate_many(self, states: Sequence[Tensor], levels: Sequence[Level]) -> list[FrozenDenoiser]:
        """One network evaluation at many states (N, ...), each at its level; a reusing denoiser for each of them."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """One round: a batched network evaluation of the rows in the window.

    Args:
        index: The round's number, from 1.
        done: Number of rows that have converged.
        nfe: Network evaluations per sample in this round.
        x: The state after the last converged row, (N, ...).
    """

    index: int
    done: int
    nfe: int
    x: Tensor


def evaluate_many(denoise: AnyDenoiser, states: Sequence[Tensor], levels: Sequence[Level]) -> list[FrozenDenoiser]:
    """Evaluate a denoiser at many states (N, ...) and levels, for reuse at nearby states.

    A `BatchDenoiser` is evaluated once on all states and its raw network output cached; any other denoiser is called
    per state and its v cached.
    """
    if isinstance(denoise, BatchDenoiser):
        return denoise.evaluate_many(states, levels)
    if isinstance(denoise, Guided):
        parts = (evaluate_many(part, states, levels) for part in (denoise.conditional, denoise.unconditional))
        return [Guided(on, off, denoise.scale) for on, off in zip(*parts, strict=True)]
    return [partial(_from_v, denoise(x, level)) for x, level in zip(states, levels, strict=True)]


def _from_v(prediction: Prediction, x: Tensor, level: Level) -> Prediction:
    return predict(v_from_pair(prediction.x0, prediction.eps, level), x, level, "v")


def rounds(
    denoise: AnyDenoiser,
    plan: Plan,
    start: Tensor | Noise,
    noise: Noise | None = None,
    window: int | None = None,
    tolerance: float = 1e-3,
) -> Iterator[Round]:
    """Run a plan in parallel over time, and yield every round; the last one's `x` is the result.

    At tolerance 0 the first k states equal those of `ddim.loop.run` after k rounds, up to rounding. There are never
    more rounds than rows.

    Args:
        denoise: The denoiser of a model, or any other, see `evaluate_many`.
        plan: The plan.
        start: The first state (N, ...), or a `Noise` that draws it and every row's noise.
        noise: The rows' noise, if `start` is a tensor and the plan is stochastic.
        window: Rows evaluated at once; by default all. The batch size of the network is window times N.
        tolerance: A state has converged if the root mean square change in a round is at most this for every sample; 0
            runs until nothing changes.

    Yields:
        One `Round` per batched network evaluation.

    Raises:
        DdimError: If the plan starts from two states or is for discrete data, or window or tolerance is out of range.
        ValueError: If the plan needs noise that is not passed.
    """
    _check(plan, window, tolerance)
    if isinstance(start, Noise):
        noise = noise or start
        start = start.start()
    if plan.stochastic and noise is None:
        raise ValueError("this plan adds noise: pass `noise`, or a `Noise` as the start")
    path = _Path(denoise, plan, start, noise)
    done, index = 0, 0
    while done < len(plan):
        batch = range(done, min(done + (window or len(plan)), len(plan)))
        grad_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # not around the `yield`, where it would affect the caller
        try:
            converged = (path.improve(batch) <= tolerance).tolist()
        finally:
            torch.set_grad_enabled(grad_enabled)
        # The first state has converged whatever its change: it was computed from a state that had converged before.
        done += [True, *converged[1:], False].index(False)
        index += 1
        yield Round(index, done, len(batch), path.states[done])


class _Path:
    """The current estimate of all states of a run; initially all equal the start."""

    def __init__(self, denoise: AnyDenoiser, plan: Plan, start: Tensor, noise: Noise | None):
        self.denoise, self.plan, self.noise = denoise, plan, noise
        self.states = [start] * (len(plan) + 1)
        self.predictions: list[Any] = [None] * len(plan)
        self.drawn: dict[int, Tensor] = {}

    def improve(self, batch: range) -> Tensor:
        """Update the states after these rows; returns the largest RMS change of a sample for each, (rows,)."""
        rows, states, predictions = self.plan.rows, self.states, self.predictions
        denoisers = evaluate_many(self.denoise, [states[k] for k in batch], [rows[k].query for k in batch])
        moved = []
        for k, denoise in zip(batch, denoisers, strict=True):
            predictions[k] = as_planned(denoise, self.plan)(states[k], rows[k].query)
            past = range(k, max(k - self.plan.memory, -1), -1)
            history = [states[j] for j in past], [predictions[j] for j in past]
            state = self.plan.advance(rows[k], *history, self._fresh(k, batch))
            moved.append((state - states[k + 1]).flatten(1).square().mean(1).amax().sqrt())
            states[k + 1] = state
        states[batch.stop + 1 :] = [states[batch.stop]] * (len(rows) - batch.stop)
        return torch.stack(moved)

    def _fresh(self, k: int, batch: range) -> Tensor | None:
        """The noise of a row, cached while the row is in the window."""
        if self.noise is None or not self.plan.rows[k].draws:
            return None
        self.drawn = {row: drawn for row, drawn in self.drawn.items() if row in batch}
        if k not in self.drawn:
            self.drawn[k] = self.noise.row(k)
        return self.drawn[k]


def run(denoise: AnyDenoiser, plan: Plan, start: Tensor | Noise, noise: Noise | None = None, **options: Any) -> Tensor:
    """The last state of `rounds`, (N, ...), with the same arguments and errors."""
    *_, last = rounds(denoise, plan, start, noise, **options)
    return last.x


def _check(plan: Plan, window: int | None, tolerance: float) -> None:
    if not isinstance(plan, Plan) or plan.before or plan.lattice:
        problem = "starts from two states, or is for discrete data"
        raise DdimError(f"plan {plan.name}", problem, "run it row by row, with ddim.loop.run")
    if window is not None and window < 1:
        raise DdimError(f"window {window}", "is not a whole number >= 1", "use 1 or more")
    if not 0 <= tolerance < float("inf"):
        raise DdimError(f"tolerance {tolerance}", "is not a number >= 0", "use one such as 0.001")
