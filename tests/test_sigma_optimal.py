"""The optimal reverse variance (Bao et al. 2022): on Gaussian data the samples have the variance of the data."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from bench import GAUSSIAN, SCHEDULES, levels_of
from ddim.errors import DdimError
from ddim.exact import GaussianData
from ddim.model.config import ModelConfig
from ddim.model.model import Model
from ddim.objective.elbo import gamma_from_sigma
from ddim.plan.plan import Plan
from ddim.process.gaussian import sigma as sigma_of_eta
from ddim.process.schedule import Level
from ddim.samplers import ddim
from ddim.samplers.ddim import sigma_optimal
from models import tiny_model

LINEAR = SCHEDULES["linear"]
LEVELS = levels_of(LINEAR, "linear", 5)
MEAN, VARIANCE = 0.7, 0.3
DATA = GaussianData(torch.tensor([MEAN], dtype=torch.float64), torch.tensor([VARIANCE], dtype=torch.float64))


def constant_error(level: Level) -> float:
    return 0.5


def final_moments(plan: Plan) -> tuple[float, float]:
    """Mean and variance of the samples of a plan from the true x_T, with the ideal denoiser, which is linear in x."""
    mean = plan.start.signal * MEAN
    variance = plan.start.alpha_bar * VARIANCE + plan.start.variance
    for row in plan.rows:
        spread = row.now.alpha_bar * VARIANCE + row.now.variance
        slope = (row.x0[0] * row.now.signal * VARIANCE + row.eps[0] * row.now.noise) / spread
        mean = row.x0[0] * MEAN + slope * (mean - row.now.signal * MEAN)
        variance = slope**2 * variance + row.z**2
    return mean, variance


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled-linear"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_on_gaussian_data_the_last_mean_and_variance_are_exact(eta: float, steps: int, name: str) -> None:
    """For any eta of the mean and any number of steps; not for other choices of noise."""
    levels = levels_of(SCHEDULES[name], "quadratic" if steps < 5 else "equal-angle", steps)
    plan = ddim(levels, eta, "optimal", error=DATA.error, noise_at_end=True)
    mean, variance = final_moments(plan)
    assert mean == pytest.approx(MEAN, abs=1e-12)
    assert variance == pytest.approx(VARIANCE, abs=1e-12)
    for other in (ddim(levels), ddim(levels, eta=1.0), ddim(levels, sigma="hat", noise_at_end=True), ddim(levels, eta)):
        assert final_moments(other)[0] == pytest.approx(MEAN, abs=1e-12)
        assert abs(final_moments(other)[1] - VARIANCE) > 1e-3


def test_every_state_has_the_true_variance() -> None:
    """After every step the state has the variance of q(x_t)."""
    plan = ddim(levels_of(LINEAR, "equal-angle", 8), 0.5, "optimal", error=DATA.error)
    for k in range(1, 8):
        part = replace(plan, rows=plan.rows[:k])
        assert final_moments(part)[1] == pytest.approx(part.end.alpha_bar * VARIANCE + part.end.variance, abs=1e-12)


def test_the_weight_of_the_error_is_that_of_theorem_1() -> None:
    """gamma = k^2 / (2 sigma^2): with the error of eps at 1, sigma*^2 is sigma^2 + k^2."""
    sigmas = [sigma_of_eta(*step, 0.8) for step in itertools.pairwise(LEVELS)]
    gammas = gamma_from_sigma(LEVELS, [*sigmas[:-1], 1.0])
    for (now, following), sigma, gamma in zip(itertools.pairwise(LEVELS[:-1]), sigmas[:-1], gammas[:-1], strict=True):
        optimal = sigma_optimal(now, following, 1.0, sigma)
        assert optimal**2 - sigma**2 == pytest.approx(2 * sigma**2 * gamma, rel=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_sigma_optimal_is_the_formula_of_analytic_dpm(eta: float) -> None:
    """Bao et al. 2022, theorem 1, with the score of Gaussian data: in their beta_n, lambda_n and Gamma_n."""
    for now, following in itertools.pairwise(levels_of(LINEAR, "equal-angle", 12)):
        beta_now, beta_next = 1 - now.alpha_bar, 1 - following.alpha_bar
        alpha = now.alpha_bar / following.alpha_bar
        lam = eta * math.sqrt(beta_next / beta_now * (1 - alpha))
        score = (1 / (now.alpha_bar * GAUSSIAN.variance + beta_now)).mean().item()  # E || score ||^2 / d
        weight = math.sqrt(beta_now / alpha) - math.sqrt(max(beta_next - lam**2, 0.0))
        expected = lam**2 + weight**2 * (1 - beta_now * score)
        assert sigma_optimal(now, following, GAUSSIAN.error(now), lam) ** 2 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_only_the_added_noise_differs_from_ddim(eta: float) -> None:
    plan, base = ddim(LEVELS, eta, "optimal", error=constant_error), ddim(LEVELS, eta)
    assert [replace(row, z=0.0) for row in plan.rows] == [replace(row, z=0.0) for row in base.rows]
    assert all(row.z > other.z for row, other in zip(plan.rows[:-1], base.rows[:-1], strict=True))
    assert plan.rows[-1].z == 0.0
    assert (plan.keeps_marginals, plan.clip_x0, plan.about) == (False, False, f"sigma optimal, eta={eta:g}")
    assert plan.sampler == "ddim"
    ended = ddim(LEVELS, eta, "optimal", error=constant_error, noise_at_end=True)
    assert ended.rows[:-1] == plan.rows[:-1]
    assert ended.rows[-1].z == pytest.approx(LEVELS[-2].ratio * math.sqrt(0.5))
    assert Plan.from_json(plan.to_json()) == plan


def test_without_error_no_noise_is_added() -> None:
    plan = ddim(LEVELS, 0.5, "optimal", error=lambda level: 0.0)
    assert [row.z for row in plan.rows] == [row.sigma for row in plan.rows]


@pytest.mark.parametrize("at_end", [False, True])
def test_the_error_is_evaluated_at_the_start_of_steps_that_add_noise(at_end: bool) -> None:
    queried: list[Level] = []
    ddim(LEVELS, 1.0, "optimal", error=lambda level: queried.append(level) or 0.25, noise_at_end=at_end)
    assert queried == list(LEVELS[:-1] if at_end else LEVELS[:-2])


@pytest.mark.parametrize("error", [-1e-6, 1 + 1e-6, math.nan, math.inf])
def test_an_error_outside_0_to_1_is_invalid(error: float) -> None:
    with pytest.raises(DdimError, match=r"^sigma optimal at t = 1000: .*\b0\.\.1\b"):
        ddim(LEVELS, 0.0, "optimal", error=lambda level: error)


def test_missing_signal_or_error_is_an_error() -> None:
    without_signal = levels_of(SCHEDULES["linear+zero-terminal-snr"], "linear", 5)
    with pytest.raises(DdimError, match=r"^sigma optimal at t = 1000: "):
        ddim(without_signal, 0.0, "optimal", error=constant_error)
    with pytest.raises(DdimError, match=r"^sigma 'optimal': "):
        ddim(LEVELS, 0.0, "optimal")
    with pytest.raises(DdimError, match=r"^encoding: "):
        ddim(LEVELS[::-1], 0.0, "optimal", error=constant_error)


def with_table(*, error: tuple[float, ...] | None, T: int = 1000) -> Model:
    """A tiny model with an error table."""
    base = tiny_model(micro_batch=4)
    values = base.config.model_dump() | {"error": error}
    values["schedule"] = {"name": "linear", "T": T, "beta_end": 0.02 * 1000 / T}
    return Model(base.network, ModelConfig.model_validate(values), dtype="float32", micro_batch=4)


def test_a_model_interpolates_its_error_table_linearly() -> None:
    model = with_table(error=tuple(1 - t / 100 for t in range(1, 51)), T=50)
    times = [0.25, 1, 7.5, 20, 49.125, 50]
    plan = model.plan(grid=times, eta=0.3, sigma="optimal")
    levels = model.schedule.levels([*times[::-1], 0])
    expected = ddim(levels, 0.3, "optimal", error=lambda level: 1 - level.t / 100)
    assert [row.z for row in plan.rows] == pytest.approx([row.z for row in expected.rows], rel=1e-12)
    assert plan.about == "custom grid, S=6, sigma optimal, eta=0.3"
    assert model.plan(grid=times, sigma="optimal").about.endswith("eta=0")
    assert len({tuple(image.flatten().tolist()) for image in model.sample(3, plan=plan)}) == 3


def test_a_model_without_an_error_table_is_an_error_with_a_hint() -> None:
    model = with_table(error=None)
    with pytest.raises(DdimError, match=r"^sigma optimal: .*\bMODEL\b"):
        model.plan(5, sigma="optimal")
    assert not model.plan(5).stochastic
