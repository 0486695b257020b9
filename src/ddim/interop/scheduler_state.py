"""A plan run one row at a time by someone else's loop, which calls the network and holds the state in its own dtype."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.interop.scheduler_settings import Settings
from ddim.model.denoisers import image_output
from ddim.names import Predicts
from ddim.plan.base import as_planned
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.parameterization import Prediction


class Stepper:
    """One run of a plan; what `ddim.trajectory` is where the loop is ours.

    States are kept in float32 at least, and in float64 where the plan has a lattice. The loop hands each state back in
    its own dtype, and may have changed it; but on a lattice, where nothing could be undone then.

    Args:
        plan: What to run.
        predicts: What the network predicts.
    """

    def __init__(self, plan: Plan, predicts: Predicts):
        self.plan, self.done, self._hub = plan, 0, image_output(predicts)
        kept = max(plan.memory, 1 + len(plan.before))
        self.states: deque[Tensor] = deque(maxlen=kept)
        self.predictions: deque[Prediction] = deque(maxlen=kept)

    @property
    def row(self) -> Row:
        """The row to be run next.

        Raises:
            DdimError: If all were run.
        """
        if self.done == len(self.plan.rows):
            wrong = f"has run all its {self.done} rows"
            raise DdimError(f"plan {self.plan.name}", wrong, "call set_timesteps before a new run")
        return self.plan.rows[self.done]

    def enter(self, sample: Tensor, given: Sequence[Tensor] | None = None) -> None:
        """Take the state that the loop holds, (N, ...).

        Args:
            sample: The state.
            given: Before the first row, the states to begin from, newest first; where None, the sample alone.

        Raises:
            DdimError: If states are missing, or the sample is not the state that it must be.
        """
        if not self.states:
            self._begin(sample, given)
            return
        inner = self.states[0]
        if sample.shape != inner.shape:
            wrong = f"is {_shape(sample)}, the state before was {_shape(inner)}"
            raise DdimError("sample", wrong, "call set_timesteps before a new run")
        if inner.dtype == sample.dtype and not self.plan.lattice:
            self.states[0] = sample.clone()  # a loop may use one buffer again and again
        elif not torch.equal(inner.to(sample.dtype), sample):
            if self.plan.lattice:
                wrong = "is not what the row before made, and this plan's states are exact"
                raise DdimError("sample", wrong, "hand it back unchanged, or use a plan without a lattice")
            self.states[0] = sample.to(inner.dtype)

    def _begin(self, sample: Tensor, given: Sequence[Tensor] | None) -> None:
        before = self.plan.before
        states = [sample] if given is None else list(given)
        if len(states) != 1 + len(before):
            wrong = f"starts from {1 + len(before)} states, {len(states)} are given"
            raise DdimError(f"plan {self.plan.name}", wrong, "call set_states with as many, newest first")
        if any(state.shape != sample.shape for state in states) or not torch.equal(states[0].to(sample), sample):
            wrong = "is not the newest of the states given"
            raise DdimError("sample", wrong, "start the loop from the first of them")
        wide = torch.promote_types(sample.dtype, torch.float32)
        own = [s.to(sample.device, torch.promote_types(s.dtype, wide), copy=True) for s in states]
        self.states.extend(self.plan.begin(own))

    def leave(self, output: Tensor, fresh: Tensor | None) -> tuple[Tensor, Prediction]:
        """Run the next row.

        Args:
            output: The network's output at the newest state, (N, ...); with twice the channels where it says a
                variance.
            fresh: Standard normal noise, where the row draws.

        Returns:
            The new state, and what the output was taken for.

        Raises:
            DdimError: If the output is of another shape than the state.
        """
        row, x = self.row, self.states[0]
        double = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if output.shape not in (x.shape, double):
            wrong = f"is {_shape(output)}, the sample {_shape(x)}"
            raise DdimError("model_output", wrong, "give the network's output at this sample")
        if row.z_high and output.shape != double:
            wrong = "takes its noise from the network, which does not say any"
            raise DdimError(f"plan {self.plan.name}", wrong, "use a plan with eta, or hand on the network's variance")
        kept = output.clone()  # later rows may look back on it, and a compiled network may write over it
        said = as_planned(lambda x, level: self._hub(kept, x, level), self.plan)(x, row.query)
        self.predictions.appendleft(said)
        self.states.appendleft(self.plan.advance(row, self.states, self.predictions, fresh))
        self.done += 1
        return self.states[0], said


class RunState:
    """The plan that a scheduler's `set_timesteps` made, and how far its run is.

    Args:
        settings: The scheduler's.
        plan: The whole plan.
    """

    def __init__(self, settings: Settings, plan: Plan):
        self.settings, self.whole = settings, plan
        self.times = [row.query.t - 1 for row in plan.rows]
        self.begin: int | None = None
        self.go_to(0)

    def go_to(self, row: int) -> None:
        """Begin a run at a row, with a state that no earlier row made.

        Raises:
            DdimError: See `Settings.rest`.
        """
        self.first, self.run = row, Stepper(self.settings.rest(self.whole, row), self.settings.predicts)

    def begin_at(self, row: int) -> None:
        """The same where a pipeline says the row itself.

        Raises:
            DdimError: If there is no such row; see `go_to`.
        """
        if not 0 <= row < len(self.times):
            wrong = f"is outside 0..{len(self.times) - 1}"
            raise DdimError(f"begin index {row}", wrong, "use more steps or more strength")
        self.go_to(row)
        self.begin = row

    @property
    def index(self) -> int | None:
        """The row to be run next; None before the first step."""
        return self.first + self.run.done if self.run.states else None

    def at(self, timestep: float) -> Stepper:
        """The run, if the timestep is that of its next row; before the first step, begun where the timestep is.

        Raises:
            DdimError: If it is not.
        """
        if not self.run.states and self.begin is None:
            starts = self.settings.starts(self.whole)
            self.go_to(next((row for row in starts if _same(self.times[row], timestep)), 0))
        wanted = self.run.row.query.t - 1
        if not _same(wanted, timestep):
            wrong = f"is not that of step {self.first + self.run.done}, {wanted:g}"
            raise DdimError(f"timestep {timestep:g}", wrong, "call set_timesteps, then step in the order of timesteps")
        return self.run


def _same(a: float, b: float) -> bool:
    """Whether two timesteps are one; those of a tensor are float32."""
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)


def _shape(x: Tensor) -> str:
    return "x".join(str(side) for side in x.shape)
