"""Parity with the installed diffusers' schedulers, and tests of their known errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from bench import SCHEDULES, falling, levels_of, randn
from ddim.plan.plan import Plan
from ddim.process.parameterization import Prediction, predict
from ddim.process.schedule import Level, Schedule
from ddim.samplers import ddim
from ddim.sampling.loop import trajectory

LINEAR = SCHEDULES["linear"]
SHAPE = (2, 3, 4, 4)


class Fixed:
    """Given noise, one tensor per row."""

    def __init__(self, rows: list[Tensor]):
        self.rows = rows

    def row(self, k: int) -> Tensor:
        return self.rows[k]


def scheduler(schedule: Schedule = LINEAR, **settings: Any) -> DDIMScheduler:
    """A diffusers scheduler with our float64 table in place of its float32 one, to compare only the formulas."""
    peer_scheduler = DDIMScheduler(**{"clip_sample": False, "set_alpha_to_one": True, **settings})
    peer_scheduler.alphas_cumprod = torch.from_numpy(schedule.alpha_bar[1:])
    return peer_scheduler


def network(x: Tensor, t: float) -> Tensor:
    """An arbitrary eps_theta of times from 0, large enough for clipping to matter."""
    return torch.tanh(x.roll(1, -1)) * 1.2 + math.cos(t / 100) * 0.3


def ours(plan: Plan, x: Tensor, noise: list[Tensor] | None = None) -> list[Tensor]:
    def denoise(x: Tensor, level: Level, /) -> Prediction:
        return predict(network(x, level.t - 1), x, level, "eps")

    return [step.x for step in trajectory(denoise, plan, x, Fixed(noise) if noise else None)]


def peer(
    peer_scheduler: DDIMScheduler, steps: int, x: Tensor, noise: list[Tensor] | None = None, **settings: Any
) -> list[Tensor]:
    peer_scheduler.set_timesteps(steps)
    states = []
    for k, t in enumerate(peer_scheduler.timesteps.tolist()):
        extra = {"variance_noise": noise[k]} if noise else {}
        x = peer_scheduler.step(network(x, t), t, x, **settings, **extra).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize(
    ("name", "peer_name"), [("linear", "linear"), ("scaled-linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
@pytest.mark.parametrize("rescale", [False, True])
def test_schedules(name: str, peer_name: str, rescale: bool) -> None:
    ends = {} if name != "scaled-linear" else {"beta_start": 0.00085, "beta_end": 0.012}
    table = DDIMScheduler(beta_schedule=peer_name, rescale_betas_zero_snr=rescale, **ends).alphas_cumprod
    schedule = SCHEDULES[f"{name}+zero-terminal-snr" if rescale else name]
    np.testing.assert_allclose(schedule.alpha_bar[1:], table.numpy(), rtol=3e-4, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddim_with_leading_spacing(steps: int, eta: float) -> None:
    """If S divides T, t - T // S is the next timestep, and all steps of a run agree in float64."""
    plan = ddim(levels_of(LINEAR, "leading", steps), eta=eta)
    x = randn(*SHAPE)
    noise = [randn(*SHAPE, seed=k) for k in range(1, steps + 1)] if eta else None
    mine, other = ours(plan, x, noise), peer(scheduler(), steps, x, noise, eta=eta)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_with_diffusers_float32_table(eta: float) -> None:
    """One step of the unmodified scheduler from every timestep in float32, to 1e-5 relative to its terms."""
    peer_scheduler = DDIMScheduler(clip_sample=False)
    peer_scheduler.set_timesteps(50)
    plan = ddim(levels_of(LINEAR, "leading", 50), eta=eta)
    for row in plan.rows:
        t = int(row.now.t) - 1
        x, z = randn(*SHAPE, seed=t, dtype=torch.float32), randn(*SHAPE, seed=t + 1, dtype=torch.float32)
        pair = predict(network(x, t), x, row.now, "eps")
        mine = row.x0[0] * pair.x0 + row.eps[0] * pair.eps + row.z * z
        other = peer_scheduler.step(network(x, t), t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 / row.now.signal)


