"""Learned variances (Nichol & Dhariwal 2021), validated against the formulas of OpenAI's libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import randn
from ddim import samplers
from ddim.errors import DdimError
from ddim.model.load import load
from ddim.model.model import Model
from ddim.plan.plan import Plan
from ddim.process.parameterization import Prediction
from ddim.process.rng import Noise
from ddim.process.schedule import linear
from ddim.sampling.loop import run
from models import ddim, save_tiny, tiny_model

TIMES = [1, 40, 300, 650, 1000]  # t = 1..T; OpenAI's are one less
COUNT = 2


def model_of(predicts: str = "eps", **changes: Any) -> Any:
    return tiny_model(predicts=predicts, learned_variance=True, **changes)


def p_sample_loop(model: Model, start: Tensor, fresh: list[Tensor], clip: bool) -> Tensor:
    """OpenAI's ancestral sampling over a respaced process, model_var_type LEARNED_RANGE; float64."""
    base = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    alpha_bar = base[np.array(TIMES) - 1]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    posterior = betas * (1 - before) / (1 - alpha_bar)
    lower = np.log(np.append(posterior[1], posterior[1:]))
    x = start.double()
    for k, i in enumerate(reversed(range(len(TIMES)))):
        with torch.no_grad():
            out = model.network(x.float(), torch.full((len(x),), float(TIMES[i]))).double()
        output, values = out.chunk(2, dim=1)
        x0 = (
            x / np.sqrt(alpha_bar[i]) - np.sqrt(1 / alpha_bar[i] - 1) * output
            if model.config.predicts == "eps"
            else output
        )
        x0 = x0.clamp(-1, 1) if clip else x0
        mean = betas[i] * np.sqrt(before[i]) / (1 - alpha_bar[i]) * x0
        mean = mean + (1 - before[i]) * np.sqrt(1 - betas[i]) / (1 - alpha_bar[i]) * x
        frac = (values + 1) / 2
        log_variance = frac * np.log(betas[i]) + (1 - frac) * lower[i]
        x = mean + ((0.5 * log_variance).exp() * fresh[k] if i else 0)
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_sampling_matches_openais_formulas(predicts: str, clip: bool) -> None:
    model = model_of(predicts)
    plan = model.plan(grid=TIMES, sigma="learned", clip_x0=clip)
    noise = model.noise(COUNT, seed=5)
    reference = p_sample_loop(model, noise.start(), [noise.row(k) for k in range(len(TIMES))], clip)
    actual = model.sample(COUNT, seed=5, plan=plan).double()
    assert float((actual - reference).norm() / reference.norm()) < 1e-5
    small = model.sample(COUNT, seed=5, grid=TIMES, eta=1.0, clip_x0=clip, sampler="ddim").double()
    assert float((small - reference).norm() / reference.norm()) > 1e-3  # the learned variance has an effect


def test_the_noise_is_between_the_posterior_and_beta() -> None:
    levels = linear().levels([*reversed(TIMES), 0])
    rows = samplers.ddim(levels, sigma="learned", clip_x0=False).rows
    for row, plain in zip(rows[:-1], samplers.ddim(levels, eta=1.0).rows, strict=False):
        assert row.z == row.sigma == plain.z
        assert row.z_high == pytest.approx((1 - row.now.alpha_bar / row.next.alpha_bar) ** 0.5, rel=1e-12)
        assert (row.x0, row.eps) == (plain.x0, plain.eps)
    assert (rows[-1].z, rows[-1].z_high) == (0, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.5, 1.5])
def test_the_fraction_interpolates_the_log_variance(fraction: float) -> None:
    levels = linear().levels([400, 200])
    plan = samplers.ddim(levels, sigma="learned", clip_x0=False)
    start, noise = randn(1, 3), Noise(0, (0,), (3,))

    def denoise(x: Tensor, level: Any) -> Prediction:
        return Prediction(torch.zeros_like(x), x / level.noise, torch.full_like(x, fraction))

    row = plan.rows[0]
    added = run(denoise, plan, start, noise) - row.eps[0] * start / row.now.noise
    assert torch.allclose(added, noise.row(0).double() * row.z ** (1 - fraction) * row.z_high**fraction, rtol=1e-6)


