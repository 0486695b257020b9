from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import SCHEDULES, randn
from ddim.errors import DdimError
from ddim.names import LossWeight
from ddim.objective.mse import Objective, weights
from ddim.process import schedule as schedules
from ddim.process.schedule import Schedule

GAMMAS = get_args(LossWeight)
LINEAR = SCHEDULES["linear"]
ZERO = SCHEDULES["linear+zero-terminal-snr"]
X0 = randn(6, 2, 3, 3, seed=1, dtype=torch.float32)
EPS = randn(6, 2, 3, 3, seed=2, dtype=torch.float32)
TIMES = torch.tensor([1, 2, 40, 300, 700, 1000])
WEIGHT = randn(2, 2, 3, 3, seed=3, dtype=torch.float32) / 3


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any function of x and t."""
    return torch.conv2d(x, WEIGHT.to(x.dtype), padding=1).tanh() + (t.view(-1, 1, 1, 1) / 1000).to(x.dtype)


def expected_loss(predicts: str, gamma: str) -> list[float]:
    """The mean over pixels of gamma_t (eps - eps_theta)^2 in float64, with eps_theta computed from the output."""
    losses = []
    for n, t in enumerate(TIMES.tolist()):
        abar = float(LINEAR.alpha_bar[t])
        signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
        x = signal * X0[n].double() + noise * EPS[n].double()
        output = network(x[None], torch.tensor([t - 1]))[0]
        total = 0.0
        for pixel in np.ndindex(*x.shape):
            value, state = output[pixel].item(), x[pixel].item()
            match predicts:
                case "eps":
                    eps = value
                case "x0":
                    eps = (state - signal * value) / noise
                case "v":
                    eps = noise * state + signal * value
            total += (EPS[n][pixel].item() - eps) ** 2
        losses.append(scale(gamma, t) * total / x.numel())
    return losses


def scale(gamma: str, t: int) -> float:
    """gamma_t on the linear schedule, by its formula."""
    abar = LINEAR.alpha_bar
    snr = abar[1:] / (1 - abar[1:])
    fall = np.log(snr[max(t - 2, 0)] / snr[min(t, 999)]) / (2 if 1 < t < 1000 else 1)
    first = (1 - abar[2]) / (2 * abar[1] * (1 - abar[2] / abar[1]))  # with sigma_1 = sigma_2
    snr_t, before = snr[t - 1], snr[t - 2]
    return {
        "simple": 1.0,
        "v": 1 / abar[t],
        "x0": 1 / snr_t,
        "min-snr": min(snr_t, 5) / snr_t,
        "p2": 1 / (1 + snr_t),
        "vlb": fall / 2,
        "sigmoid": fall / 2 / (1 + math.exp(-(2 - math.log(snr_t)))),
        "theorem1": first if t == 1 else (before - snr_t) / snr_t / 2,
    }[gamma]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_loss_is_the_weighted_error_in_eps_whatever_the_network_predicts(predicts: str, gamma: str) -> None:
    """Eq. (5): gamma_t || eps - eps_theta ||^2 per sample, against a loop over samples and pixels."""
    loss = Objective(LINEAR, predicts, gamma).loss(network, X0, TIMES, EPS)
    assert (loss.shape, loss.dtype) == ((6,), torch.float32)
    np.testing.assert_allclose(loss.numpy(), expected_loss(predicts, gamma), rtol=1e-3 if predicts == "x0" else 1e-4)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_eps_mse_is_the_error_in_eps_whatever_the_network_predicts(predicts: str) -> None:
    """Unweighted, against the same loop over samples and pixels, for any gamma."""
    for gamma in ("simple", "sigmoid"):
        objective = Objective(LINEAR, predicts, gamma)
        error = objective.error(network, X0, TIMES, EPS)
        in_eps = objective.eps_mse(error, TIMES)
        np.testing.assert_allclose(in_eps, expected_loss(predicts, "simple"), rtol=1e-3 if predicts == "x0" else 1e-4)
        assert torch.equal(objective.times.apply_weight(error, TIMES), objective.loss(network, X0, TIMES, EPS))


def test_eps_mse_is_zero_without_signal() -> None:
    for predicts in ("v", "x0"):
        assert Objective(ZERO, predicts).eps_mse(torch.tensor([3.0]), torch.tensor([1000])).tolist() == [0.0]


def test_the_network_gets_x_t_and_t_minus_1() -> None:
    seen = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return x

    Objective(LINEAR, "eps").loss(spy, X0, TIMES, EPS)
    [(x, t)] = seen
    assert torch.equal(t, TIMES - 1)
    for n, time in enumerate(TIMES.tolist()):
        abar = LINEAR.alpha_bar[time]
        expected = math.sqrt(abar) * X0[n] + math.sqrt(1 - abar) * EPS[n]
        torch.testing.assert_close(x[n], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("predicts", "gamma"), [("v", "v"), ("x0", "x0"), ("eps", "simple")])
def test_the_unweighted_errors_have_weight_one(predicts: str, gamma: str) -> None:
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


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_weights_are_positive_and_finite(predicts: str, gamma: str) -> None:
    for name in schedules.NAMED:
        actual = weights(SCHEDULES[name], predicts, gamma)
        assert (actual.shape, actual.dtype) == ((1000,), np.float64)
        assert np.isfinite(actual).all(), name
        assert (actual.astype(np.float32) > 0).all(), name


@pytest.mark.parametrize("name", schedules.NAMED)
def test_infinite_weights_without_signal_are_errors(name: str) -> None:
    zero = SCHEDULES[f"{name}+zero-terminal-snr"]
    infinite = {"eps": {"v", "x0", "vlb", "sigmoid", "theorem1"}, "v": {"vlb", "sigmoid"}}
    infinite["x0"] = infinite["v"]
    for predicts, errors in infinite.items():
        for gamma in GAMMAS:
            if gamma in errors:
                with pytest.raises(DdimError, match=f"weight {gamma}: "):
                    weights(zero, predicts, gamma)
            else:
                actual = weights(zero, predicts, gamma)
                assert np.isfinite(actual).all()
                assert (actual >= 0).all()


@pytest.mark.parametrize("gamma", ["vlb", "sigmoid", "theorem1"])
def test_step_weights_of_a_single_timestep_are_errors(gamma: str) -> None:
    with pytest.raises(DdimError, match=f"weight {gamma}: "):
        weights(schedules.linear(1), "eps", gamma)


@pytest.mark.parametrize("name", schedules.NAMED)
def test_theorem1_is_the_weight_of_the_discrete_bound(name: str) -> None:
    """(SNR_{t-1} - SNR_t) / SNR_t / 2 (Kingma et al. 2021, eq. 13), and Ho et al. 2020's eq. (12), from t = 2."""
    schedule = SCHEDULES[name]
    actual = weights(schedule, "eps", "theorem1")[1:]
    snr = np.exp(schedule.log_snr)
    np.testing.assert_allclose(actual, (snr[:-1] - snr[1:]) / snr[1:] / 2, rtol=1e-9)
    abar = schedule.alpha_bar[1:]
    alpha = abar[1:] / abar[:-1]
    beta_tilde = (1 - abar[:-1]) / (1 - abar[1:]) * (1 - alpha)
    np.testing.assert_allclose(actual, (1 - alpha) ** 2 / (2 * beta_tilde * alpha * (1 - abar[1:])), rtol=1e-8)


