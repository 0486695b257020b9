"""Running a plan row by row inside another library's loop, which calls the network and has its own state dtype."""

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
    """One run of a plan inside another library's loop; `ddim.trajectory` is the counterpart with this package's loop.

    States are stored in at least float32, and in float64 for a plan with a lattice. The loop returns each state in its
    own dtype and may change it, except on a lattice, where a changed state could not be inverted.

    Args:
        plan: The plan to run.
        predicts: What the network predicts.
    """

    def __init__(self, plan: Plan, predicts: Predicts):
        self.plan, self.done, self._hub = plan, 0, image_output(predicts)
        length = max(plan.memory, 1 + len(plan.before))
        self.states: deque[Tensor] = deque(maxlen=length)
        self.predictions: deque[Prediction] = deque(maxlen=length)

    @property
    def row(self) -> Row:
        """The next row to run.

        Raises:
            DdimError: If all rows were run.
        """
        if self.done == len(self.plan.rows):
            problem = f"has run all its {self.done} rows"
            raise DdimError(f"plan {self.plan.name}", problem, "call set_timesteps before a new run")
        return self.plan.rows[self.done]

    def enter(self, sample: Tensor, initial: Sequence[Tensor] | None = None) -> None:
        """Take over the loop's current state.

        Args:
            sample: The state, (N, ...).
            initial: Before the first row, the initial states, newest first; None for the sample alone.

        Raises:
            DdimError: If states are missing, or the sample has another shape or, on a lattice, other values than the
                state.
        """
        if not self.states:
            self._start(sample, initial)
            return
        inner = self.states[0]
        if sample.shape != inner.shape:
            problem = f"is {_shape(sample)}, the state before was {_shape(inner)}"
            raise DdimError("sample", problem, "call set_timesteps before a new run")
        if inner.dtype == sample.dtype and not self.plan.lattice:
            self.states[0] = sample.clone()  # a loop may reuse one buffer
        elif not torch.equal(inner.to(sample.dtype), sample):
            if self.plan.lattice:
                problem = "is not the last row's result, and this plan's states are exact"
                raise DdimError("sample", problem, "pass it back unchanged, or use a plan without a lattice")
            self.states[0] = sample.to(inner.dtype)

    def _start(self, sample: Tensor, initial: Sequence[Tensor] | None) -> None:
        before = self.plan.before
        states = [sample] if initial is None else list(initial)
        if len(states) != 1 + len(before):
            problem = f"starts from {1 + len(before)} states, not {len(states)}"
            raise DdimError(f"plan {self.plan.name}", problem, "pass as many to set_states, newest first")
        if any(state.shape != sample.shape for state in states) or not torch.equal(states[0].to(sample), sample):
            problem = "is not the newest of the initial states"
            raise DdimError("sample", problem, "start the loop from the first of them")
        wide = torch.promote_types(sample.dtype, torch.float32)
        exact = [s.to(sample.device, torch.promote_types(s.dtype, wide), copy=True) for s in states]
        self.states.extend(self.plan.begin(exact))

    def leave(self, output: Tensor, fresh: Tensor | None) -> tuple[Tensor, Prediction]:
        """Run the next row.

        Args:
            output: The network's output at the newest state, (N, ...); with twice the channels if it predicts a
                variance.
            fresh: Standard normal noise, if the row draws any.

        Returns:
            The new state, and the prediction (x_0, eps) of the output.

        Raises:
            DdimError: If the output does not have the state's shape, or lacks the variance that the row needs.
        """
        row, x = self.row, self.states[0]
        double = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if output.shape not in (x.shape, double):
            problem = f"is {_shape(output)}, the sample {_shape(x)}"
            raise DdimError("model_output", problem, "pass the network's output at this sample")
        if row.z_high and output.shape != double:
            problem = "takes its variance from the network, which predicts none"
            raise DdimError(f"plan {self.plan.name}", problem, "use a plan with eta, or pass on the network's variance")
        raw = output.clone()  # later rows may use it, and a compiled network may overwrite it
        prediction = as_planned(lambda x, level: self._hub(raw, x, level), self.plan)(x, row.query)
        self.predictions.appendleft(prediction)
        self.states.appendleft(self.plan.advance(row, self.states, self.predictions, fresh))
        self.done += 1
        return self.states[0], prediction


class RunState:
    """The plan of a scheduler's `set_timesteps`, and the progress of its run.

    Args:
        settings: The scheduler's settings.
        plan: The whole plan.
        steps: The number of steps that the plan is for, or None.
        timesteps: The descending timesteps that it is for, or None.
    """

    def __init__(self, settings: Settings, plan: Plan, steps: int | None, timesteps: Sequence[float] | None):
        self.settings, self.whole, self._steps, self._timesteps = settings, plan, steps, timesteps
        self.times = [row.query.t - 1 for row in plan.rows]
        self.begin: int | None = None
        self._passed = (0.0, False)
        self.go_to(0)

    def follow(self, eta: float, clipped: bool | None) -> None:
        """Use the arguments of `step` in the next row, where the plan emulates a scheduler with such arguments."""
        if self.settings.emulates == "diffusers" and self._passed != (eta, bool(clipped)):
            self.whole, self._passed = (
                self.settings.plan_of(self._steps, self._timesteps, eta, clipped),
                (eta, bool(clipped)),
            )
            self.run.plan = self.settings.remaining(self.whole, self.first)

    def go_to(self, row: int) -> None:
        """Start a run at a row, without the states of earlier rows.

        Raises:
            DdimError: See `Settings.remaining`.
        """
        self.first, self.run = row, Stepper(self.settings.remaining(self.whole, row), self.settings.predicts)

    def begin_at(self, row: int) -> None:
        """Start a run at a row that a pipeline set itself.

        Raises:
            DdimError: If there is no such row; see `go_to`.
        """
        if not 0 <= row < len(self.times):
            problem = f"is outside 0..{len(self.times) - 1}"
            raise DdimError(f"begin index {row}", problem, "use more steps or a higher strength")
        self.go_to(row)
        self.begin = row

    @property
    def index(self) -> int | None:
        """The next row to run; None before the first step."""
        return self.first + self.run.done if self.run.states else None

    def at(self, timestep: float) -> Stepper:
        """Check that a timestep is the next row's, and return the run.

        Before the first step, the run is started at the timestep, unless a pipeline set the row.

        Raises:
            DdimError: If the next row has another timestep.
        """
        if not self.run.states and self.begin is None:
            starts = self.settings.starts(self.whole)
            self.go_to(next((row for row in starts if _same(self.times[row], timestep)), 0))
        expected = self.run.row.query.t - 1
        if not _same(expected, timestep):
            problem = f"is not that of step {self.first + self.run.done}, {expected:g}"
            raise DdimError(
                f"timestep {timestep:g}", problem, "call set_timesteps, then step in the order of timesteps"
            )
        return self.run


def _same(a: float, b: float) -> bool:
    """Whether two timesteps are equal up to float32 rounding."""
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)


def _shape(x: Tensor) -> str:
    return "x".join(str(side) for side in x.shape)
