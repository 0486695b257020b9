"""Tuning: optimising the timesteps and weights of a plan for one denoiser and a number of network evaluations.

No data is needed. Calibration samples are solved with many network evaluations (the reference solution). Then

1. every sampler is evaluated on the standard spacings, and on timesteps from dynamic programming over the error of
   single DDIM steps along the reference paths;
2. weights are fitted (`fitted`): each row's by least squares to the reference state at its end, constrained to be
   exact on straight lines;
3. the timesteps are optimised one at a time for the smallest distance to the reference, on the same samples.

The result is compared, on held-out calibration samples, with untuned plans: the default plan, and the best of the
standard spacings (all of them on a few samples, the best of them on all samples). The plan with the smallest error
there is chosen.
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
from ddim.samplers import ONE_EVALUATION, named, recommended
from ddim.sampling.fitting import CachedDenoiser, ReferenceSolution, fitted, rms
from ddim.sampling.loop import run

SPACINGS = ("equal-angle", "quadratic", "log-snr", "linear")
CHEAPEST = "dynamic programming"
SCREEN = 8  # calibration samples for the first evaluation of every sampler with every spacing
SHORT = 12  # number of untuned plans that are then evaluated on all samples that are not held out
BEST = 4  # number of those that are then evaluated on the held-out samples
STRIDES = (0.5, 0.3, 0.18, 0.11)  # changes of log(noise / signal) tried for each timestep


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result of a tuning.

    Args:
        plan: The plan to use.
        error: Its root mean square distance to the reference solution on held-out samples, per dimension.
        untuned: The best untuned plan.
        untuned_error: The same distance for `untuned`.
        tuned_wins: Whether `plan` is a tuned plan.
    """

    plan: Plan
    error: float
    untuned: Plan
    untuned_error: float
    tuned_wins: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a tuning.

    Args:
        stage: The name of the current stage.
        done: Parts done in this stage.
        total: Approximate number of parts in this stage.
        result: The result, in the last record only.
    """

    stage: str
    done: int
    total: int
    result: Tuned | None = None


def jump_cost(reference: ReferenceSolution) -> np.ndarray:
    """Entry (i, j), i < j: the RMS error of one DDIM step from state i of the reference solution to its state j."""
    levels, states = reference.levels, reference.states
    cost = np.full((len(levels), len(levels)), math.inf)
    for i, j in itertools.combinations(range(len(levels)), 2):
        step = reference.steps[i]
        end = step.x0 * levels[j].signal + step.eps * levels[j].noise
        cost[i, j] = rms(end, states[j])
    return cost


def cheapest_path(cost: np.ndarray, steps: int) -> list[int]:
    """The nodes of the path of `steps` steps from the first to the last node with the smallest total cost."""
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
    """A plan under evaluation: its sampler, timesteps and error against the reference solution."""

    solver: str
    about: str
    levels: tuple[Level, ...]
    plan: Plan
    error: float

    def labelled(self, calibration_samples: int) -> Plan:
        """The plan, labelled as tuned."""
        return replace(self.plan, sampler="tuned", about=f"{self.solver}, {self.about}, {calibration_samples} samples")


def iter_tuning(
    denoise: Denoiser,
    schedule: Schedule,
    nfe: int,
    calibration_samples: Tensor,
    solver: str = FITTED,
    size: int = 8,
    predicts: Predicts = "v",
) -> Iterator[Progress]:
    """Tune a plan for a denoiser and a number of network evaluations; the result is deterministic.

    Args:
        denoise: The denoiser.
        schedule: Its schedule.
        nfe: Network evaluations of the plan, 2 or more.
        calibration_samples: x_T of the calibration samples, (N, ...), N at least 4 and even: the second half is
            held out.
        solver: "fitted", or one of `ddim.samplers.ONE_EVALUATION`, for which only the timesteps are optimised.
        size: Batch size of the denoiser.
        predicts: What its network predicts; it decides where plans and reference start, see
            `ddim.process.start.start_time`.

    Yields:
        `Progress` records; the last one contains the result.

    Raises:
        DdimError: If the solver is unknown, or there are too few network evaluations or calibration samples.
    """
    top, half = start_time(schedule, predicts), len(calibration_samples) // 2
    _check(schedule, nfe, calibration_samples, solver, top)
    cached, references = (
        CachedDenoiser(denoise, size),
        (ReferenceSolution(schedule, top=top), ReferenceSolution(schedule, top=top)),
    )
    total, done = 2 * len(references[0].plan), 0
    for reference, start, path in zip(
        references, (calibration_samples[:half], calibration_samples[half:]), (True, False), strict=True
    ):
        for _ in reference.solve(CachedDenoiser(denoise, size, cache_bytes=0), start, path):
            done += 1
            yield Progress("reference", done, total)
    reference, held_out = references
    evaluator = _Evaluator(cached, schedule, reference)
    untuned: list[_Candidate] = []
    tuned: list[_Candidate] = []
    cheapest = evaluator.cheapest(nfe)
    grids: dict[str, Sequence[float]] = {**_grids(schedule, nfe, top), CHEAPEST: cheapest}
    for name, times in grids.items():
        for sampler in ONE_EVALUATION:
            (tuned if times is cheapest else untuned).append(evaluator.attempt(sampler, name, times, SCREEN))
            yield Progress("samplers x timesteps", len(untuned) + len(tuned), len(grids) * len(ONE_EVALUATION))
    untuned, tuned = evaluator.best(untuned, SHORT)[:BEST], evaluator.best(tuned, 2)[:1]
    sampler, name = recommended(nfe, schedule, predicts)
    untuned.append(evaluator.attempt(sampler, name, grids.get(name) or timesteps.tau(schedule, name, nfe, top)))
    starts = [evaluator.attempt(solver, name, times) for name, times in grids.items()]
    best = min(starts, key=lambda candidate: candidate.error)
    for done, total, best in _search(evaluator, best):  # noqa: B007, B020
        yield Progress("timesteps", done, total)
    results = []
    for index, candidate in enumerate((best, *tuned, *untuned)):
        error = rms(run(CachedDenoiser(denoise, size, cache_bytes=0), candidate.plan, held_out.start), held_out.end)
        results.append(
            (error, index, candidate.labelled(len(calibration_samples)) if index <= len(tuned) else candidate.plan)
        )
        yield Progress("held-out samples", index + 1, 1 + len(tuned) + len(untuned))
    best_result, best_untuned = min(results), min(results[1 + len(tuned) :])
    result = Tuned(best_result[2], best_result[0], best_untuned[2], best_untuned[0], best_result[1] <= len(tuned))
    yield Progress("held-out samples", len(results), len(results), result)


@dataclass(frozen=True, slots=True)
class _Evaluator:
    """Evaluates plans with a cached denoiser against the reference solution of the samples used for fitting."""

    cached: CachedDenoiser
    schedule: Schedule
    reference: ReferenceSolution

    def attempt(self, solver: str, name: str, times: Sequence[float], few: int | None = None) -> _Candidate:
        """A solver's plan at rising times, with its error on the first `few` calibration samples, or all."""
        levels = self.schedule.levels([*reversed(times), 0.0])
        about = f"{name}, S={len(times)}"
        if solver == FITTED:
            plan = replace(fitted(self.cached, levels, self.reference.start, self.reference.at), about=about)
        else:
            plan = named(solver, levels, self.schedule, about=about)
        return self.measured(_Candidate(solver, name, levels, plan, math.nan), few)

    def measured(self, candidate: _Candidate, few: int | None = None) -> _Candidate:
        """The candidate with its error on the first `few` calibration samples, or all."""
        end = run(self.cached, candidate.plan, self.reference.start[:few])
        return replace(candidate, error=rms(end, self.reference.end[:few]))

    def best(self, tried: Sequence[_Candidate], count: int) -> list[_Candidate]:
        """The `count` best candidates by their current error, sorted by their error on all samples."""
        chosen = sorted(tried, key=lambda candidate: candidate.error)[:count]
        return sorted((self.measured(candidate) for candidate in chosen), key=lambda candidate: candidate.error)

    def cheapest(self, nfe: int) -> list[float]:
        """The rising times that dynamic programming finds."""
        path = cheapest_path(jump_cost(self.reference), nfe)
        return [self.reference.levels[index].t for index in reversed(path[:-1])]


