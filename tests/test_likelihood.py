from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from bench import GAUSSIAN, MIXTURE, SCHEDULES, randn
from ddim import samplers
from ddim.data.pixels import BIN
from ddim.evaluation.likelihood import Traced, bits, discrete_nats, log_density, standard_normal
from ddim.objective.elbo import last_term
from ddim.plan.plan import Plan
from ddim.process.gaussian import diffuse
from ddim.process.parameterization import Prediction
from ddim.process.schedule import Level
from ddim.sampling.loop import run
from models import tiny_model

LINEAR = SCHEDULES["linear"]
FIRST, TOP = LINEAR.level(1), LINEAR.level(1000)


def rising(steps: int, order: int = 4) -> Plan:
    """From t = 1 to T in steps even in log-SNR."""
    times = [LINEAR.time_at_log_snr(FIRST.log_snr + (TOP.log_snr - FIRST.log_snr) * i / steps) for i in range(1, steps)]
    return samplers.runge_kutta(LINEAR.levels([1.0, *times, 1000.0]), LINEAR, order)


def states(data: object, count: int) -> Tensor:
    """Draws of the data at t = 1."""
    x0 = data.sample(count, seed=2)  # type: ignore[attr-defined]
    return diffuse(x0, randn(*x0.shape, seed=3), FIRST)


def test_gaussian_data_to_the_fifth_digit() -> None:
    """Exact to 1e-5 bits per dimension in every sample, against the closed form of the same model."""
    x = states(GAUSSIAN, 32)
    expected = GAUSSIAN.flow_log_density(x, FIRST, TOP)
    off = bits(log_density(GAUSSIAN.denoise, rising(120), x) - expected, 4).abs()
    assert off.max() < 1e-5


def test_gaussian_data_against_the_datas_own_density() -> None:
    """With the data's marginal at T as the prior, the model's density is the data's."""
    x = states(GAUSSIAN, 32)
    result = log_density(GAUSSIAN.denoise, rising(120), x, prior=lambda y: GAUSSIAN.log_density(y, TOP))
    assert bits(result - GAUSSIAN.log_density(x, FIRST), 4).abs().max() < 1e-5


def test_a_gaussian_mixture() -> None:
    """The flow has no closed form, but its density has: the mixture's."""
    x = states(MIXTURE, 24)
    result = log_density(MIXTURE.denoise, rising(160), x, prior=lambda y: MIXTURE.log_density(y, TOP))
    assert bits(result - MIXTURE.log_density(x, FIRST), x.shape[1]).abs().max() < 1e-4