@pytest.mark.parametrize("name", schedules.NAMED)
def test_vlb_is_below_theorem1(name: str) -> None:
    """exp(x) - 1 >= x, x the fall of a step; a central difference is the mean of the steps before and after."""
    schedule = SCHEDULES[name]
    steps, limit = weights(schedule, "eps", "theorem1"), weights(schedule, "eps", "vlb")
    assert (limit[1:-1] < (steps[1:-1] + steps[2:]) / 2).all()
    assert limit[-1] < steps[-1]
    above = limit > steps
    assert not above[:-2].any()  # the log-SNR of the cosine falls ever faster at the end
    assert not above.any() or name == "cosine"


def test_vlb_and_theorem1_agree_for_small_steps() -> None:
    deviation = []
    for fold in (1, 4):
        schedule = schedules.linear(1000 * fold, 1e-4 / fold, 0.02 / fold)
        ratio = weights(schedule, "eps", "theorem1") / weights(schedule, "eps", "vlb")
        deviation.append(ratio[50 * fold - 1 :: 50 * fold] - 1)
    assert deviation[0].max() < 0.05
    np.testing.assert_allclose(deviation[1], deviation[0] / 4, rtol=0.05)


def test_vlb_is_half_the_slope_of_the_log_snr() -> None:
    straight = Schedule(np.linspace(6.0, -6.0, 25))
    np.testing.assert_allclose(weights(straight, "eps", "vlb"), np.full(25, 0.25), rtol=1e-12)
    t = np.arange(1, 26)
    curved = weights(Schedule(6 - 0.01 * t**2), "eps", "vlb")
    np.testing.assert_allclose(curved[1:-1], 0.01 * t[1:-1], rtol=1e-10)
    np.testing.assert_allclose(curved[[0, -1]], [0.015, 0.245], rtol=1e-10)
    halved = weights(straight, "eps", "sigmoid") / weights(straight, "eps", "vlb")
    assert halved[8] == pytest.approx(0.5)  # where the log-SNR is 2
    np.testing.assert_allclose(halved[:8] + halved[16:8:-1], np.ones(8), rtol=1e-12)
