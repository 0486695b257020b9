from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import GAUSSIAN, MIXTURE, SCHEDULES, equal_angles, falling, randn
from ddim import samplers
from ddim.errors import DdimError
from ddim.process import timesteps
from ddim.process.parameterization import Prediction
from ddim.process.schedule import Level, linear
from ddim.sampling.fitting import CachedDenoiser, ReferenceSolution, fitted, rms
from ddim.sampling.loop import run, trajectory
from ddim.sampling.tuning import Tuned, cheapest_path, iter_tuning, jump_cost

LINEAR = SCHEDULES["linear"]


def taught(schedule: object = LINEAR, n: int = 16, nodes: int = 40, data: object = MIXTURE) -> ReferenceSolution:
    teacher = ReferenceSolution(schedule, nodes)
    list(teacher.solve(data.denoise, randn(n, 3, seed=1)))
    return teacher


class Counted:
    """A denoiser that counts the samples it was asked for."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, x: Tensor, level: Level, /) -> Prediction:
        self.samples += len(x)
        return MIXTURE.denoise(x, level)


def test_what_was_asked_before_is_not_asked_again() -> None:
    counted = Counted()
    memo = CachedDenoiser(counted, size=4)
    x, level = randn(6, 3), LINEAR.level(300)
    first, again = memo(x, level), memo(x.clone(), level)
    assert counted.samples == 6
    assert torch.equal(first.x0, again.x0)
    torch.testing.assert_close(first.eps, MIXTURE.denoise(x, level).eps)
    memo(x, LINEAR.level(301))
    memo(x + 1e-12, level)
    assert counted.samples == 18


def test_a_memo_forgets_the_oldest() -> None:
    counted = Counted()
    memo = CachedDenoiser(counted, size=4, keep=0)
    x = randn(4, 3)
    for t in (300, 200, 300):
        memo(x, LINEAR.level(t))
    assert counted.samples == 12
    memo(x, LINEAR.level(300))
    assert counted.samples == 12


@pytest.mark.parametrize("name", ["linear", "cosine", "linear+zero-terminal-snr"])
def test_the_teacher_follows_the_flow_between_its_nodes(name: str) -> None:
    schedule = SCHEDULES[name]
    teacher = ReferenceSolution(schedule, 80)
    start = GAUSSIAN.flow(randn(8, 4, seed=2), schedule.level(900), schedule.level(schedule.T))
    assert len(list(teacher.solve(GAUSSIAN.denoise, start))) == 80
    assert teacher.levels[0].t == schedule.T
    for t in (1.0, 3.3, 77.7, 500.0, 949.9):
        truth = GAUSSIAN.flow(start, schedule.level(schedule.T), schedule.level(t))
        assert rms(teacher.at(schedule.level(t)), truth) < 2e-3
    assert torch.equal(teacher.at(schedule.level(0)), teacher.end)


def test_the_cost_of_a_jump_is_that_of_gaussian_data() -> None:
    """One DDIM step against the exact flow: both are factors on x / signal - mean, in closed form."""
    teacher = ReferenceSolution(LINEAR, 30)
    list(teacher.solve(GAUSSIAN.denoise, randn(8, 4, seed=3)))
    cost = jump_cost(teacher)
    for i, j in ((0, 5), (3, 20), (28, 29), (10, 30)):
        now, then, state = teacher.levels[i], teacher.levels[j], teacher.states[i]
        jump = GAUSSIAN.ddim_map(state, [now, then])
        flow = GAUSSIAN.flow(state, now, then)
        assert cost[i, j] == pytest.approx(rms(jump, flow), abs=2e-3)
        assert cost[i, j] > 0
    assert np.isinf(cost[np.tril_indices(len(cost))]).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_dynamic_programming_finds_what_trying_everything_finds(steps: int) -> None:
    cost = np.full((9, 9), math.inf)
    above = np.triu_indices(9, 1)
    cost[above] = np.random.Generator(np.random.Philox(7)).random(len(above[0]))

    def total(path: tuple[int, ...]) -> float:
        return sum(cost[a, b] for a, b in itertools.pairwise(path))

    every = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), steps - 1)]
    path = cheapest_path(cost, steps)
    assert tuple(path) == min(every, key=total)


def test_a_fitted_plan_is_on_straight_lines_and_nearer_to_the_teacher() -> None:
    teacher = taught()
    levels = falling(LINEAR, [10, 40, 90, 160, 250, 360, 490, 640, 810, 1000])
    plan = fitted(CachedDenoiser(MIXTURE.denoise, 16), levels, teacher.start, teacher.at)
    plan.check()  # straight lines
    assert plan.straight
    assert plan.memory == 3
    assert not plan.stochastic
    ends = {
        name: rms(run(MIXTURE.denoise, p, teacher.start), teacher.end)
        for name, p in (("fitted", plan), ("ddim", samplers.ddim(levels)), ("ab3", samplers.adams_bashforth(levels, 3)))
    }
    assert ends["fitted"] < min(ends["ddim"], ends["ab3"])


def test_fitting_finds_weights_that_are_there() -> None:
    """Where the wanted states are those of a plan of the same kind, that plan comes back."""
    levels = equal_angles(LINEAR, 6)
    made = samplers.adams_bashforth(levels, 2, "v")
    start = randn(32, 3, seed=4)
    states = [start]
    states += [step.x for step in trajectory(MIXTURE.denoise, made, start)]
    where = dict(zip(levels, states, strict=True))
    plan = fitted(CachedDenoiser(MIXTURE.denoise, 32), levels, start, lambda level: where[level], memory=2)
    torch.testing.assert_close(run(MIXTURE.denoise, plan, start), states[-1], rtol=0, atol=1e-3)


def found(calls: int = 5, solver: str = "fitted", seed: int = 5) -> Tuned:
    last = None
    for step in iter_tuning(MIXTURE.denoise, LINEAR, calls, randn(32, 3, seed=seed), solver, 16):
        assert 0 <= step.done <= step.total
        last = step
    assert last is not None
    assert last.found is not None
    return last.found


@pytest.mark.parametrize("solver", ["fitted", "ipndm4", "ddim"])
def test_tuning_is_never_worse_than_what_is_not_tuned(solver: str) -> None:
    result = found(solver=solver)
    assert result.plan.nfe == 5
    assert result.error <= result.untuned_error
    assert result.tuned_wins == (result.plan != result.untuned)
    result.plan.check().check_schedule(LINEAR, to_clean=True)
    held = ReferenceSolution(LINEAR)
    list(held.solve(MIXTURE.denoise, randn(32, 3, seed=5)[16:]))
    again = rms(run(MIXTURE.denoise, result.plan, held.start), held.end)
    assert again == pytest.approx(result.error, rel=1e-9)
    for name in ("quadratic", "equal-angle"):
        levels = falling(LINEAR, timesteps.tau(LINEAR, name, 5))
        assert result.error <= rms(run(MIXTURE.denoise, samplers.ddim(levels), held.start), held.end)


def test_tuning_is_deterministic() -> None:
    assert found() == found()


def test_a_tuned_plan_is_for_its_model() -> None:
    plan = replace(found().plan, made_for="a" * 64)
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    assert plan.check_model(lambda: "a" * 64) is plan
    with pytest.raises(DdimError, match=r"^plan tuned\(fitted, times searched, 32 samples\): "):
        plan.check_model(lambda: "b" * 64)
    assert replace(plan, made_for="").check_model(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"nfe": 1}, r"^nfe 1: .*\b2\.\.30\b"),
        ({"nfe": 31}, r"^nfe 31: .*\b2\.\.30\b"),
        ({"calibration_samples": 3}, r"^3 calibration samples: "),
        ({"calibration_samples": 2}, r"^2 calibration samples: "),
        ({"solver": "heun"}, r"^solver 'heun': "),
    ],
)
def test_what_cannot_be_tuned_is_refused(settings: dict, wrong: str) -> None:
    given = {"nfe": 5, "calibration_samples": 8, "solver": "fitted"} | settings
    with pytest.raises(DdimError, match=wrong):
        next(
            iter_tuning(MIXTURE.denoise, LINEAR, given["nfe"], randn(given["calibration_samples"], 3), given["solver"])
        )


def test_nothing_is_fitted_to_the_held_out_half() -> None:
    """Other held-out pilots: the same tuned plan, and another error."""
    calibration_samples = randn(256, 3, seed=5)
    other = torch.cat([calibration_samples[:128], randn(128, 3, seed=6)])
    results = []
    for given in (calibration_samples, other):
        *_, last = iter_tuning(MIXTURE.denoise, LINEAR, 6, given, "fitted", 128)
        assert last.found is not None
        assert last.found.tuned_wins
        results.append(last.found)
    assert results[0].plan == results[1].plan
    assert results[0].error != results[1].error


@pytest.mark.parametrize(("steps", "T"), [(10, 1000), (31, 1000), (32, 1000), (12, 100), (20, 100), (30, 500), (5, 8)])
def test_the_default_has_as_many_calls_as_are_asked_for(steps: int, T: int) -> None:
    schedule = LINEAR if T == 1000 else linear(T)
    for predicts in ("eps", "v", "x0"):
        sampler, name = samplers.recommended(steps, schedule, predicts)
        times = timesteps.tau(schedule, name, steps)
        assert samplers.named(sampler, falling(schedule, times), schedule).nfe == steps