def test_clipping_and_guidance_keep_the_learned_variance() -> None:
    level = linear().level(300)
    x, fraction = randn(2, 3), randn(2, 3, seed=1)
    result = Prediction(randn(2, 3, seed=2), randn(2, 3, seed=3), fraction)
    assert result.with_x0(result.x0.clamp(-1, 1), x, level).variance_fraction is fraction
    assert Prediction(result.x0, result.eps).lerp(result, 2.0).variance_fraction is fraction


def test_a_plan_goes_through_json_and_prints_both_ends() -> None:
    model = model_of()
    plan = model.plan(grid=TIMES, sigma="learned", clip_x0=False)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert torch.equal(model.sample(COUNT, plan=again), model.sample(COUNT, plan=plan))
    assert "z to" in plan.table(200)
    assert f"{plan.rows[0].z_high:.6f}" in plan.table(200)
    assert not plan.keeps_marginals


@pytest.mark.parametrize("z_high", [0.001, -0.5, float("nan")])
def test_invalid_bounds_raise_an_error(z_high: float) -> None:
    plan = samplers.ddim(linear().levels([400, 200, 0]), sigma="learned")
    with pytest.raises(DdimError, match="plan row 0"):
        replace(plan, rows=(replace(plan.rows[0], z_high=z_high), *plan.rows[1:])).check()


def test_a_network_without_learned_variance_raises_an_error(tmp_path: Path) -> None:
    plain = tiny_model(predicts="eps")
    with pytest.raises(DdimError, match=r"^sigma learned: "):
        plain.plan(grid=TIMES, sigma="learned", clip_x0=False)
    with pytest.raises(DdimError, match=r"^plan ddpm\(custom grid, S=5, sigma learned\): "):
        plain.sample(1, plan=model_of().plan(grid=TIMES, sigma="learned", clip_x0=False))
    with pytest.raises(DdimError, match=r"^eta and sigma: "):
        model_of().plan(grid=TIMES, sigma="learned", eta=0.5, clip_x0=False)
    with pytest.raises(DdimError, match=r"^encoding: "):
        model_of().plan(grid=TIMES, sigma="learned", encode=True)


def test_other_plans_ignore_the_learned_variance() -> None:
    model = model_of("v")
    plan = model.plan(5)
    x = randn(COUNT, 1, 8, 8, dtype=torch.float32)
    level = plan.start
    with torch.no_grad():
        output = model.network(x, torch.full((COUNT,), level.t))[:, :1]
    result = model.denoise(x, level)
    assert torch.allclose(result.x0, x * level.signal - output * level.noise, atol=1e-5)
    assert model.sample(COUNT, plan=plan).shape == (COUNT, 1, 8, 8)


def test_the_commands_accept_a_learned_sigma(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learned, plain = (
        save_tiny(tmp_path / name, predicts="v", learned_variance=name == "learned") for name in ("learned", "plain")
    )
    assert ddim("plan", learned, "--steps", 4, "--sigma", "learned", "--json") == 0
    text = capsys.readouterr().out
    assert json.loads(text)["rows"][0]["z_high"] > 0
    (tmp_path / "plan.json").write_text(text)
    common = ("-n", 2, "--plan", tmp_path / "plan.json")
    assert ddim("sample", learned, *common, "--out", tmp_path / "samples") == 0
    assert ddim("sample", plain, *common, "--out", tmp_path / "others") == 2
    assert "plan ddpm(equal-angle, S=4, sigma learned): " in capsys.readouterr().err
    assert load(learned, "cpu").config.network.learned_variance
