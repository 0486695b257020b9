"""The higher-order solvers against the installed diffusers' schedulers, on the levels of their tables.

Their sigmas (our noise / signal) are set to float64 after `set_timesteps`, so that what differs is the formula. Their
DPM-Solver++ computes in float32 all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from bench import randn
from ddim.plan.plan import Plan
from ddim.process.parameterization import Prediction, predict
from ddim.process.schedule import Level, Schedule
from ddim.samplers import deis, dpm_solver_pp, runge_kutta, unipc
from ddim.sampling.loop import trajectory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SHAPE = (2, 3, 4, 4)
STEPS = 20  # their lowering of the order at the end, below 15 steps, is then off


def set_up(kind: type, steps: int = STEPS, **settings: Any) -> tuple[Any, list[Level]]:
    """A diffusers scheduler with a float64 table, and its levels, from its sigmas."""
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas = list(dict.fromkeys(scheduler.sigmas.tolist()))  # Heun's table has most of them twice
    return scheduler, [
        Level(float(len(sigmas) - 1 - k), -2 * math.log(s) if s else math.inf) for k, s in enumerate(sigmas)
    ]


def network(x: Tensor, log_snr: float) -> Tensor:
    """An arbitrary eps_theta."""
    return torch.tanh(x.roll(1, -1)) * 0.8 + math.cos(log_snr) * 0.2


def denoise(x: Tensor, level: Level, /) -> Prediction:
    return predict(network(x, level.log_snr), x, level, "eps")


def ours(plan: Plan, x: Tensor) -> list[Tensor]:
    return [step.x for step in trajectory(denoise, plan, x)]


def peer(scheduler: Any, levels: Sequence[Level], x: Tensor) -> list[Tensor]:
    states = []
    for t, level in zip(scheduler.timesteps, levels[:-1], strict=True):
        x = scheduler.step(network(x, level.log_snr), t, x).prev_sample
        states.append(x)
    return states


def differences(mine: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """The largest difference in each state, relative to the state's largest value."""
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, other, strict=True)]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 20])
def test_two_steps_of_the_dpm_solver(spacing: str, steps: int) -> None:
    """All states in float32; the last step, to clean data, is of order 1 in both."""
    scheduler, levels = set_up(DPMSolverMultistepScheduler, steps, solver_order=2, timestep_spacing=spacing)
    assert levels[-1].log_snr == math.inf
    x = randn(*SHAPE)
    assert max(differences(ours(dpm_solver_pp(levels, 2), x), peer(scheduler, levels, x))) < 1e-6


def with_half_of_the_second_difference(plan: Plan) -> Plan:
    """The weight 2 phi_3(-h) of D2 = h^2 f''/2 (divided differences of x0 in log(signal / noise)) set to phi_3(-h)."""
    rows = list(plan.rows)
    for k in range(2, len(rows) - 1):
        row = rows[k]
        a, b, c = (past.now.log_snr / 2 for past in rows[k::-1][:3])
        h = row.next.log_snr / 2 - a
        d2 = h**2 * np.array([1 / ((a - b) * (a - c)), 1 / ((b - a) * (b - c)), 1 / ((c - a) * (c - b))])
        less = row.next.signal * (0.5 - (math.expm1(-h) + h) / h**2) * d2
        rows[k] = replace(row, x0=tuple(float(value) for value in row.x0 - less))
    return replace(plan, rows=tuple(rows)).check()


def test_third_order_dpm_solver_differs_in_the_second_difference_only() -> None:
    """Diffusers uses half of its weight and is of order 2 only, see test_multistep; the rest is equal."""
    scheduler, levels = set_up(DPMSolverMultistepScheduler, solver_order=3)
    x, plan = randn(*SHAPE), dpm_solver_pp(levels, 3)
    other = peer(scheduler, levels, x)
    errors = differences(ours(plan, x), other)
    assert max(errors[:2]) < 1e-6
    assert min(errors[2:]) > 1e-4
    assert max(differences(ours(with_half_of_the_second_difference(plan), x), other)) < 1e-6


@pytest.mark.parametrize("order", [2, 3])
def test_unipc(order: int) -> None:
    """All states, in float64: predictor, corrector and the lower orders at the start."""
    settings = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
    scheduler, levels = set_up(UniPCMultistepScheduler, solver_order=order, solver_type="bh2", **settings)
    x = randn(*SHAPE)
    assert max(differences(ours(unipc(levels, order), x), peer(scheduler, levels, x))) < 1e-10


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_to_clean_data(order: int) -> None:
    """By default the last step is of order 1 in both; with order 3 diffusers' last but one is of order 2."""
    scheduler, levels = set_up(UniPCMultistepScheduler, solver_order=order)
    assert levels[-1].log_snr == math.inf
    x = randn(*SHAPE)
    errors = differences(ours(unipc(levels, order), x), peer(scheduler, levels, x))
    assert max(errors[:-2]) < 1e-10
    assert (max(errors[-2:]) < 1e-10) == (order == 2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int) -> None:
    """Log-rho, all states, in float64; diffusers ends at the first timestep of the schedule, not at clean data."""
    scheduler, levels = set_up(DEISMultistepScheduler, solver_order=order)
    x = randn(*SHAPE)
    assert max(differences(ours(deis(levels, order), x), peer(scheduler, levels, x))) < 1e-10


def test_heun() -> None:
    """Both stages of each step, in float64. Diffusers stores x / signal; the last step, to clean data, is Euler's."""
    scheduler, levels = set_up(HeunDiscreteScheduler)
    plan = runge_kutta(levels, Schedule(np.array([level.log_snr for level in levels[-2::-1]])), order=2)
    x = randn(*SHAPE)
    state = x / levels[0].signal
    for row, t, mine in zip(plan.rows, scheduler.timesteps, ours(plan, x), strict=True):
        eps = network(scheduler.scale_model_input(state, t), row.now.log_snr)
        state = scheduler.step(eps, t, state).prev_sample
        torch.testing.assert_close(mine, state * row.next.signal, rtol=1e-9, atol=1e-9)
