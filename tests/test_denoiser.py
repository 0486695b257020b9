from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import GAUSSIAN, SCHEDULES, randn
from ddim.process.gaussian import diffuse
from ddim.process.parameterization import Prediction, eps_from_x0, predict, v_from_pair, x0_from_eps
from ddim.process.schedule import Level
from ddim.sampling.guidance import Guided
from ddim.sampling.x0_hooks import Clipped

LINEAR = SCHEDULES["linear"]
LEVEL = LINEAR.level(300)


@given(st.integers(1, 1000))
def test_f_theta(t: int) -> None:
    """Eq. (9): f = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), not the misprint (x_t - eps) / sqrt(abar_t)."""
    level, x, eps = LINEAR.level(t), randn(5, seed=1), randn(5, seed=2)
    expected = (x - math.sqrt(1 - level.alpha_bar) * eps) / math.sqrt(level.alpha_bar)
    torch.testing.assert_close(x0_from_eps(eps, x, level), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(eps_from_x0(expected, x, level), eps, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 1000))
def test_all_prediction_types_give_the_same_pair(t: int) -> None:
    level, x0, eps = LINEAR.level(t), randn(5, seed=3), randn(5, seed=4)
    x = diffuse(x0, eps, level)
    v = math.sqrt(level.alpha_bar) * eps - math.sqrt(1 - level.alpha_bar) * x0
    torch.testing.assert_close(v_from_pair(x0, eps, level), v, rtol=1e-12, atol=1e-12)
    for output, predicts in ((eps, "eps"), (x0, "x0"), (v, "v")):
        pair = predict(output, x, level, predicts)
        torch.testing.assert_close(pair.x0, x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(pair.eps, eps, rtol=1e-10, atol=1e-10)


@given(t=st.integers(1, 1000), predicts=st.sampled_from(["eps", "x0", "v"]))
def test_the_pair_is_consistent_for_any_output(t: int, predicts: str) -> None:
    level, x = LINEAR.level(t), randn(5, seed=5)
    pair = predict(randn(5, seed=6), x, level, predicts)
    torch.testing.assert_close(level.signal * pair.x0 + level.noise * pair.eps, x, rtol=0, atol=1e-12)


def test_a_level_without_signal() -> None:
    level, x = SCHEDULES["linear+zero-terminal-snr"].level(1000), randn(5, seed=5)
    with pytest.raises(ValueError):
        predict(x, x, level, "eps")
    for predicts in ("x0", "v"):
        pair = predict(randn(5, seed=6), x, level, predicts)
        assert torch.equal(pair.eps, x)
        assert pair.x0.isfinite().all()


def test_an_unknown_prediction_type_raises_an_error() -> None:
    with pytest.raises(ValueError, match="'score'"):
        predict(randn(5), randn(5), LEVEL, "score")


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 0.5)])
def test_clipped_pairs_stay_consistent(low: float, high: float) -> None:
    x = 3 * randn(20, 4, seed=7)
    raw, pair = GAUSSIAN.denoise(x, LEVEL), Clipped(GAUSSIAN.denoise, low, high)(x, LEVEL)
    assert torch.equal(pair.x0, raw.x0.clamp(low, high))
    assert not torch.equal(pair.x0, raw.x0)
    torch.testing.assert_close(LEVEL.signal * pair.x0 + LEVEL.noise * pair.eps, x, rtol=0, atol=1e-12)
    inside = raw.x0 == pair.x0
    torch.testing.assert_close(pair.eps[inside], raw.eps[inside], rtol=0, atol=1e-12)


def constant(output: Tensor) -> object:
    def denoise(x: Tensor, level: Level, /) -> Prediction:
        return predict(output, x, level, "eps")

    return denoise


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 7.5])
def test_guidance_extrapolates_linearly_from_unconditional_to_conditional(scale: float) -> None:
    """Ho & Salimans 2021: eps = eps_off + scale (eps_on - eps_off); the pair stays consistent."""
    x, on, off = randn(5, seed=8), randn(5, seed=9), randn(5, seed=10)
    pair = Guided(constant(on), constant(off), scale)(x, LEVEL)
    torch.testing.assert_close(pair.eps, off + scale * (on - off), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(LEVEL.signal * pair.x0 + LEVEL.noise * pair.eps, x, rtol=0, atol=1e-12)


def test_guidance_of_scale_0_and_1_equals_the_two_models() -> None:
    x, on, off = randn(5, seed=8), randn(5, seed=9), randn(5, seed=10)
    for scale, alone in ((0.0, constant(off)), (1.0, constant(on))):
        pair = Guided(constant(on), constant(off), scale)(x, LEVEL)
        assert torch.equal(pair.eps, alone(x, LEVEL).eps)
        assert torch.equal(pair.x0, alone(x, LEVEL).x0)
