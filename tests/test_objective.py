from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import SCHEDULES, randn
from ddim.objective import Objective, draw_times, weights

LINEAR = SCHEDULES["linear"]
ZERO = SCHEDULES["linear+zero-terminal-snr"]
X0 = randn(6, 2, 3, 3, seed=1, dtype=torch.float32)
EPS = randn(6, 2, 3, 3, seed=2, dtype=torch.float32)
TIMES = torch.tensor([1, 2, 40, 300, 700, 1000])
WEIGHT = randn(2, 2, 3, 3, seed=3, dtype=torch.float32) / 3


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any function of x and t."""
    return torch.conv2d(x, WEIGHT.to(x.dtype), padding=1).tanh() + (t.view(-1, 1, 1, 1) / 1000).to(x.dtype)


def literal(predicts: str, gamma: str) -> list[float]:
    """The mean over pixels of gamma_t (eps - eps_theta)^2 in float64, pixel by pixel, eps_theta made of the output."""
    losses = []
    for n, t in enumerate(TIMES.tolist()):
        abar = float(LINEAR.alpha_bar[t])
        signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
        x = signal * X0[n].double() + noise * EPS[n].double()
        output = network(x[None], torch.tensor([t]))[0]
        total = 0.0
        for place in np.ndindex(*x.shape):
            said, state = output[place].item(), x[place].item()
            match predicts:
                case "eps":
                    eps = said
                case "x0":
                    eps = (state - signal * said) / noise
                case "v":
                    eps = noise * state + signal * said
            total += (EPS[n][place].item() - eps) ** 2
        snr = abar / (1 - abar)
        scale = {"simple": 1.0, "v": 1 / abar, "x0": 1 / snr, "min-snr": min(snr, 5) / snr}[gamma]
        losses.append(scale * total / x.numel())
    return losses


@pytest.mark.parametrize("gamma", ["simple", "v", "x0", "min-snr"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_loss_is_the_weighted_error_in_eps_whatever_the_network_predicts(predicts: str, gamma: str) -> None:
    """Eq. (5): gamma_t || eps - eps_theta ||^2 per sample, against a loop over samples and pixels."""
    loss = Objective(LINEAR, predicts, gamma).loss(network, X0, TIMES, EPS)
    assert (loss.shape, loss.dtype) == ((6,), torch.float32)
    np.testing.assert_allclose(loss.numpy(), literal(predicts, gamma), rtol=1e-3 if predicts == "x0" else 1e-4)


def test_the_network_is_given_equation_4_and_the_time() -> None:
    seen = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return x

    Objective(LINEAR, "eps").loss(spy, X0, TIMES, EPS)
    [(x, t)] = seen
    assert torch.equal(t, TIMES)
    for n, time in enumerate(TIMES.tolist()):
        abar = LINEAR.alpha_bar[time]
        expected = math.sqrt(abar) * X0[n] + math.sqrt(1 - abar) * EPS[n]
        torch.testing.assert_close(x[n], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("predicts", "gamma"), [("v", "v"), ("x0", "x0"), ("eps", "simple")])
def test_the_plain_errors_have_weight_one(predicts: str, gamma: str) -> None:
    for schedule in (LINEAR, ZERO):
        np.testing.assert_array_equal(weights(schedule, predicts, gamma), np.ones(1000))


@pytest.mark.parametrize("name", SCHEDULES)
def test_min_snr(name: str) -> None:
    """Hang et al. 2023: the weight on the error in x_0 is min(SNR, 5), so min(SNR, 5) / (SNR + 1) on that in v."""
    schedule = SCHEDULES[name]
    levels = [schedule.level(t) for t in range(1, 1001)]
    snr = np.array([level.alpha_bar / level.variance for level in levels])
    np.testing.assert_allclose(weights(schedule, "x0", "min-snr"), np.minimum(snr, 5), rtol=1e-12)
    np.testing.assert_allclose(weights(schedule, "v", "min-snr"), np.minimum(snr, 5) / (snr + 1), rtol=1e-12)
    capped = [min(level.ratio**2 * 5, 1.0) for level in levels]
    np.testing.assert_allclose(weights(schedule, "eps", "min-snr"), capped, rtol=1e-12)


def test_weights_stay_finite_without_signal_or_are_refused() -> None:
    for predicts in ("v", "x0"):
        for gamma in ("simple", "v", "x0", "min-snr"):
            made = weights(ZERO, predicts, gamma)
            assert np.isfinite(made).all()
            assert (made >= 0).all()
    with np.errstate(divide="ignore"):
        for gamma in ("v", "x0"):
            with pytest.raises(ValueError, match="infinite for a network that predicts eps"):
                weights(ZERO, "eps", gamma)


@given(batch=st.integers(1, 33), T=st.integers(1, 50), seed=st.integers(0, 1000))
def test_antithetic_times_come_in_pairs(batch: int, T: int, seed: int) -> None:
    t = draw_times(batch, T, torch.Generator().manual_seed(seed))
    assert (t.shape, t.dtype) == ((batch,), torch.int64)
    assert ((t >= 1) & (t <= T)).all()
    half = (batch + 1) // 2
    assert torch.equal(t[half:], T + 1 - t[: batch - half])


@pytest.mark.parametrize("antithetic", [True, False])
def test_times_are_uniform_on_1_to_T(antithetic: bool) -> None:
    t = draw_times(20_000, 5, torch.Generator().manual_seed(0), antithetic)
    counts = torch.bincount(t, minlength=6)
    assert counts[0] == 0
    assert len(counts) == 6
    # 4000 each; five standard deviations, twice as wide for pairs.
    assert (counts[1:] - 4000).abs().max() < 5 * 2 * math.sqrt(20_000 * 0.2 * 0.8)


def test_independent_times_are_not_paired() -> None:
    t = draw_times(64, 1000, torch.Generator().manual_seed(0), antithetic=False)
    assert not torch.equal(t[32:], 1001 - t[:32])
