"""DDIM inversion, approximate and exact. docs/inversion.md compares the methods.

Two-step plans are inverted algebraically (`reverse`), one-step plans by solving each row for its input state
(`ddim.sampling.fixed_point.invert_rows`). Both work for any sampler whose plan has the required form.
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
from ddim.samplers.registry import INVERSION_STEPS, Planner
from ddim.sampling.fixed_point import invert_rows
from ddim.sampling.loop import trajectory

LATTICE = 2.0**-32
LARGEST = 2.0**20  # sums of states up to this size on the lattice are exact in float64
GROWTH = 2.0  # factor between the first steps of `graded_timesteps`


@dataclass(frozen=True, slots=True)
class Inversion:
    """An inversion method: its encoding and decoding plans.

    Args:
        method: Its name, one of `METHODS`.
        decode_plan: The plan from latents to images.
        encode_plan: The plan from images to latents; None if `decode_plan` is solved row by row.
    """

    method: str
    decode_plan: Plan
    encode_plan: Plan | None

    @property
    def two_state(self) -> bool:
        """Whether a latent consists of two states, x_T and the state one step before it."""
        return any(len(row.x) == 2 for row in self.decode_plan.rows)

    @property
    def resume_plan(self) -> Plan:
        """The plan that decodes the latents; with two states it starts from both, see `Plan.before`."""
        return drop_first(self.decode_plan) if self.two_state else self.decode_plan


def make_inversion(method: str, levels: Sequence[Level], first: Level, about: str = "") -> Inversion:
    """The plans of an inversion method.

    Args:
        method: One of `METHODS`.
        levels: S + 1 falling levels to clean data.
        first: The level of t = 1, at which the network is evaluated on clean data; with "fixed-point" the level that
            images are taken to have.
        about: The name of the timesteps.

    Raises:
        DdimError: If the method is unknown, or the levels are too few or do not fall.
    """
    if method not in METHODS:
        raise DdimError(f"method {method!r}", "is unknown", f"choose one of {', '.join(METHODS)}")
    if method == "fixed-point":
        above = [level for level in levels if level.t > first.t]
        if len(above) < len(levels) - 1 and levels[-1].t < first.t:
            warn(f"fixed-point: {len(above)} steps end at t = {first.t:g}, where the image is used as x")
        return Inversion(method, samplers.ddim([*above, first], about=_about(about, len(above))), None)
    name = _about(about, len(levels) - 1)
    if method in ("ddim", "ddim-target"):
        encode_plan = (
            samplers.ddim(levels[::-1], clean_as=first, about=name)
            if method == "ddim"
            else samplers.ddim_target(levels[::-1], name)
        )
        return Inversion(method, samplers.ddim(levels, about=name), encode_plan)
    decode_plan = samplers.bdia(levels, lattice=LATTICE if method == "lossless" else 0.0, about=name)
    return Inversion(method, decode_plan, encoding(decode_plan, first))


def graded_timesteps(schedule: Schedule, steps: int, top: float) -> list[float]:
    """S + 1 rising integer times from 1 to `top`: steps that first grow by a factor, `GROWTH`, then equal rotations.

    A DDIM step to t = 1 from a much noisier level is nearly impossible to invert at a real image: off the data, the
    network's x_0 hardly depends on x. Equal steps of angle + k log(angle) grow by the factor 2 near t = 1 (by more if
    that would take over 0.6 of the steps) and are equal rotations at higher times.

    Args:
        schedule: The schedule.
        steps: S, at least 1.
        top: The last time, an integer.

    Raises:
        DdimError: If there are not S + 1 integer times.
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
    """A plan without its first row: it starts from the second state, with the first one as an earlier state.

    Raises:
        DdimError: If the plan has one row only.
    """
    if len(plan) < 2:
        raise DdimError("plan", "has one row, and two states need two", "use 2 steps or more")
    return replace(plan, rows=plan.rows[1:], before=(plan.start,))


