"""Tuning: the times and the weights of a plan, found for one denoiser and a number of network calls.

Data-free. Pilot samples are solved with many calls (the teacher); then

1. every sampler is tried on the fixed grids, and on one found by dynamic programming over the cost of DDIM's own jumps
   along the teacher's paths;
2. weights are fitted (`fitted`): each row's by least squares to the teacher's state at its end, held to straight lines;
3. the times are searched, one after another, for the smallest distance to the teacher's ends, all on the same pilots.

What was found is held, on pilots that nothing was fitted to, against plans that are not tuned: the default, and the
best of the fixed grids (all on a few pilots, the best of them on all). The nearest there is taken.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ddim.errors import DdimError, DdimWarning
from ddim.names import Predicts
from ddim.plan.plan import Plan
from ddim.process import timesteps
from ddim.process.parameterization import Denoiser
from ddim.process.schedule import Level, Schedule
from ddim.process.start import start_time
from ddim.samplers import ONE_CALL, named, recommended
from ddim.sampling.fitting import CachedDenoiser, ReferenceSolution, fitted, rms
from ddim.sampling.loop import run

GRIDS = ("equal-angle", "quadratic", "log-snr", "linear")
CHEAPEST = "dynamic programming"
SCREEN = 8  # pilots on which every sampler is tried with every grid
SHORT = 12  # of the untuned ones, how many go on to all pilots that are not held out
BEST = 4  # and of these, how many to the held-out ones
STRIDES = (0.5, 0.3, 0.18, 0.11)  # by which log(noise / signal) of a time is moved


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came out.

    Args:
        plan: The plan to use.
        error: Its root mean square distance to the teacher's ends on held-out pilots, per dimension.
        untuned: The best plan that was not tuned, by name and grid.
        untuned_error: Its distance there.
        won: Whether `plan` is the tuned one.
    """

    plan: Plan
    error: float
    untuned: Plan
    untuned_error: float
    tuned_wins: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a tuning stands.

    Args:
        stage: What is being done.
        done: Parts done.
        total: Of so many, about.
        found: The result, at the end.
    """

    stage: str
    done: int
    total: int
    found: Tuned | None = None


def jump_cost(teacher: ReferenceSolution) -> np.ndarray:
    """Entry (i, j), i < j: the root mean square error of DDIM's one step from the teacher's state i to its state j."""
    levels, states = teacher.levels, teacher.states
    cost = np.full((len(levels), len(levels)), math.inf)
    for i, j in itertools.combinations(range(len(levels)), 2):
        step = teacher.steps[i]
        made = step.x0 * levels[j].signal + step.eps * levels[j].noise
        cost[i, j] = rms(made, states[j])
    return cost


def cheapest_path(cost: np.ndarray, steps: int) -> list[int]:
    """The nodes of the path of so many steps from the first to the last with the least total cost."""
    last = len(cost) - 1
    value = np.full(len(cost), math.inf)
    value[last] = 0.0
    choices = []
    for _ in range(steps):
        through = cost + value[None, :]
        choices.append(through.argmin(1))
        value = through.min(1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path


FITTED = "fitted"


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A plan on the way: how it was made, and how far from the teacher it ends on the pilots."""

    solver: str
    about: str
    levels: tuple[Level, ...]
    plan: Plan
    error: float

    def renamed(self, pilots: int) -> Plan:
        """The plan as a tuned one."""
        return replace(self.plan, sampler="tuned", about=f"{self.solver}, {self.about}, {pilots} pilots")


def iter_tuning(
    denoise: Denoiser,
    schedule: Schedule,
    calls: int,
    pilots: Tensor,
    solver: str = FITTED,
    size: int = 8,
    predicts: Predicts = "v",
) -> Iterator[Progress]:
    """Find a plan for a denoiser and a number of network calls; the same pilots give the same plan.

    Args:
        denoise: The denoiser.
        schedule: Its schedule.
        calls: Network calls of the plan, 2 or more.
        pilots: x_T of the pilot samples, (N, ...), N at least 4 and even: the second half is held out.
        solver: "fitted", or one of `ddim.samplers.ONE_CALL` whose times alone are searched.
        size: Samples the denoiser sees at once.
        predicts: What its network predicts: plans and reference start where `ddim.process.start.start_time` says.

    Yields:
        `Progress`; the last one with what was found.

    Raises:
        DdimError: If the solver is unknown, or there are too few calls or pilots.
    """
    top, half = start_time(schedule, predicts), len(pilots) // 2
    _refuse(schedule, calls, pilots, solver, top)
    memo, teachers = (
        CachedDenoiser(denoise, size),
        (ReferenceSolution(schedule, top=top), ReferenceSolution(schedule, top=top)),
    )
    total, done = 2 * len(teachers[0].plan), 0
    for teacher, start, kept in zip(teachers, (pilots[:half], pilots[half:]), (True, False), strict=True):
        for _ in teacher.solve(CachedDenoiser(denoise, size, keep=0), start, kept):
            done += 1
            yield Progress("teacher", done, total)
    teacher, held = teachers
    bench = _Evaluator(memo, schedule, teacher)
    untuned: list[_Candidate] = []
    tuned: list[_Candidate] = []
    path = bench.cheapest(calls)
    grids: dict[str, Sequence[float]] = {**_grids(schedule, calls, top), CHEAPEST: path}
    for name, times in grids.items():
        for sampler in ONE_CALL:
            (tuned if times is path else untuned).append(bench.attempt(sampler, name, times, SCREEN))
            yield Progress("samplers x grids", len(untuned) + len(tuned), len(grids) * len(ONE_CALL))
    untuned, tuned = bench.best(untuned, SHORT)[:BEST], bench.best(tuned, 2)[:1]
    sampler, name = recommended(calls, schedule, predicts)
    untuned.append(bench.attempt(sampler, name, grids.get(name) or timesteps.tau(schedule, name, calls, top)))
    starts = [bench.attempt(solver, name, times) for name, times in grids.items()]
    best = min(starts, key=lambda one: one.error)
    for done, total, best in _search(bench, best):  # noqa: B007, B020
        yield Progress("times", done, total)
    found = []
    for place, one in enumerate((best, *tuned, *untuned)):
        error = rms(run(CachedDenoiser(denoise, size, keep=0), one.plan, held.start), held.end)
        found.append((error, place, one.renamed(len(pilots)) if place <= len(tuned) else one.plan))
        yield Progress("held out", place + 1, 1 + len(tuned) + len(untuned))
    nearest, beside = min(found), min(found[1 + len(tuned) :])
    result = Tuned(nearest[2], nearest[0], beside[2], beside[0], nearest[1] <= len(tuned))
    yield Progress("held out", len(found), len(found), result)


