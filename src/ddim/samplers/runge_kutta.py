"""Solvers of the DDIM ODE, eq. (14), other than Euler in v: Euler in time, and Runge-Kutta methods in v."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.schedule import Level, Schedule
from ddim.samplers.ddim import ddim


def probability_flow(levels: Sequence[Level], about: str = "") -> Plan:
    """Eq. (15): x_s / sqrt(abar_s) = x_t / sqrt(abar_t) + 1/2 (v_s^2 - v_t^2) / v_t eps_theta, v^2 = (1 - abar) / abar.

    Euler in time on the probability flow: the same ODE as `ddim`, discretised differently. If eps is constant, `ddim`
    is exact and this step has the error (v_s - v_t)^2 / (2 v_t) eps: it is accurate only for small steps
    (`Plan.straight`).

    Args:
        levels: S + 1 levels with signal, the start first; falling, or rising from a level above t = 0.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If there are no steps, or levels neither fall nor rise throughout, have no signal, or rise from clean
            data.
    """
    rows = []
    for now, following in ((row.now, row.next) for row in _euler_rows(levels, "eq. (15)")):
        if now.ratio == 0:
            raise DdimError("levels", "rise from clean data, where eq. (15) divides by 0", "start above t = 0")
        slope = (following.ratio**2 - now.ratio**2) / (2 * now.ratio)
        rows.append(_stage(now, now, following, slope))
    return Plan("probability-flow", tuple(rows), about=_about(about, levels), straight=False).check()


def runge_kutta(
    levels: Sequence[Level], schedule: Schedule, order: int = 4, clean_as: Level | None = None, about: str = ""
) -> Plan:
    """Explicit Runge-Kutta on eq. (14) in v: Heun's method (order 2) or the classical one (order 4).

    Each stage is a row and one network evaluation: 2 or 4 per step. Stages in the middle of a step are at half the
    change of v, usually at a non-integer timestep. A step that ends or starts at t = 0, where no network is trained, is
    one row of `ddim`: an Euler step, exact if eps is constant over it. These methods suit steps of about equal ratios
    of v, as with the spacing log-snr; over a long step at large v, such as the first of equal-angle, Euler's method is
    better.

    Args:
        levels: S + 1 levels of the schedule, with signal, the start first; falling, or rising to encode.
        schedule: Gives the timesteps of the middle stages.
        order: 2 or 4.
        clean_as: As for `ddim`: the level passed to the network for clean data when encoding starts at t = 0.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S x order rows, or of (S - 1) x order + 1 if a step starts or ends at t = 0.

    Raises:
        DdimError: If the order is unknown, there are no steps, or levels neither fall nor rise throughout, have no
            signal or are not the schedule's.
    """
    if order not in (2, 4):
        raise DdimError(f"order {order}", "is unknown", "choose 2 (Heun) or 4 (classical Runge-Kutta)")
    rows: list[Row] = []
    for euler in _euler_rows(levels, "Runge-Kutta in v", clean_as):
        if 0 in (euler.now.ratio, euler.next.ratio):
            rows.append(euler)
        elif order == 2:
            rows += _heun(euler.now, euler.next)
        else:
            rows += _classical(euler.now, euler.next, schedule)
    plan = Plan("runge-kutta", tuple(rows), about=_about(about, levels, f"order={order}"))
    return plan.check().check_schedule(schedule)


def _euler_rows(levels: Sequence[Level], method: str, clean_as: Level | None = None) -> tuple[Row, ...]:
    """The steps as rows of `ddim`, which validates the levels' order; raises a DdimError where v is infinite."""
    rows = ddim(levels, clean_as=clean_as).rows
    for level in levels:
        if math.isinf(level.ratio):
            problem = f"has no signal: v = sqrt((1 - alpha_bar) / alpha_bar) of {method} is infinite there"
            raise DdimError(f"level t = {level.t:g}", problem, "start below it, or use ddim")
    return rows


def _heun(now: Level, following: Level) -> list[Row]:
    h = following.ratio - now.ratio
    return [_stage(now, now, following, h), _stage(now, following, following, h / 2, h / 2)]


def _classical(now: Level, following: Level, schedule: Schedule) -> list[Row]:
    log_snr = -2 * math.log((now.ratio + following.ratio) / 2)
    middle = Level(schedule.time_at_log_snr(log_snr), log_snr)
    h = following.ratio - now.ratio
    return [
        _stage(now, now, middle, h / 2),
        _stage(now, middle, middle, h / 2, 0.0),
        _stage(now, middle, following, h, 0.0, 0.0),
        _stage(now, following, following, h / 6, h / 3, h / 3, h / 6),
    ]


def _stage(first: Level, now: Level, following: Level, *slopes: float) -> Row:
    """A row that adds slopes times the step's predictions, newest first, to xbar of the step's first state."""
    past = (0.0,) * (len(slopes) - 1)
    eps = tuple(following.signal * slope for slope in slopes)
    return Row(now, following, x=(*past, following.signal / first.signal), eps=eps)


def _about(about: str, levels: Sequence[Level], setting: str = "") -> str:
    rising = levels[-1].log_snr < levels[0].log_snr
    return ", ".join(part for part in (about, setting, "encode" if rising else "") if part)
