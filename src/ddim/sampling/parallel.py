"""A plan run in parallel over time: many rows' network calls at once, again and again until the states stay put.

Picard's iteration (Shih et al. 2023, "Parallel Sampling of Diffusion Models"), for any plan over real-valued data, with
or without noise: every row in a window is given the network's output at the last guess of its state, the rows are added
up in order, and the window moves past the states that no longer change. It takes more network calls than one after the
other, in fewer rounds: it pays where one sample leaves the device idle, so on a large GPU, and never on a CPU.
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

Held = Callable[[Tensor, Level], Any]
"""A denoiser that says at other states what the network's output at one state says there."""


@runtime_checkable
class BatchDenoiser(Protocol):
    """A denoiser that evaluates many states at once, such as `ddim.model.denoisers.NetworkDenoiser`."""

    def evaluate_many(self, states: Sequence[Tensor], levels: Sequence[Level]) -> list[Held]:
        """One network evaluation at many states (N, ...), each at its level: what it says near each of them."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """One batch of network calls.

    Args:
        index: Its number, from 1.
        done: Rows whose state stays put, of the plan's.
        calls: Network calls of one sample in this round.
        x: The state after the last of those rows, (N, ...).
    """

    index: int
    done: int
    calls: int
    x: Tensor


def evaluate_many(denoise: AnyDenoiser, states: Sequence[Tensor], levels: Sequence[Level]) -> list[Held]:
    """The denoiser at many states (N, ...) and levels, kept for states near by.

    Of a network it is one call on all states, and its output is kept; of any other denoiser one call each, and v is.
    """
    if isinstance(denoise, BatchDenoiser):
        return denoise.evaluate_many(states, levels)
    if isinstance(denoise, Guided):
        parts = (evaluate_many(part, states, levels) for part in (denoise.conditional, denoise.unconditional))
        return [Guided(on, off, denoise.scale) for on, off in zip(*parts, strict=True)]
    return [partial(_held, denoise(x, level)) for x, level in zip(states, levels, strict=True)]


def _held(made: Prediction, x: Tensor, level: Level) -> Prediction:
    return predict(v_from_pair(made.x0, made.eps, level), x, level, "v")


def rounds(
    denoise: AnyDenoiser,
    plan: Plan,
    start: Tensor | Noise,
    noise: Noise | None = None,
    window: int | None = None,
    tolerance: float = 1e-3,
) -> Iterator[Round]:
    """Run a plan in parallel over time, and yield every round; the last one's `x` is the result.

    At tolerance 0 the first k states are after k rounds what `ddim.loop.run` makes, but for rounding. There are never
    more rounds than rows.

    Args:
        denoise: The denoiser: a model's own, or any other, see `hold`.
        plan: What to run.
        start: The first state (N, ...), or a `Noise` that draws it and every row's noise.
        noise: The rows' noise, where `start` is a tensor and the plan is stochastic.
        window: Rows at once; all if left out. The network sees window times N samples.
        tolerance: A state stays put where no sample's changes by more than this in a round, as a root mean square over
            its numbers; 0 runs until nothing changes at all.

    Raises:
        DdimError: If the plan starts from two states or is over categories, or window or tolerance is out of range.
        ValueError: If the plan needs noise and none was given.
    """
    _check(plan, window, tolerance)
    if isinstance(start, Noise):
        noise = noise or start
        start = start.start()
    if plan.stochastic and noise is None:
        raise ValueError("this plan adds noise: give `noise`, or a `Noise` as the start")
    path = _Path(denoise, plan, start, noise)
    done, index = 0, 0
    while done < len(plan):
        some = range(done, min(done + (window or len(plan)), len(plan)))
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # and not around the `yield`, where it would be the caller's too
        try:
            still = (path.improve(some) <= tolerance).tolist()
        finally:
            torch.set_grad_enabled(before)
        # The first state is as good as the one before it, which stays put: there the network was asked.
        done += [True, *still[1:], False].index(False)
        index += 1
        yield Round(index, done, len(some), path.states[done])


class _Path:
    """A guess of all states of a run, at first the start everywhere."""

    def __init__(self, denoise: AnyDenoiser, plan: Plan, start: Tensor, noise: Noise | None):
        self.denoise, self.plan, self.noise = denoise, plan, noise
        self.states = [start] * (len(plan) + 1)
        self.predictions: list[Any] = [None] * len(plan)
        self.drawn: dict[int, Tensor] = {}

    def improve(self, some: range) -> Tensor:
        """Make the states after some rows anew: how far the farthest sample of each moved, (rows,)."""
        rows, states, predictions = self.plan.rows, self.states, self.predictions
        held = evaluate_many(self.denoise, [states[k] for k in some], [rows[k].query for k in some])
        moved = []
        for k, one in zip(some, held, strict=True):
            predictions[k] = as_planned(one, self.plan)(states[k], rows[k].query)
            past = range(k, max(k - self.plan.memory, -1), -1)
            known = [states[j] for j in past], [predictions[j] for j in past]
            made = self.plan.advance(rows[k], *known, self._fresh(k, some))
            moved.append((made - states[k + 1]).flatten(1).square().mean(1).amax().sqrt())
            states[k + 1] = made
        states[some.stop + 1 :] = [states[some.stop]] * (len(rows) - some.stop)
        return torch.stack(moved)

    def _fresh(self, k: int, some: range) -> Tensor | None:
        """The noise of a row; kept while the row is in the window."""
        if self.noise is None or not self.plan.rows[k].draws:
            return None
        self.drawn = {row: drawn for row, drawn in self.drawn.items() if row in some}
        if k not in self.drawn:
            self.drawn[k] = self.noise.row(k)
        return self.drawn[k]


def run(denoise: AnyDenoiser, plan: Plan, start: Tensor | Noise, noise: Noise | None = None, **how: Any) -> Tensor:
    """The last state of `rounds`, (N, ...); arguments and errors as there."""
    *_, last = rounds(denoise, plan, start, noise, **how)
    return last.x


def _check(plan: Plan, window: int | None, tolerance: float) -> None:
    if not isinstance(plan, Plan) or plan.before or plan.lattice:
        wrong = "starts from two states, or is over categories"
        raise DdimError(f"plan {plan.name}", wrong, "run it one row after the other, with ddim.loop.run")
    if window is not None and window < 1:
        raise DdimError(f"window {window}", "is not a whole number >= 1", "give 1 or more")
    if not 0 <= tolerance < float("inf"):
        raise DdimError(f"tolerance {tolerance}", "is not a number >= 0", "give one, such as 0.001")