def reverse(plan: Plan) -> Plan:
    """The inverse of a two-step plan: x_{k-1} = (x_{k+1} - a x_k - P x0_k - E eps_k) / b.

    Each row becomes a row of the same form, in the opposite order. x0_k and eps_k are the same prediction at the same
    state, so the inverse is exact up to rounding; on a lattice with b = 1 it is exact, because every weight is only
    negated. The final state is the plan's earlier state, or its first state if the plan starts from one.

    Args:
        plan: Without noise; rows from the second on (from the first, if the plan has `before`) have two weights of
            states, the older one not 0, and predictions of the newest state only.

    Returns:
        A checked plan that starts at the level of the plan's last evaluation, with the plan's end as `before`.

    Raises:
        DdimError: If a row does not have this form; it names the first such row.
    """
    skipped = 0 if plan.before else 1
    two_state = plan if plan.before else drop_first(plan)
    if len(two_state.before) != 1:
        raise DdimError("plan", f"starts from {1 + len(plan.before)} states", "use one that starts from 1 or 2")
    for k, row in enumerate(two_state.rows):
        valid = len(row.x) == 2 and row.x[1] != 0 and max(len(row.x0), len(row.eps)) <= 1 and row.z == row.sigma == 0
        if not valid:
            where = f"plan row {k + skipped} (t = {row.now.t:g} to {row.next.t:g})"
            problem = "cannot be inverted: it must weigh two states and one prediction, without noise"
            raise DdimError(
                where, problem, "use a two-step plan, such as samplers.bdia, or ddim.sampling.fixed_point.invert_rows"
            )
    past = [*two_state.before, *(row.now for row in two_state.rows)]
    rows = [_reverse_row(row, older) for row, older in zip(two_state.rows, past, strict=False)]
    return replace(two_state, rows=tuple(rows[::-1]), before=(two_state.end,)).check()


def _reverse_row(row: Row, older: Level) -> Row:
    a, b = row.x
    x0, eps = (tuple(-weight / b for weight in weights) for weights in (row.x0, row.eps))
    return Row(row.now, older, x=(-a / b, 1 / b), x0=x0, eps=eps, at=row.at)


def encoding(plan: Plan, clean_as: Level) -> Plan:
    """The plan that encodes an image to the two latent states of a two-step plan: a rising DDIM row, then `reverse`.

    Args:
        plan: A two-step plan that ends at clean data.
        clean_as: The level at which the network is evaluated on clean data.

    Returns:
        A checked plan of as many rows, without `before`: the image is the older state of its second row.
    """
    back = reverse(plan)
    first = samplers.ddim([plan.end, plan.rows[-1].now], clean_as=clean_as).rows[0]
    about = f"{plan.about}, encode" if plan.about else "encode"
    return replace(back, rows=(first, *back.rows), before=(), about=about).check()


@dataclass(frozen=True, slots=True)
class Encoded:
    """The latents of images.

    Args:
        latents: (N, C, H, W), float32; float64 if the plan has a lattice.
        earlier: If a latent consists of two states, the state one step before, of the same shape and dtype.
        nfe: Number of network evaluations.
    """

    latents: Tensor
    earlier: Tensor | None
    nfe: int


def encode(
    denoise: Denoiser, inversion: Inversion, images: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode images to latents.

    Args:
        denoise: The denoiser.
        inversion: The inversion method with its plans.
        images: Images, (N, ...).
        index: The images' numbers in error messages, int64, (N,).

    Returns:
        The latents and the states one step before them, (N, ...) each, float64 for a plan with a lattice; and the
        number of network evaluations, int64, (N,), the same for all.

    Raises:
        DdimError: If a row cannot be solved, or a state is too large for its lattice.
    """
    before, now, nfe = images, images, 0
    if inversion.encode_plan is None:
        for solved in invert_rows(denoise, inversion.decode_plan, images, index=index):
            before, now, nfe = now, solved.x.to(images.dtype), nfe + solved.nfe
    else:
        for step in trajectory(denoise, inversion.encode_plan, images):
            before, now, nfe = now, step.x, nfe + 1
            if inversion.encode_plan.lattice and not (now.abs() <= LARGEST).all():
                problem = f"yields a state above {LARGEST:g}, whose sums would be rounded"
                where = f"{inversion.method}: plan row {step.index}"
                raise DdimError(where, problem, "use more steps, or method reversible")
    return now, before, torch.full((len(images),), nfe)


def _about(grid: str, steps: int) -> str:
    return ", ".join(part for part in (grid, f"S={steps}") if part)


def plan_inversion(planner: Planner, method: str, steps: int | None, grid: str | Sequence[float] | None) -> Inversion:
    """The plans of an inversion method, with the arguments of `ddim.Model.inversion`.

    Raises:
        DdimError: If the method is unknown; see `ddim.timesteps.tau`.
    """
    count = steps
    if steps is None and (grid is None or isinstance(grid, str)):
        count = planner.default_steps(INVERSION_STEPS, method == "fixed-point" and grid is None)
    levels = timesteps.sampling_levels(planner.schedule, planner.predicts, grid, count)
    label = (DEFAULT if grid is None else grid) if grid is None or isinstance(grid, str) else "custom grid"
    if method == "fixed-point" and grid is None:
        times = graded_timesteps(planner.schedule, len(levels) - 1, levels[0].t)
        levels, label = planner.schedule.levels(times[::-1]), "graded"
    return make_inversion(method, levels, planner.schedule.level(1), label)
