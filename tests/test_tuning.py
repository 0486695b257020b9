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


def reference_solution(
    schedule: object = LINEAR, n: int = 16, nodes: int = 40, data: object = MIXTURE
) -> ReferenceSolution:
    reference = ReferenceSolution(schedule, nodes)
    list(reference.solve(data.denoise, randn(n, 3, seed=1)))
    return reference


class Counted:
    """A denoiser that counts the samples it evaluates."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, x: Tensor, level: Level, /) -> Prediction:
        self.samples += len(x)
        return MIXTURE.denoise(x, level)


def test_cached_samples_are_not_evaluated_again() -> None:
    counted = Counted()
    cache = CachedDenoiser(counted, size=4)
    x, level = randn(6, 3), LINEAR.level(300)
    first, again = cache(x, level), cache(x.clone(), level)
    assert counted.samples == 6
    assert torch.equal(first.x0, again.x0)
    torch.testing.assert_close(first.eps, MIXTURE.denoise(x, level).eps)
    cache(x, LINEAR.level(301))
    cache(x + 1e-12, level)
    assert counted.samples == 18


def test_the_cache_drops_the_oldest_entries() -> None:
    counted = Counted()
    cache = CachedDenoiser(counted, size=4, cache_bytes=0)
    x = randn(4, 3)
    for t in (300, 200, 300):
        cache(x, LINEAR.level(t))
    assert counted.samples == 12
    cache(x, LINEAR.level(300))
    assert counted.samples == 12


@pytest.mark.parametrize("name", ["linear", "cosine", "linear+zero-terminal-snr"])
def test_the_reference_solution_follows_the_flow_between_its_nodes(name: str) -> None:
    schedule = SCHEDULES[name]
    reference = ReferenceSolution(schedule, 80)
    start = GAUSSIAN.flow(randn(8, 4, seed=2), schedule.level(900), schedule.level(schedule.T))
    assert len(list(reference.solve(GAUSSIAN.denoise, start))) == 80
    assert reference.levels[0].t == schedule.T
    for t in (1.0, 3.3, 77.7, 500.0, 949.9):
        truth = GAUSSIAN.flow(start, schedule.level(schedule.T), schedule.level(t))
        assert rms(reference.at(schedule.level(t)), truth) < 2e-3
    assert torch.equal(reference.at(schedule.level(0)), reference.end)


def test_the_cost_of_a_jump_equals_the_closed_form_for_gaussian_data() -> None:
    """One DDIM step against the exact flow: both are factors on x / signal - mean, in closed form."""
    reference = ReferenceSolution(LINEAR, 30)
    list(reference.solve(GAUSSIAN.denoise, randn(8, 4, seed=3)))
    cost = jump_cost(reference)
    for i, j in ((0, 5), (3, 20), (28, 29), (10, 30)):
        now, then, state = reference.levels[i], reference.levels[j], reference.states[i]
        jump = GAUSSIAN.ddim_map(state, [now, then])
        flow = GAUSSIAN.flow(state, now, then)
        assert cost[i, j] == pytest.approx(rms(jump, flow), abs=2e-3)
        assert cost[i, j] > 0
    assert np.isinf(cost[np.tril_indices(len(cost))]).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_dynamic_programming_equals_exhaustive_search(steps: int) -> None:
    cost = np.full((9, 9), math.inf)
    above = np.triu_indices(9, 1)
    cost[above] = np.random.Generator(np.random.Philox(7)).random(len(above[0]))

    def total(path: tuple[int, ...]) -> float:
        return sum(cost[a, b] for a, b in itertools.pairwise(path))

    every = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), steps - 1)]
    path = cheapest_path(cost, steps)
    assert tuple(path) == min(every, key=total)


def test_a_fitted_plan_is_exact_on_straight_lines_and_nearer_to_the_reference() -> None:
    reference = reference_solution()
    levels = falling(LINEAR, [10, 40, 90, 160, 250, 360, 490, 640, 810, 1000])
    plan = fitted(CachedDenoiser(MIXTURE.denoise, 16), levels, reference.start, reference.at)
    plan.check()  # straight lines
    assert plan.straight
    assert plan.memory == 3
    assert not plan.stochastic
    ends = {
        name: rms(run(MIXTURE.denoise, p, reference.start), reference.end)
        for name, p in (("fitted", plan), ("ddim", samplers.ddim(levels)), ("ab3", samplers.adams_bashforth(levels, 3)))
    }
    assert ends["fitted"] < min(ends["ddim"], ends["ab3"])


def test_fitting_recovers_the_weights_of_a_plan_of_the_same_form() -> None:
    """If the target states are those of a plan of the same form, fitting recovers that plan."""
    levels = equal_angles(LINEAR, 6)
    made = samplers.adams_bashforth(levels, 2, "v")
    start = randn(32, 3, seed=4)
    states = [start]
    states += [step.x for step in trajectory(MIXTURE.denoise, made, start)]
    where = dict(zip(levels, states, strict=True))
    plan = fitted(CachedDenoiser(MIXTURE.denoise, 32), levels, start, lambda level: where[level], memory=2)
    torch.testing.assert_close(run(MIXTURE.denoise, plan, start), states[-1], rtol=0, atol=1e-3)


def tuned(calls: int = 5, solver: str = "fitted", seed: int = 5) -> Tuned:
    last = None
    for step in iter_tuning(MIXTURE.denoise, LINEAR, calls, randn(32, 3, seed=seed), solver, 16):
        assert 0 <= step.done <= step.total
        last = step
    assert last is not None
    assert last.result is not None
    return last.result


@pytest.mark.parametrize("solver", ["fitted", "ipndm4", "ddim"])
def test_a_tuned_plan_is_never_worse_than_untuned_plans(solver: str) -> None:
    result = tuned(solver=solver)
    assert result.plan.nfe == 5
    assert result.error <= result.untuned_error
    assert result.tuned_wins == (result.plan != result.untuned)
    result.plan.check().check_schedule(LINEAR, to_clean=True)
    held_out = ReferenceSolution(LINEAR)
    list(held_out.solve(MIXTURE.denoise, randn(32, 3, seed=5)[16:]))
    again = rms(run(MIXTURE.denoise, result.plan, held_out.start), held_out.end)
    assert again == pytest.approx(result.error, rel=1e-9)
    for name in ("quadratic", "equal-angle"):
        levels = falling(LINEAR, timesteps.tau(LINEAR, name, 5))
        assert result.error <= rms(run(MIXTURE.denoise, samplers.ddim(levels), held_out.start), held_out.end)


def test_tuning_is_deterministic() -> None:
    assert tuned() == tuned()


def test_a_tuned_plan_is_bound_to_its_model() -> None:
    plan = replace(tuned().plan, made_for="a" * 64)
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
def test_invalid_tuning_settings_are_errors(settings: dict, wrong: str) -> None:
    arguments = {"nfe": 5, "calibration_samples": 8, "solver": "fitted"} | settings
    with pytest.raises(DdimError, match=wrong):
        next(
            iter_tuning(
                MIXTURE.denoise,
                LINEAR,
                arguments["nfe"],
                randn(arguments["calibration_samples"], 3),
                arguments["solver"],
            )
        )


def test_held_out_samples_do_not_affect_the_fit() -> None:
    """With other held-out calibration samples the tuned plan is the same and its error differs."""
    calibration_samples = randn(256, 3, seed=5)
    other = torch.cat([calibration_samples[:128], randn(128, 3, seed=6)])
    results = []
    for samples in (calibration_samples, other):
        *_, last = iter_tuning(MIXTURE.denoise, LINEAR, 6, samples, "fitted", 128)
        assert last.result is not None
        assert last.result.tuned_wins
        results.append(last.result)
    assert results[0].plan == results[1].plan
    assert results[0].error != results[1].error


@pytest.mark.parametrize(("steps", "T"), [(10, 1000), (31, 1000), (32, 1000), (12, 100), (20, 100), (30, 500), (5, 8)])
def test_the_default_plan_has_the_requested_number_of_evaluations(steps: int, T: int) -> None:
    schedule = LINEAR if T == 1000 else linear(T)
    for predicts in ("eps", "v", "x0"):
        sampler, name = samplers.recommended(steps, schedule, predicts)
        times = timesteps.tau(schedule, name, steps)
        assert samplers.named(sampler, falling(schedule, times), schedule).nfe == steps
