from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import GAUSSIAN, SAMPLERS, SCHEDULES, levels_of, randn
from ddim.denoiser import Denoiser, Prediction, predict
from ddim.loop import Step, run, trajectory
from ddim.plan import Plan
from ddim.samplers import ddim
from ddim.schedule import Level
from ddim.seeds import Noise

LEVELS = levels_of(SCHEDULES["linear"], "equal-angle", 12)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
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


@every_sampler
def test_one_step_is_yielded_per_row_and_none_before_it_is_asked_for(sampler: Callable[..., Plan]) -> None:
    plan, asked = sampler(LEVELS), []

    def spy(x: Tensor, level: Level, /) -> Prediction:
        asked.append(level)
        return GAUSSIAN.denoise(x, level)

    walk = trajectory(spy, plan, NOISE)
    assert asked == []
    kept: list[Step] = []
    for k, step in enumerate(walk):
        assert (step.index, step.row) == (k, plan.rows[k])
        assert len(asked) == k + 1
        kept.append(step)
    assert asked == [row.query for row in plan.rows]
    # The steps are values: none is overwritten by a later one.
    assert [step.x.tolist() for step in kept] == [s.x.tolist() for s in trajectory(GAUSSIAN.denoise, plan, NOISE)]
    assert torch.equal(run(GAUSSIAN.denoise, plan, NOISE), kept[-1].x)


@pytest.mark.parametrize("clip", [False, True])
def test_clipping_derives_eps_again(clip: bool) -> None:
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
def test_the_states_dtype_is_kept(sampler: Callable[..., Plan], dtype: torch.dtype) -> None:
    def denoise(x: Tensor, level: Level, /) -> Prediction:
        return predict(x * 0.1, x, level, "eps")

    for step in trajectory(denoise, sampler(LEVELS), NOISE.start().to(dtype), NOISE):
        assert step.x.dtype == step.x0.dtype == step.eps.dtype == dtype


def test_a_start_is_not_changed() -> None:
    start = randn(3, 4)
    before = start.clone()
    run(GAUSSIAN.denoise, ddim(LEVELS), start)
    assert torch.equal(start, before)


@every_sampler
def test_global_generators_are_left_alone(sampler: Callable[..., Plan]) -> None:
    before = torch.get_rng_state(), repr((np.random.get_state(), random.getstate()))  # noqa: NPY002
    run(GAUSSIAN.denoise, sampler(LEVELS), NOISE)
    after = torch.get_rng_state(), repr((np.random.get_state(), random.getstate()))  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_a_stochastic_plan_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="adds noise"):
        next(trajectory(GAUSSIAN.denoise, ddim(LEVELS, eta=1.0), randn(3, 4)))
    assert next(trajectory(GAUSSIAN.denoise, ddim(LEVELS), randn(3, 4))).index == 0


def test_a_noise_as_start_is_the_same_as_its_draw_and_itself() -> None:
    plan = ddim(LEVELS, eta=1.0)
    assert torch.equal(run(GAUSSIAN.denoise, plan, NOISE), run(GAUSSIAN.denoise, plan, NOISE.start(), NOISE))
    other = Noise(seed=2, indices=NOISE.indices, shape=NOISE.shape)
    mixed = run(GAUSSIAN.denoise, plan, NOISE, other)
    assert torch.equal(mixed, run(GAUSSIAN.denoise, plan, NOISE.start(), other))
    assert not torch.equal(mixed, run(GAUSSIAN.denoise, plan, NOISE))


def convolution() -> Denoiser:
    weight = randn(2, 2, 3, 3, seed=9) / 4

    def denoise(x: Tensor, level: Level, /) -> Prediction:
        return predict(torch.conv2d(x, weight, padding=1).tanh(), x, level, "v")

    return denoise


@every_sampler
def test_a_sample_does_not_depend_on_its_batch(sampler: Callable[..., Plan]) -> None:
    plan, denoise = sampler(LEVELS), convolution()

    def sample(indices: range) -> Tensor:
        noise = Noise(0, tuple(indices), (2, 8, 8))
        return run(denoise, plan, noise.start().double(), noise)

    together = sample(range(64))
    for size in (1, 7):
        parts = [sample(range(i, min(i + size, 64))) for i in range(0, 64, size)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-12)


def test_no_gradients_are_kept() -> None:
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def denoise(x: Tensor, level: Level, /) -> Prediction:
        return predict(x * weight, x, level, "eps")

    for step in trajectory(denoise, ddim(LEVELS), randn(3, 4)):
        assert not step.x.requires_grad
        assert torch.is_grad_enabled()
