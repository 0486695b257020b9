"""Samplers by name, the recommended samplers, and plans from a user's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ddim.errors import DdimError, either, warn
from ddim.names import Predicts
from ddim.plan.plan import Plan
from ddim.process import timesteps
from ddim.process.schedule import Level, Schedule, linear
from ddim.process.start import default_steps, start_time
from ddim.process.timesteps import DEFAULT
from ddim.samplers.ddim import ddim
from ddim.samplers.multistep import Coordinate, Quantity, adams_bashforth, deis, dpm_solver_pp, ipndm, unipc
from ddim.samplers.runge_kutta import probability_flow, runge_kutta

Levels = Sequence[Level]
Factory = Callable[[Levels, Schedule, Level | None, str], Plan]

INVERSION_STEPS = 50


def named(name: str, levels: Levels, schedule: Schedule, clean_as: Level | None = None, about: str = "") -> Plan:
    """The plan of a sampler by name.

    Args:
        name: One of `SAMPLERS`.
        levels: S + 1 levels of the schedule, the start first; falling, or rising to encode.
        schedule: Gives the timesteps of stages between two levels.
        clean_as: The level passed to the network for clean data when encoding starts at t = 0.
        about: Settings to add to the plan's name.

    Raises:
        DdimError: If there is no such sampler, or the levels do not suit it.
    """
    if name not in SAMPLERS:
        raise DdimError(f"sampler {name!r}", "is unknown", f"choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name](levels, schedule, clean_as, about)


def _adams(order: int, quantity: Quantity, coordinate: Coordinate | None = None) -> Factory:
    return lambda levels, _, clean, about: adams_bashforth(levels, order, quantity, coordinate, clean, about)


def _steps(sampler: Callable[..., Plan], order: int) -> Factory:
    return lambda levels, _, clean, about: sampler(levels, order, clean_as=clean, about=about)


def _stages(order: int) -> Factory:
    return lambda levels, schedule, clean, about: runge_kutta(levels, schedule, order, clean, about)


SAMPLERS: dict[str, Factory] = {
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
    """The names of the sampler and the spacing that docs/solvers.md recommends for a number of steps.

    For networks that predict v or x_0 on the paper's schedule, they are those measured on such models; the spacing
    `quadratic`, floor(T (i / S)^2), has S distinct timesteps only if S^2 is at most T.

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


# The samplers with one network evaluation per step that are exact on straight lines.
ONE_EVALUATION = tuple(name for name in SAMPLERS if name not in ("heun", "rk4", "probability-flow"))


@dataclass(frozen=True, slots=True)
class Planner:
    """Creates plans for one network.

    Args:
        schedule: Its noise schedule.
        predicts: What it predicts: "eps", "x0" or "v".
        error_at: E ||eps - eps_theta||^2 / d at a level, for sigma "optimal"; None if it was not measured.
        learned: Whether the network predicts a variance, for sigma "learned".
        clipping: Called for sampling plans if `clip_x0` is None. Returns the reason why x_0 is clipped, or "" if it is
            not. It may raise a DdimError.
    """

    schedule: Schedule
    predicts: Predicts
    error_at: Callable[[Level], float] | None = None
    learned: bool = False
    clipping: Callable[[], str] | None = None

    def plan(
        self,
        steps: int | None,
        grid: str | Sequence[float] | None,
        eta: float,
        sigma: Sequence[float] | str | None,
        clip_x0: bool | None,
        encode: bool,
        default: int,
        top: int | None,
        sampler: str,
    ) -> Plan:
        """A plan; the arguments are those of `ddim.Model.plan`.

        An encoding plan clips only if `clip_x0` is true.

        Raises:
            DdimError: See `ddim.timesteps.tau` and `ddim.samplers.ddim`; or if the sampler does not support a setting.
        """
        prefix = ""
        if sampler == "auto":
            sampler = "ddim"
            default_clipping = clip_x0 is None or self.predicts == "eps" or self.clipping is not None
            if grid is None and not eta and sigma is None and default_clipping and not encode and top is None:
                count = self._default(default) if steps is None else steps
                sampler, grid = recommended(count, self.schedule, self.predicts)
                prefix = "auto: "
        grid = DEFAULT if grid is None else grid
        if steps is None and isinstance(grid, str):
            steps = self._default(default)
        if clip_x0 is None and not encode and self.clipping is not None and (reason := self.clipping()):
            clip_x0 = True
            warn(f"x0 is clipped to [-1, 1] in every step, {reason}", either("use clip_x0=False to disable it"))
        levels = timesteps.sampling_levels(self.schedule, self.predicts, grid, steps, encode, top)
        clean_as = self.schedule.level(1) if encode else None
        about = f"{prefix}{grid if isinstance(grid, str) else 'custom grid'}, S={len(levels) - 1}"
        if sampler == "ddim":
            if sigma == "learned" and not self.learned:
                raise DdimError("sigma learned", "this network predicts no variance", "use eta, hat or optimal")
            return ddim(levels, eta, sigma, clip_x0, clean_as, about, self.error_at)
        if eta or sigma is not None:
            raise DdimError(f"sampler {sampler}", "adds no noise", "omit eta and sigma, or use ddim")
        plan = replace(named(sampler, levels, self.schedule, clean_as, about), clip_x0=bool(clip_x0))
        if plan.nfe != len(levels) - 1:
            warn(f"sampler {sampler}: {len(levels) - 1} steps use {plan.nfe} network evaluations")
        return plan

    def _default(self, steps: int, above_first: bool = False) -> int:
        """A default number of steps, bounded by the number of timesteps, or by one less with `above_first`."""
        bound = default_steps(steps, self.schedule, self.predicts)
        last = start_time(self.schedule, self.predicts)
        return max(1, min(bound, last - 1)) if above_first else bound
