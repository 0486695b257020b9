from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import ALL_SAMPLERS, DISCRETE, GAUSSIAN, SAMPLERS, SCHEDULES, levels_of, randn, surroundings
from ddim.plan.base import BasePlan
from ddim.plan.categorical import CategoricalPlan
from ddim.plan.plan import Plan
from ddim.process.parameterization import Denoiser, Prediction, TokenPrediction, predict
from ddim.process.rng import Noise
from ddim.process.schedule import Level
from ddim.samplers import ddim
from ddim.sampling.loop import Step, run, trajectory

LEVELS = levels_of(SCHEDULES["linear"], "equal-angle", 12)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
every_kind = pytest.mark.parametrize("sampler", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS.keys())
SOME = {"pictures": SAMPLERS["eta 1"], **DISCRETE}
every_drawing = pytest.mark.parametrize("sampler", SOME.values(), ids=SOME.keys())
NOISE = Noise(seed=1, indices=(0, 5, 2), shape=(4,))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_run_is_equation_12_row_by_row(eta: float) -> None:
    """Eq. (12): x_s = sqrt(abar_s) f + sqrt(1 - abar_s - sigma^2) eps + sigma z, typed out over the levels.

    z of step k is row k of the noise.
    """
    x = expected = NOISE.start().double()
    steps = list(trajectory(GAUSSIAN.denoise, ddim(LEVELS, eta=eta), x, NOISE))
    for k, (t, s) in enumerate(itertools.pairwise(LEVELS)):
        abar_t, abar_s = t.alpha_bar, s.alpha_bar
        sigma = eta * math.sqrt((1 - abar_s) / (1 - abar_t)) * math.sqrt(1 - abar_t / abar_s)
        eps = GAUSSIAN.denoise(expected, t).eps
        f = (expected - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        mean = math.sqrt(abar_s) * f + math.sqrt(1 - abar_s - sigma**2) * eps
        expected = mean + sigma * NOISE.row(k).double()
        torch.testing.assert_close(steps[k].x, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(steps[k].eps, eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(steps[k].x0, f, rtol=1e-9, atol=1e-9)


@every_kind
def test_steps_are_yielded_lazily_one_per_row(sampler: Callable[..., BasePlan[Any]]) -> None:
    plan, asked = sampler(LEVELS), []
    denoise, noise = surroundings(plan)

    def spy(x: Tensor, level: Level, /) -> Any:
        asked.append(level)
        return denoise(x, level)

    walk = trajectory(spy, plan, noise)
    assert asked == []
    yielded: list[Step] = []
    for k, step in enumerate(walk):
        assert (step.index, step.row) == (k, plan.rows[k])
        assert len(asked) == k + 1
        yielded.append(step)
    assert asked == [row.query for row in plan.rows]
    # The steps are values: none is overwritten by a later one.
    assert [step.x.tolist() for step in yielded] == [s.x.tolist() for s in trajectory(denoise, plan, noise)]
    assert torch.equal(run(denoise, plan, noise), yielded[-1].x)


@pytest.mark.parametrize("clip", [False, True])
def test_clipping_recomputes_eps(clip: bool) -> None:
    plan = ddim(LEVELS, eta=0.5, clip_x0=clip)
    state, reached_beyond = 3 * NOISE.start().double(), False
    for step in trajectory(GAUSSIAN.denoise, plan, state, NOISE):
        now = step.row.now
        torch.testing.assert_close(now.signal * step.x0 + now.noise * step.eps, state, rtol=0, atol=1e-10)
        raw = GAUSSIAN.denoise(state, now).x0
        torch.testing.assert_close(step.x0, raw.clamp(-1, 1) if clip else raw, rtol=0, atol=0)
        reached_beyond |= bool((raw.abs() > 1).any())
        state = step.x
    assert reached_beyond


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_states_is_preserved(sampler: Callable[..., Plan], dtype: torch.dtype) -> None:
    def denoise(x: Tensor, level: Level, /) -> Prediction:
        return predict(x * 0.1, x, level, "eps")

    for step in trajectory(denoise, sampler(LEVELS), NOISE.start().to(dtype), NOISE):
        assert step.x.dtype == step.x0.dtype == step.eps.dtype == dtype


@every_kind
def test_the_start_is_not_modified(sampler: Callable[..., BasePlan[Any]]) -> None:
    plan = sampler(LEVELS)
    denoise, noise = surroundings(plan)
    start = noise.start()
    before = start.clone()
    end = run(denoise, plan, start, noise)
    assert not torch.equal(end, before)
    assert torch.equal(start, before)


@pytest.mark.parametrize("sampler", DISCRETE.values(), ids=DISCRETE.keys())
def test_tokens_stay_ids_and_none_is_left_a_mask(sampler: Callable[..., CategoricalPlan]) -> None:
    plan = sampler(LEVELS)
    denoise, noise = surroundings(plan, indices=range(20))
    for step in trajectory(denoise, plan, noise):
        assert (step.x.dtype, step.x.shape) == (torch.int64, (20, 6))
        assert step.x0.shape == (20, 6, 3)
    assert {*step.x.flatten().tolist()} == ({0, 1} if max(plan.pi) == 1 else {0, 1, 2})


@every_kind
def test_global_generators_are_unchanged(sampler: Callable[..., BasePlan[Any]]) -> None:
    plan = sampler(LEVELS)
    denoise, noise = surroundings(plan)
    before = torch.get_rng_state(), repr((np.random.get_state(), random.getstate()))  # noqa: NPY002
    run(denoise, plan, noise)
    after = torch.get_rng_state(), repr((np.random.get_state(), random.getstate()))  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


@every_drawing
def test_a_stochastic_plan_without_noise_is_an_error(sampler: Callable[..., BasePlan[Any]]) -> None:
    plan = sampler(LEVELS)
    denoise, noise = surroundings(plan)
    with pytest.raises(ValueError):
        next(trajectory(denoise, plan, noise.start()))


def test_a_deterministic_plan_needs_no_noise() -> None:
    assert next(trajectory(GAUSSIAN.denoise, ddim(LEVELS), randn(3, 4))).index == 0


@every_drawing
def test_a_noise_as_start_is_the_same_as_its_draw_and_itself(sampler: Callable[..., BasePlan[Any]]) -> None:
    plan = sampler(LEVELS)
    (denoise, noise), (_, other) = surroundings(plan), surroundings(plan, seed=2)
    assert torch.equal(run(denoise, plan, noise), run(denoise, plan, noise.start(), noise))
    mixed = run(denoise, plan, noise, other)
    assert torch.equal(mixed, run(denoise, plan, noise.start(), other))
    assert not torch.equal(mixed, run(denoise, plan, noise))


def convolution() -> Denoiser:
    weight = randn(2, 2, 3, 3, seed=9) / 4

    def denoise(x: Tensor, level: Level, /) -> Prediction:
        return predict(torch.conv2d(x, weight, padding=1).tanh(), x, level, "v")

    return denoise


@every_kind
def test_a_sample_does_not_depend_on_its_batch(sampler: Callable[..., BasePlan[Any]]) -> None:
    plan = sampler(LEVELS)
    count = 16 if isinstance(plan, CategoricalPlan) else 64

    def sample(indices: range) -> Tensor:
        if isinstance(plan, CategoricalPlan):
            exact, draws = surroundings(plan, 0, indices)
            return run(exact, plan, draws)
        noise = Noise(0, tuple(indices), (2, 8, 8))
        return run(convolution(), plan, noise.start().double(), noise)

    together = sample(range(count))
    for size in (1, 7):
        parts = [sample(range(i, min(i + size, count))) for i in range(0, count, size)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [SAMPLERS["eta 0"], DISCRETE["eta 0.3, uniform"]], ids=["pictures", "tokens"])
def test_no_gradients_are_recorded(sampler: Callable[..., BasePlan[Any]]) -> None:
    plan = sampler(LEVELS)
    weight = torch.ones(4 if isinstance(plan, Plan) else 3, dtype=torch.float64, requires_grad=True)

    def denoise(x: Tensor, level: Level, /) -> Any:
        if isinstance(plan, Plan):
            return predict(x * weight, x, level, "eps")
        return TokenPrediction(torch.softmax(weight, -1).expand(*x.shape, 3))

    for step in trajectory(denoise, plan, surroundings(plan)[1]):
        assert not step.x.requires_grad
        assert not step.x0.requires_grad
        assert torch.is_grad_enabled()