@dataclass(frozen=True, slots=True)
class _Evaluator:
    """Where plans are tried: the denoiser that remembers, and the teacher of the pilots that plans are fitted to."""

    memo: CachedDenoiser
    schedule: Schedule
    teacher: ReferenceSolution

    def attempt(self, solver: str, name: str, times: Sequence[float], few: int | None = None) -> _Candidate:
        """A plan of a solver at rising times, and its error on the first `few` pilots, or all."""
        levels = self.schedule.levels([*reversed(times), 0.0])
        about = f"{name}, S={len(times)}"
        if solver == FITTED:
            plan = replace(fitted(self.memo, levels, self.teacher.start, self.teacher.at), about=about)
        else:
            plan = named(solver, levels, self.schedule, about=about)
        return self.measured(_Candidate(solver, name, levels, plan, math.nan), few)

    def measured(self, one: _Candidate, few: int | None = None) -> _Candidate:
        """It with its error on the first `few` pilots, or all."""
        end = run(self.memo, one.plan, self.teacher.start[:few])
        return replace(one, error=rms(end, self.teacher.end[:few]))

    def best(self, tried: Sequence[_Candidate], count: int) -> list[_Candidate]:
        """The best few on the pilots they were tried on, the nearest on all pilots first."""
        some = sorted(tried, key=lambda one: one.error)[:count]
        return sorted((self.measured(one) for one in some), key=lambda one: one.error)

    def cheapest(self, calls: int) -> list[float]:
        """The rising times of dynamic programming."""
        path = cheapest_path(jump_cost(self.teacher), calls)
        return [self.teacher.levels[place].t for place in reversed(path[:-1])]


def _search(bench: _Evaluator, best: _Candidate) -> Iterator[tuple[int, int, _Candidate]]:
    """One time after another is moved both ways in log(noise / signal), by less and less; what is nearer is kept."""
    moves = [*itertools.product(STRIDES, range(1, len(best.levels) - 1))]
    for done, (stride, place) in enumerate(moves):
        for way in (1, -1):
            yield done, len(moves), best
            times = _moved(bench.schedule, best.levels, place, way * stride)
            trial = bench.attempt(best.solver, "times searched", times) if times else best
            if trial.error < best.error:
                best = trial
                break
    yield len(moves), len(moves), best


def _moved(schedule: Schedule, levels: Sequence[Level], place: int, by: float) -> list[float] | None:
    """Rising times, one of them moved in log(noise / signal); None where it would meet its neighbour or pass t = 1."""
    moved, last = levels[place].log_snr - 2 * by, place + 2 == len(levels)
    cleaner = schedule.level(1).log_snr if last else levels[place + 1].log_snr - 1e-3
    if not levels[place - 1].log_snr + 1e-3 < moved <= cleaner:
        return None
    times = [level.t for level in reversed(levels[:-1])]
    times[-1 - place] = schedule.time_at_log_snr(moved)
    return times


def _grids(schedule: Schedule, calls: int, top: int) -> dict[str, Sequence[float]]:
    """Rising times by the grid's name: those of `GRIDS` that have so many and start at `top`."""
    found: dict[str, Sequence[float]] = {}
    for name in GRIDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DdimWarning)
            times = timesteps.tau(schedule, name, calls, top)
        if len(times) == calls and times[-1] == top:
            found[name] = times
    return found


def _refuse(schedule: Schedule, calls: int, pilots: Tensor, solver: str, top: int) -> None:
    most = min(top, len(ReferenceSolution(schedule, top=top).plan)) // 2
    if not 2 <= calls <= most:
        raise DdimError(f"calls {calls}", f"is outside 2..{most}", "choose a number of calls that needs tuning")
    if len(pilots) < 4 or len(pilots) % 2:
        raise DdimError(f"{len(pilots)} pilots", "cannot be halved into two that are measured", "give 128 or more")
    if solver != FITTED and solver not in ONE_CALL:
        raise DdimError(f"solver {solver!r}", "is unknown", f"choose one of {', '.join((FITTED, *ONE_CALL))}")