def test_the_error_falls_with_the_fourth_power() -> None:
    x = states(GAUSSIAN, 16)
    exact = GAUSSIAN.flow_log_density(x, FIRST, TOP)
    errors = [(log_density(GAUSSIAN.denoise, rising(n), x) - exact).abs().mean().item() for n in (30, 60, 120)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(4, abs=0.5)


def test_the_state_is_the_same_without_the_trace() -> None:
    x = states(MIXTURE, 8)
    plan = rising(10)
    state = torch.cat([x, torch.zeros(8, 1, dtype=x.dtype)], 1)
    traced = run(Traced(MIXTURE.denoise, (x.shape[1],)), plan, state)[:, :-1]
    torch.testing.assert_close(traced, run(MIXTURE.denoise, plan, x), rtol=1e-10, atol=1e-10)


def test_probes_estimate_the_trace_without_bias() -> None:
    """Hutchinson: the mean over many probes is the exact trace; for a diagonal Jacobian one sign probe is exact."""
    level, x = LINEAR.level(300), states(MIXTURE, 3)
    state = torch.cat([x, torch.zeros(3, 1, dtype=x.dtype)], 1)

    def trace(probes: Tensor | None, denoise: object = MIXTURE.denoise) -> Tensor:
        return Traced(denoise, (x.shape[1],), probes)(state, level).eps[:, -1]  # type: ignore[arg-type]

    draws = randn(1500, *x.shape, seed=8).sign()
    each = torch.stack([trace(draw[None]) for draw in draws])
    off = (each.mean(0) - trace(None)).abs()
    assert (off < 5 * each.std(0) / math.sqrt(len(draws)) + 1e-12).all()
    assert each.std(0).max() > 0
    torch.testing.assert_close(trace(draws[:200]), each[:200].mean(0), rtol=1e-9, atol=1e-9)
    state = state[:, : 4 + 1] if x.shape[1] >= 4 else torch.cat([randn(3, 4, seed=1), state[:, -1:]], 1)
    one = Traced(GAUSSIAN.denoise, (4,), randn(1, 3, 4, seed=8).sign())(state, level).eps[:, -1]
    torch.testing.assert_close(one, Traced(GAUSSIAN.denoise, (4,))(state, level).eps[:, -1], rtol=1e-10, atol=1e-10)


def test_uniform_data_have_8_bits() -> None:
    """The uniform density over all bins gives exactly 8 bits per dimension, for any images and draw."""

    def uniform(x: Tensor) -> Tensor:
        inside = (x.double() / FIRST.signal).abs().flatten(1).amax(1) <= 1 + BIN / 2
        per = -math.log(256 * BIN) - math.log(FIRST.signal)
        return torch.where(inside, x[0].numel() * per, torch.tensor(-math.inf).double())

    x0 = torch.tensor([[-1.0, 1.0, 1 / 255, -127 / 255]], dtype=torch.float64).repeat(50, 1)
    nats = discrete_nats(uniform, GAUSSIAN.denoise, FIRST, x0, 3 * randn(50, 4, seed=1))
    torch.testing.assert_close(bits(nats, 4), torch.full((50,), 8.0, dtype=torch.float64), rtol=1e-12, atol=0)


def test_both_dequantisations_are_bounds_on_the_probability() -> None:
    """One dimension: -log P(k) by quadrature over x_1; the mean over draws is above, and not far above.

    The model: x_1 from the mixture's density at t = 1, then the discretised Gaussian about E[x_0 | x_1]; and for
    uniform dequantisation the probability of the bin under the density of xbar_1.
    """
    from ddim.exact import GaussianData

    data = GaussianData(torch.tensor([0.1]), torch.tensor([0.05]))
    sigma, x0 = 0.01, torch.tensor([[51 / 255]], dtype=torch.float64)
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)[:, None]
    width = 4 / 400_000

    def density(x: Tensor) -> Tensor:
        return data.log_density(x, FIRST)

    joint = density(grid) - last_term(x0.expand_as(grid), data.denoise(grid, FIRST).x0, sigma, BIN)
    decoder = -(joint.exp().sum() * width).log().item()
    inside = ((grid[:, 0] / FIRST.signal - x0[0, 0]).abs() <= BIN / 2).double()
    uniform = -((density(grid).exp() * inside).sum() * width).log().item()
    many, eps = x0.expand(20_000, 1), randn(20_000, 1, seed=5)
    for exact, last_sigma in ((decoder, sigma), (uniform, None)):
        mean = discrete_nats(density, data.denoise, FIRST, many, eps, last_sigma).mean().item()
        assert exact - 1e-3 < mean < exact + 0.2


def test_a_decreasing_or_stochastic_plan_raises_an_error() -> None:
    levels = LINEAR.levels([1000, 500, 1])
    from_clean = samplers.ddim(LINEAR.levels([0, 1, 500]))
    clipping = dataclasses.replace(rising(4), clip_x0=True)
    for plan in (samplers.ddim(levels), samplers.ddim(levels, eta=1.0), from_clean, clipping):
        with pytest.raises(ValueError, match="increasing"):
            log_density(GAUSSIAN.denoise, plan, randn(2, 4))


def test_a_network_can_be_differentiated_through_its_denoiser() -> None:
    """The trace of a network's Jacobian, by its denoiser's gradients and by differences."""
    model = tiny_model(in_channels=1, height=4, width=4, attention=())
    level = model.schedule.level(400)
    x = randn(1, 16, seed=1)
    exact = Traced(_double(model), (1, 4, 4))(torch.cat([x, x[:, :1]], 1), level).eps[0, -1].item()
    total, h = 0.0, 1e-3
    for i in range(16):
        step = torch.zeros(1, 16, dtype=torch.float64)
        step[0, i] = h
        up, down = (_double(model)((x + s).view(1, 1, 4, 4), level).eps.flatten() for s in (step, -step))
        total += (up - down)[i].item() / (2 * h)
    assert exact == pytest.approx(total * level.signal, rel=2e-3)
    assert abs(total) > 0.1


def _double(model: object) -> object:
    """The model's denoiser with a float64 network, so that finite differences are accurate."""
    network = model.network.double()  # type: ignore[attr-defined]

    def denoise(x: Tensor, level: Level, /) -> Prediction:
        output = network(x, torch.tensor([level.t], dtype=torch.float64))
        return Prediction(x * level.signal - output * level.noise, x * level.noise + output * level.signal)

    return denoise


def test_the_denoiser_of_a_model_passes_gradients_to_x_alone() -> None:
    model = tiny_model()
    x = randn(2, *model.shape, dtype=torch.float32).requires_grad_()
    output = model.denoise(x, model.schedule.level(300))
    [pulled] = torch.autograd.grad(output.eps.sum(), x)
    assert pulled.abs().max() > 0
    assert not model.denoise(x.detach(), model.schedule.level(300)).eps.requires_grad


def test_standard_normal() -> None:
    x = randn(3, 5)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(standard_normal(x), expected)