def test_ddpm_is_eta_one_with_all_timesteps() -> None:
    peer_scheduler = DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    peer_scheduler.alphas_cumprod = torch.from_numpy(LINEAR.alpha_bar[1:])
    plan = ddim(levels_of(LINEAR, "linear", 1000), eta=1.0)
    x = state = randn(*SHAPE)
    drawn = torch.Generator().manual_seed(1)
    noise = [torch.randn(SHAPE, generator=drawn, dtype=torch.float64) for _ in range(999)]
    mine = ours(plan, x, [*noise, torch.zeros(SHAPE, dtype=torch.float64)])
    again = torch.Generator().manual_seed(1)
    for k, t in enumerate(range(999, -1, -1)):
        state = peer_scheduler.step(network(state, t), t, state, generator=again).prev_sample
        torch.testing.assert_close(mine[k], state, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_clipping_agrees_only_if_eps_is_recomputed(eta: float) -> None:
    """Diffusers clips x_0 by default and keeps an eps that is no longer consistent with it."""
    plan = ddim(levels_of(LINEAR, "leading", 50), eta=eta, clip_x0=True)
    x = randn(*SHAPE)
    noise = [randn(*SHAPE, seed=k) for k in range(1, 51)] if eta else None
    mine = ours(plan, x, noise)
    right = peer(scheduler(clip_sample=True), 50, x, noise, eta=eta, use_clipped_model_output=True)
    wrong = peer(scheduler(clip_sample=True), 50, x, noise, eta=eta)
    torch.testing.assert_close(mine[-1], right[-1], rtol=1e-8, atol=1e-8)
    assert (mine[-1] - wrong[-1]).abs().max() > 0.01


def step_of(now: Level, following: Level, x: Tensor, eps: Tensor) -> Tensor:
    """Eq. (12) at sigma 0 between two given levels, the correct step."""
    x0 = (x - math.sqrt(1 - now.alpha_bar) * eps) / math.sqrt(now.alpha_bar)
    return math.sqrt(following.alpha_bar) * x0 + math.sqrt(1 - following.alpha_bar) * eps


@pytest.mark.parametrize(("spacing", "steps", "wrong_rows"), [("linspace", 10, 9), ("trailing", 13, 12)])
def test_diffusers_steps_to_the_wrong_alpha_bar(spacing: str, steps: int, wrong_rows: int) -> None:
    """The step of diffusers goes to t - T // S, which is not the next entry of its own timesteps.

    linspace, S = 10: the grid is 999, 888, 777, ..., 0, but the first step goes to 899, the second to 788, and so on;
    only the last one (t - 100 < 0, taken as clean) is right. trailing, S = 13: 77 is rounded down to 76 per step, and
    the last step lands on their index 0, which is noisy, instead of clean data.
    """
    plan = ddim(levels_of(LINEAR, spacing, steps))
    peer_scheduler = scheduler(timestep_spacing=spacing)
    peer_scheduler.set_timesteps(steps)
    grid = [t + 1 for t in peer_scheduler.timesteps.tolist()]
    assert [row.now.t for row in plan.rows] == grid
    x, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    wrong = []
    for row, t, following in zip(plan.rows, grid, [*grid[1:], 0], strict=True):
        x0 = predict(eps, x, row.now, "eps").x0
        mine = row.x0[0] * x0 + row.eps[0] * eps
        torch.testing.assert_close(
            mine, step_of(LINEAR.level(t), LINEAR.level(following), x, eps), rtol=1e-9, atol=1e-9
        )
        other = peer_scheduler.step(eps, t - 1, x).prev_sample
        went = LINEAR.level(max(t - 1000 // steps, 0))
        torch.testing.assert_close(other, step_of(LINEAR.level(t), went, x, eps), rtol=1e-9, atol=1e-9)
        wrong.append((mine - other).abs().max().item() > 1e-4)
        assert wrong[-1] == (went.t != following)
    assert sum(wrong) == wrong_rows
    assert wrong[-1] == (spacing == "trailing")


def test_diffusers_last_trailing_step_stays_noisy() -> None:
    """trailing, S = 13: 76 - 76 = 0 is a table index (our t = 1), not clean data, also with set_alpha_to_one."""
    peer_scheduler = scheduler(timestep_spacing="trailing")
    peer_scheduler.set_timesteps(13)
    last = peer_scheduler.timesteps.tolist()[-1]
    x, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    now = LINEAR.level(last + 1)
    x0 = predict(eps, x, now, "eps").x0
    clean = falling(LINEAR, [last + 1])
    [mine] = [row.x0[0] * x0 + row.eps[0] * eps for row in ddim(clean).rows]
    torch.testing.assert_close(mine, x0, rtol=0, atol=0)
    left = peer_scheduler.step(eps, last, x).prev_sample
    first = LINEAR.level(1)
    torch.testing.assert_close(left, first.signal * x0 + first.noise * eps, rtol=1e-9, atol=1e-9)
    assert (left - mine).abs().max() > first.noise / 2
