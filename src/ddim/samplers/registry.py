"""Samplers by name, the recommended samplers, and plans from a user's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ddim.errors import DdimError, either, warn
from ddim.names import Predicts
from ddim.plan.categorical import CategoricalPlan
from ddim.plan.plan import Plan
from ddim.process import timesteps
from ddim.process.categorical import Alphabet
from ddim.process.schedule import Level, Schedule, linear
from ddim.process.start import default_steps, start_time
from ddim.process.timesteps import DEFAULT
from ddim.samplers.categorical import DISCRETE, discrete, discrete_markov
from ddim.samplers.ddim import ddim
from ddim.samplers.multistep import Coordinate, Quantity, adams_bashforth, deis, dpm_solver_pp, ipndm, unipc
from ddim.samplers.runge_kutta import probability_flow, runge_kutta
from ddim.samplers.settings import STEPS, SamplerSettings

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

    SETTINGS: ClassVar = frozenset({"steps", "grid", "eta", "sigma", "clip_x0", "encode", "top", "sampler"})
    """The settings that these samplers have."""

    def plan(self, settings: SamplerSettings, default: int = STEPS) -> Plan:
        """The plan of a user's settings. An encoding plan clips only if `clip_x0` is true.

        Args:
            settings: The settings.
            default: The number of steps of a named spacing if `settings.steps` is None, at most the timesteps.

        Raises:
            DdimError: See `ddim.timesteps.tau` and `ddim.samplers.ddim`; or if the sampler does not support a setting.
        """
        settings.require(self.SETTINGS, "real-valued data")
        steps, grid, sampler, clip_x0 = settings.steps, settings.grid, settings.sampler, settings.clip_x0
        eta, chosen = settings.eta or 0.0, ""
        if sampler == "auto":
            sampler = "ddim"
            plain = clip_x0 is None or self.predicts == "eps" or self.clipping is not None
            if plain and settings.passed().keys() <= {"steps", "clip_x0"}:
                sampler, grid = recommended(
                    self.default_steps(default) if steps is None else steps, self.schedule, self.predicts
                )
                chosen = "auto: "
        grid = DEFAULT if grid is None else grid
        if steps is None and isinstance(grid, str):
            steps = self.default_steps(default)
        if clip_x0 is None and not settings.encode and self.clipping is not None and (why := self.clipping()):
            clip_x0 = True
            warn(f"x0 is clipped to [-1, 1] in every step, {why}", either("use clip_x0=False to disable it"))
        asked = settings.grid is not None
        levels = timesteps.sampling_levels(
            self.schedule, self.predicts, grid, steps, settings.encode, settings.top, asked
        )
        clean_as = self.schedule.level(1) if settings.encode else None
        about = f"{chosen}{grid if isinstance(grid, str) else 'custom grid'}, S={len(levels) - 1}"
        if sampler == "ddim":
            if settings.sigma == "learned" and not self.learned:
                raise DdimError("sigma learned", "this network predicts no variance", "use eta, hat or optimal")
            return ddim(levels, eta, settings.sigma, clip_x0, clean_as, about, self.error_at)
        if eta or settings.sigma is not None:
            raise DdimError(f"sampler {sampler}", "adds no noise", "omit eta and sigma, or use ddim")
        plan = replace(named(sampler, levels, self.schedule, clean_as, about), clip_x0=bool(clip_x0))
        if plan.nfe != len(levels) - 1:
            warn(f"sampler {sampler}: {len(levels) - 1} steps use {plan.nfe} network evaluations")
        return plan

    def default_steps(self, steps: int, above_first: bool = False) -> int:
        """A default number of steps, bounded by the number of timesteps, or by one less with `above_first`."""
        bound = default_steps(steps, self.schedule, self.predicts)
        last = start_time(self.schedule, self.predicts)
        return max(1, min(bound, last - 1)) if above_first else bound


@dataclass(frozen=True, slots=True)
class CategoricalPlanner:
    """Creates plans for one network of discrete data.

    Args:
        schedule: Its noise schedule.
        alphabet: The alphabet of x_t and the distribution that noise is drawn from.
    """

    schedule: Schedule
    alphabet: Alphabet
    predicts: ClassVar[Predicts] = "x0"
    SETTINGS: ClassVar = frozenset({"steps", "grid", "eta", "sampler", "temperature", "top_p"})
    """The settings that these samplers have."""

    def plan(self, settings: SamplerSettings, default: int = STEPS) -> CategoricalPlan:
        """The plan of a user's settings; `default` is the number of steps if `settings.steps` is None.

        Raises:
            DdimError: If a setting is out of range, or is not one of these samplers.
        """
        settings.require(self.SETTINGS, "discrete data")
        sampler = "ddim" if settings.sampler == "auto" else settings.sampler
        if sampler not in DISCRETE:
            names = ", ".join(DISCRETE)
            raise DdimError(f"sampler {sampler!r}", "is not one of discrete data", f"choose one of {names}")
        if sampler == "markov" and settings.eta:
            raise DdimError("sampler markov", "has no eta", "leave eta out, or use ddim")
        grid, steps = DEFAULT if settings.grid is None else settings.grid, settings.steps
        if steps is None and isinstance(grid, str):
            steps = self.default_steps(default)
        levels = timesteps.sampling_levels(self.schedule, self.predicts, grid, steps)
        about = f"{grid if isinstance(grid, str) else 'custom grid'}, S={len(levels) - 1}"
        temperature = 1.0 if settings.temperature is None else settings.temperature
        top_p = 1.0 if settings.top_p is None else settings.top_p
        if sampler == "markov":
            return discrete_markov(levels, self.alphabet, temperature, top_p, about)
        return discrete(levels, self.alphabet, settings.eta or 0.0, temperature, top_p, about)

    def default_steps(self, steps: int) -> int:
        """A default number of steps, bounded by the number of timesteps."""
        return default_steps(steps, self.schedule, self.predicts)
