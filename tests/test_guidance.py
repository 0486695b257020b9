"""Scales of guidance that change with the level, and CFG++ as one of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench import GAUSSIAN, MIXTURE, SCHEDULES, levels_of, randn
from ddim import samplers
from ddim.errors import DdimError
from ddim.exact import GaussianData
from ddim.plan.plan import Plan
from ddim.process.parameterization import Denoiser, Prediction
from ddim.process.rng import Noise
from ddim.process.schedule import Level
from ddim.sampling.guidance import Guided, cfg_plus_plus
from ddim.sampling.loop import run, trajectory
from models import tiny_model

OTHER = GaussianData(GAUSSIAN.mean + 0.7, GAUSSIAN.variance / 3)
STARTS = ["linear", "cosine", "linear+zero-terminal-snr"]


def plan_of(schedule: str, eta: float, steps: int = 12) -> Plan:
    return samplers.ddim(levels_of(SCHEDULES[schedule], "equal-angle", steps), eta=eta)


def written_out(on: Denoiser, off: Denoiser, plan: Plan, lam: float, x: Tensor, noise: Noise | None) -> Tensor:
    """CFG++ (Chung et al. 2024, algorithm 2) with the noise of eq. (12): x_0 guided, eps unguided."""
    for k, row in enumerate(plan.rows):
        with_label, without = on(x, row.now), off(x, row.now)
        x0 = without.x0 + lam * (with_label.x0 - without.x0)
        direction = math.sqrt(max(row.next.variance - row.sigma**2, 0))
        x = row.next.signal * x0 + direction * without.eps
        if row.z and noise is not None:
            x = x + row.z * noise.row(k).double()
    return x


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", STARTS)
def test_cfg_plus_plus_is_guidance_with_a_scale_for_each_level(schedule: str, eta: float, lam: float) -> None:
    """The identity of `cfg_plus_plus`, with fresh noise and from zero signal too."""
    plan, noise = plan_of(schedule, eta), Noise(0, (0, 1, 2), (4,))
    start = noise.start().double()
    guided = Guided(OTHER.denoise, GAUSSIAN.denoise, cfg_plus_plus(plan, lam))
    expected = written_out(OTHER.denoise, GAUSSIAN.denoise, plan, lam, start, noise)
    torch.testing.assert_close(run(guided, plan, start, noise), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", STARTS)
def test_the_scale_of_a_ddim_step(schedule: str) -> None:
    """lam v / (v - v_next), v = noise / signal; lam itself to clean data, and where there is no signal."""
    plan = plan_of(schedule, 0.0)
    scale = cfg_plus_plus(plan, 0.6)
    for row in plan.rows:
        v, after = row.now.ratio, row.next.ratio
        expected = 0.6 if math.isinf(v) else 0.6 * v / (v - after)
        assert scale(row.now) == pytest.approx(expected, rel=1e-10)
    assert scale(plan.rows[-1].now) == pytest.approx(0.6, rel=1e-12)


def test_lambda_zero_is_the_unconditional_model() -> None:
    plan, start = plan_of("linear", 0.0), randn(5, 4)
    guided = Guided(OTHER.denoise, GAUSSIAN.denoise, cfg_plus_plus(plan, 0.0))
    assert torch.equal(run(guided, plan, start), run(GAUSSIAN.denoise, plan, start))


def test_encoding_with_cfg_plus_plus() -> None:
    """Rising rows have negative scales; the identity holds for them as well."""
    levels = [*reversed(levels_of(SCHEDULES["linear"], "equal-angle", 8)[:-1])]
    plan, start = samplers.ddim(levels), randn(5, 4)
    guided = Guided(OTHER.denoise, GAUSSIAN.denoise, cfg_plus_plus(plan, 0.6))
    expected = written_out(OTHER.denoise, GAUSSIAN.denoise, plan, 0.6, start, None)
    torch.testing.assert_close(run(guided, plan, start), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan])
def test_lambda_is_between_0_and_1(lam: float) -> None:
    with pytest.raises(DdimError, match=r"^CFG\+\+ of.*\b0\.\.1\b"):
        cfg_plus_plus(plan_of("linear", 0.0), lam)


def test_unsupported_plans_are_errors() -> None:
    schedule = SCHEDULES["linear"]
    levels = levels_of(schedule, "equal-angle", 6)
    for plan in (samplers.ddim(levels, sigma="hat"), samplers.runge_kutta(levels, schedule, 2)):
        with pytest.raises(DdimError, match=r"^plan"):
            cfg_plus_plus(plan, 0.6)
    scale = cfg_plus_plus(samplers.ddim(levels), 0.6)
    with pytest.raises(DdimError, match=r"^t = 501: "):
        scale(schedule.level(501))


def test_a_scale_may_be_a_function_of_the_level() -> None:
    """Guidance in an interval: the conditional model alone outside of it."""
    plan, start = plan_of("linear", 0.0), randn(5, 4)
    guided = Guided(OTHER.denoise, GAUSSIAN.denoise, lambda level: 3.0 if level.t < 400 else 1.0)
    for step in trajectory(guided, plan, start):
        x = step.row.now.signal * step.x0 + step.row.now.noise * step.eps
        constant = Guided(OTHER.denoise, GAUSSIAN.denoise, 3.0 if step.row.now.t < 400 else 1.0)
        assert torch.allclose(constant(x, step.row.now).x0, step.x0, rtol=0, atol=1e-12)


def test_guidance_sharpens_towards_a_component() -> None:
    """Of a mixture, the component itself as the conditional model: guided samples come nearer to its mean
    than those without."""

    def component(x: Tensor, level: Level, /) -> Prediction:
        one = type(MIXTURE)(torch.ones(1), MIXTURE.means[:1], MIXTURE.covariances[:1])
        return one.denoise(x, level)

    plan, start = plan_of("linear", 0.0, 40), randn(64, 3)
    distances = []
    for lam in (0.0, 0.5):
        end = run(Guided(component, MIXTURE.denoise, cfg_plus_plus(plan, lam)), plan, start)
        distances.append(float((end - MIXTURE.means[0]).norm(dim=1).mean()))
    assert distances[0] > 2 * distances[1]


def test_a_model_takes_a_function_as_its_scale() -> None:
    model = tiny_model(classes=3)
    plan = model.plan(4, sampler="ddim")
    by_level = model.sample(3, plan=plan, labels=2, guidance=lambda level: 2.5)
    assert torch.equal(by_level, model.sample(3, plan=plan, labels=2, guidance=2.5))
    guided_samples = model.sample(3, plan=plan, labels=2, guidance=cfg_plus_plus(plan, 0.6))
    assert not torch.allclose(guided_samples, by_level, atol=1e-3)
