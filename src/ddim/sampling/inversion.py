"""Ways from a picture to its latent and back: first order, or exact. docs/inversion.md compares them.

Two-step plans are gone back by algebra (`reverse`), one-step plans by solving each row for the state it started from
(`solve`). Neither knows a sampler by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ddim import samplers
from ddim.errors import DdimError, warn
from ddim.names import METHODS
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process import timesteps
from ddim.process.parameterization import Denoiser
from ddim.process.schedule import Level, Schedule
from ddim.process.timesteps import DEFAULT
from ddim.samplers.registry import WAY_STEPS, Planner
from ddim.sampling.fixed_point import invert_rows
from ddim.sampling.loop import trajectory

LATTICE = 2.0**-32
LARGEST = 2.0**20  # states of this size on the lattice still add without rounding in float64
GROWTH = 2.0


@dataclass(frozen=True, slots=True)
class Inversion:
    """A way to latents and back.

    Args:
        method: Its name, one of `METHODS`.
        down: The plan from latents to pictures.
        up: The plan from pictures to latents; None where `down` is solved row by row.
    """

    method: str
    decode_plan: Plan
    encode_plan: Plan | None

    @property
    def two_state(self) -> bool:
        """Whether a latent is two states, x_T and the one before it."""
        return any(len(row.x) == 2 for row in self.decode_plan.rows)

    @property
    def resume_plan(self) -> Plan:
        """The plan that decodes what this way encodes; of a pair it needs `before`."""
        return drop_first(self.decode_plan) if self.two_state else self.decode_plan


def make_inversion(method: str, levels: Sequence[Level], first: Level, about: str = "") -> Inversion:
    """A method's plans.

    Args:
        method: One of `METHODS`.
        levels: S + 1 falling levels to clean data.
        first: The level of t = 1: what the network is told of clean data; for "fixed-point" the picture's own.
        about: The grid's name.

    Raises:
        DdimError: If the method is unknown, or the levels are too few or do not fall.
    """
    if method not in METHODS:
        raise DdimError(f"method {method!r}", "is unknown", f"choose one of {', '.join(METHODS)}")
    if method == "fixed-point":
        above = [level for level in levels if level.t > first.t]
        if len(above) < len(levels) - 1 and levels[-1].t < first.t:
            warn(f"fixed-point: {len(above)} steps end at t = {first.t:g}, where the picture stands in for x")
        return Inversion(method, samplers.ddim([*above, first], about=_about(about, len(above))), None)
    name = _about(about, len(levels) - 1)
    if method in ("ddim", "ddim-target"):
        up = (
            samplers.ddim(levels[::-1], clean_as=first, about=name)
            if method == "ddim"
            else samplers.ddim_target(levels[::-1], name)
        )
        return Inversion(method, samplers.ddim(levels, about=name), up)
    down = samplers.bdia(levels, lattice=LATTICE if method == "lossless" else 0.0, about=name)
    return Inversion(method, down, encoding(down, first))


def graded_timesteps(schedule: Schedule, steps: int, top: float) -> list[float]:
    """S + 1 rising whole times from 1 to `top`: equal rotations, but at first growing by a factor, see GROWTH.

    A DDIM step to t = 1 from a level many times as noisy has next to no inverse at a real picture: the network's x_0
    hardly depends on where its x is off the data. Equal steps of angle + k log(angle) grow by the factor 2 near
    t = 1 (by more, where that would take over 0.6 of the steps) and are equal rotations further up.

    Args:
        schedule: Whose times.
        steps: S, at least 1.
        top: The last time, a whole number.

    Raises:
        DdimError: If there are not S + 1 whole times.
    """
    last = int(top)
    if not 1 <= steps < last:
        raise DdimError(f"steps {steps}", f"is not a whole number in 1..{last - 1}", "choose one in that range")
    angle = np.array([schedule.level(t).angle for t in range(1, last + 1)])
    wide = math.log(angle[-1] / angle[0])
    growth = max(math.log(GROWTH), wide / (0.6 * steps))
    mark = angle + (angle[-1] - angle[0]) / (steps * growth - wide) * np.log(angle)
    times = np.interp(np.linspace(mark[0], mark[-1], steps + 1), mark, np.arange(1, last + 1)).round()
    for k in range(1, steps + 1):
        times[k] = max(times[k], times[k - 1] + 1)
    return [float(min(t, last - steps + k)) for k, t in enumerate(times)]


def drop_first(plan: Plan) -> Plan:
    """A plan from its second state on: its first state is given beside it.

    Raises:
        DdimError: If the plan holds one row only.
    """
    if len(plan) < 2:
        raise DdimError("plan", "holds one row, and two states need two", "use 2 steps or more")
    return replace(plan, rows=plan.rows[1:], before=(plan.start,))


def reverse(plan: Plan) -> Plan:
    """The plan that goes back over a two-step plan: x_{k-1} = (x_{k+1} - a x_k - P x0_k - E eps_k) / b.

    Each row becomes one of the same form, in the opposite order; x0_k and eps_k are the same prediction at the same
    state, so nothing is lost but rounding, and with b = 1 on a lattice not even that: then every weight is negated
    exactly. What comes back is the state beside the plan's start, or its first state where it starts from one.

    Args:
        plan: Without noise; rows from the second on (from the first, where the plan has `before`) have two weights of
            states, the older one not 0, and predictions of the newest state only.

    Returns:
        A checked plan that starts at the level of the plan's last call, with `before` the plan's end.

    Raises:
        DdimError: Naming the first row that is not such a one.
    """
    skipped = 0 if plan.before else 1
    onward = plan if plan.before else drop_first(plan)
    if len(onward.before) != 1:
        raise DdimError("plan", f"starts from {1 + len(plan.before)} states", "give one that starts from 1 or 2")
    for k, row in enumerate(onward.rows):
        good = len(row.x) == 2 and row.x[1] != 0 and max(len(row.x0), len(row.eps)) <= 1 and row.z == row.sigma == 0
        if not good:
            where = f"plan row {k + skipped} (t = {row.now.t:g} to {row.next.t:g})"
            wrong = "cannot be gone back: it needs the weights of two states, of one prediction, and no noise"
            raise DdimError(
                where, wrong, "use a two-step plan, such as samplers.bdia, or ddim.sampling.fixed_point.invert_rows"
            )
    past = [*onward.before, *(row.now for row in onward.rows)]
    rows = [_back(row, older) for row, older in zip(onward.rows, past, strict=False)]
    return replace(onward, rows=tuple(rows[::-1]), before=(onward.end,)).check()


def _back(row: Row, older: Level) -> Row:
    a, b = row.x
    x0, eps = (tuple(-weight / b for weight in weights) for weights in (row.x0, row.eps))
    return Row(row.now, older, x=(-a / b, 1 / b), x0=x0, eps=eps, at=row.at)


def encoding(plan: Plan, clean_as: Level) -> Plan:
    """The plan from a picture to a two-step plan's last two states: DDIM's first rising row, then `reverse`'s.

    Args:
        plan: A two-step plan that ends at clean data.
        clean_as: The level the network is told of clean data.

    Returns:
        A checked plan with as many rows, without `before`: the picture is the second state of its second row.
    """
    back = reverse(plan)
    first = samplers.ddim([plan.end, plan.rows[-1].now], clean_as=clean_as).rows[0]
    about = f"{plan.about}, encode" if plan.about else "encode"
    return replace(back, rows=(first, *back.rows), before=(), about=about).check()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Some pictures' latents.

    Args:
        latents: (N, C, H, W), float32; float64 where the plan has a lattice.
        earlier: Where a latent is two states, the one step before; of the same kind.
        calls: How many network calls it took.
    """

    latents: Tensor
    earlier: Tensor | None
    calls: int


