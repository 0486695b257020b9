"""The samplers that commands know by name: from levels to plans, without noise but for `ddim`'s own settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ddim.denoiser import Predicts
from ddim.errors import DdimError
from ddim.plan import Plan
from ddim.samplers.ddim import ddim
from ddim.samplers.multistep import Coordinate, Quantity, adams_bashforth, deis, dpm_solver_pp, ipndm, unipc
from ddim.samplers.ode import probability_flow, runge_kutta
from ddim.schedule import Level, Schedule, linear

Levels = Sequence[Level]
Maker = Callable[[Levels, Schedule, Level | None, str], Plan]


def named(name: str, levels: Levels, schedule: Schedule, clean_as: Level | None = None, about: str = "") -> Plan:
    """The plan of a sampler by name.

    Args:
        name: One of `NAMED`.
        levels: S + 1 levels of the schedule, the start first; falling, or rising to encode.
        schedule: Where stages between two levels take their times from.
        clean_as: The level the network is told for clean data, when encoding starts at t = 0.
        about: Settings to add to the plan's name.

    Raises:
        DdimError: If there is no such sampler, or the levels do not suit it.
    """
    if name not in NAMED:
        raise DdimError(f"sampler {name!r}", "is unknown", f"choose one of {', '.join(NAMED)}")
    return NAMED[name](levels, schedule, clean_as, about)


def _adams(order: int, quantity: Quantity, coordinate: Coordinate | None = None) -> Maker:
    return lambda levels, _, clean, about: adams_bashforth(levels, order, quantity, coordinate, clean, about)


def _steps(make: Callable[..., Plan], order: int) -> Maker:
    return lambda levels, _, clean, about: make(levels, order, clean_as=clean, about=about)


def _stages(order: int) -> Maker:
    return lambda levels, schedule, clean, about: runge_kutta(levels, schedule, order, clean, about)


NAMED: dict[str, Maker] = {
    "ddim": lambda levels, _, clean, about: ddim(levels, clean_as=clean, about=about),
    **{f"ab{order}": _adams(order, "eps") for order in (2, 3, 4)},
    **{f"ab{order}-v": _adams(order, "v") for order in (2, 3, 4)},
    **{f"ipndm{order}": _steps(ipndm, order) for order in (2, 3, 4)},
    **{f"deis{order}": _steps(deis, order) for order in (2, 3, 4)},
    "dpm++2m": _steps(dpm_solver_pp, 2),
    "dpm++3m": _steps(dpm_solver_pp, 3),
    "unipc2": _steps(unipc, 2),
    "unipc3": _steps(unipc, 3),
    "heun": _stages(2),
    "rk4": _stages(4),
    "probability-flow": lambda levels, _, clean, about: probability_flow(levels, about),
}


def recommended(steps: int, schedule: Schedule, predicts: Predicts) -> tuple[str, str]:
    """The sampler and the grid that docs/solvers.md recommends for so many steps.

    Networks that predict v or x_0 on the paper's schedule have those that were measured on such models; the grid
    `quadratic`, floor(T (i / S)^2), has S times as long as S^2 is at most T.

    Args:
        steps: S.
        schedule: The noise schedule.
        predicts: What the network predicts.
    """
    if predicts == "eps" or schedule != linear():
        return "unipc2", "angle-log-snr"
    if steps**2 > schedule.T:
        return "unipc3", "log-snr"
    return "ipndm3" if steps <= 10 else "ipndm4", "quadratic"


# Those with one call in every step, and exact on straight lines: what a plan of so many calls may be.
ONE_CALL = tuple(name for name in NAMED if name not in ("heun", "rk4", "probability-flow"))