def _search(evaluator: _Evaluator, best: _Candidate) -> Iterator[tuple[int, int, _Candidate]]:
    """Coordinate search: change each time in log(noise / signal) by falling amounts, and accept what lowers the error.

    Yields the number of moves done, their total, and the best candidate.
    """
    moves = [*itertools.product(STRIDES, range(1, len(best.levels) - 1))]
    for done, (stride, index) in enumerate(moves):
        for sign in (1, -1):
            yield done, len(moves), best
            times = _change_time(evaluator.schedule, best.levels, index, sign * stride)
            trial = evaluator.attempt(best.solver, "times searched", times) if times else best
            if trial.error < best.error:
                best = trial
                break
    yield len(moves), len(moves), best


def _change_time(schedule: Schedule, levels: Sequence[Level], index: int, by: float) -> list[float] | None:
    """Rising times with one of them changed in log(noise / signal); None if it reaches a neighbour or passes t = 1."""
    moved, last = levels[index].log_snr - 2 * by, index + 2 == len(levels)
    cleaner = schedule.level(1).log_snr if last else levels[index + 1].log_snr - 1e-3
    if not levels[index - 1].log_snr + 1e-3 < moved <= cleaner:
        return None
    times = [level.t for level in reversed(levels[:-1])]
    times[-1 - index] = schedule.time_at_log_snr(moved)
    return times


def _grids(schedule: Schedule, nfe: int, top: int) -> dict[str, Sequence[float]]:
    """Rising times by the name of their spacing, for those of `SPACINGS` that have `nfe` times and start at `top`."""
    grids: dict[str, Sequence[float]] = {}
    for name in SPACINGS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DdimWarning)
            times = timesteps.tau(schedule, name, nfe, top)
        if len(times) == nfe and times[-1] == top:
            grids[name] = times
    return grids


def _check(schedule: Schedule, nfe: int, calibration_samples: Tensor, solver: str, top: int) -> None:
    most = min(top, len(ReferenceSolution(schedule, top=top).plan)) // 2
    if not 2 <= nfe <= most:
        raise DdimError(f"nfe {nfe}", f"is outside 2..{most}", "choose a number in that range")
    if len(calibration_samples) < 4 or len(calibration_samples) % 2:
        raise DdimError(
            f"{len(calibration_samples)} calibration samples", "must be an even number of at least 4", "use 128 or more"
        )
    if solver != FITTED and solver not in ONE_EVALUATION:
        raise DdimError(f"solver {solver!r}", "is unknown", f"choose one of {', '.join((FITTED, *ONE_EVALUATION))}")