def encode(
    denoise: Denoiser, way: Inversion, pictures: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures to latents.

    Args:
        denoise: The denoiser.
        way: The method and its plans.
        pictures: (N, ...).
        index: What to call each picture in messages, int64, (N,).

    Returns:
        The latents and the states one step before them, (N, ...) each, float64 for a plan with a lattice; and how many
        network calls it took, int64, (N,), the same for all.

    Raises:
        DdimError: If a row cannot be solved, or a state is too large for its lattice.
    """
    before, now, calls = pictures, pictures, 0
    if way.encode_plan is None:
        for solved in invert_rows(denoise, way.decode_plan, pictures, index=index):
            before, now, calls = now, solved.x.to(pictures.dtype), calls + solved.calls
    else:
        for step in trajectory(denoise, way.encode_plan, pictures):
            before, now, calls = now, step.x, calls + 1
            if way.encode_plan.lattice and not (now.abs() <= LARGEST).all():
                wrong = f"makes a state larger than {LARGEST:g}, whose sums would be rounded"
                raise DdimError(f"{way.method}: plan row {step.index}", wrong, "use more steps, or method reversible")
    return now, before, torch.full((len(pictures),), calls)


def _about(grid: str, steps: int) -> str:
    return ", ".join(part for part in (grid, f"S={steps}") if part)


def planned(planner: Planner, method: str, steps: int | None, grid: str | Sequence[float] | None) -> Inversion:
    """The plans of a way to latents and back; the arguments are those of `ddim.Model.inversion`.

    Raises:
        DdimError: If the method is unknown; see `ddim.timesteps.tau`.
    """
    some = steps
    if steps is None and (grid is None or isinstance(grid, str)):
        some = planner._default(WAY_STEPS, method == "fixed-point" and grid is None)
    levels = timesteps.sampling_levels(planner.schedule, planner.predicts, DEFAULT if grid is None else grid, some)
    label = (DEFAULT if grid is None else grid) if grid is None or isinstance(grid, str) else "own grid"
    if method == "fixed-point" and grid is None:
        times = graded_timesteps(planner.schedule, len(levels) - 1, levels[0].t)
        levels, label = planner.schedule.levels(times[::-1]), "graded"
    return make_inversion(method, levels, planner.schedule.level(1), label)
