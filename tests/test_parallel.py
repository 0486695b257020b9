"""Parallel sampling over time gives the result of the sequential loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import SAMPLERS, randn
from ddim import exact, samplers
from ddim.errors import DdimError
from ddim.process.rng import Noise
from ddim.process.schedule import linear
from ddim.sampling import parallel
from ddim.sampling.guidance import Guided
from ddim.sampling.loop import run, trajectory
from models import tiny_model

LEVELS = linear().levels([999, 800, 610, 450, 300, 190, 100, 40, 9, 0])
DATA = exact.MixtureData(
    torch.full((3,), 1 / 3), torch.tensor([[-1.0, 0.5], [0.6, -0.4], [0.2, 0.9]]), 0.04 * torch.eye(2).expand(3, 2, 2)
)
START = randn(4, 2).double()


class Draws(Noise):
    """Noise of float64 states of two numbers."""

    def _draw(self, draw: int) -> torch.Tensor:
        return super()._draw(draw).double()


NOISE = Draws(3, (0, 1, 2, 3), (2,))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", SAMPLERS)
def test_after_k_rounds_the_first_k_states_equal_those_of_the_loop(name: str, window: int | None) -> None:
    plan = SAMPLERS[name](LEVELS)
    expected_states = [START, *(step.x for step in trajectory(DATA.denoise, plan, START, NOISE))]
    seen = 0
    for result in parallel.rounds(DATA.denoise, plan, START, NOISE, window, tolerance=0):
        seen += 1
        assert result.index == seen
        assert result.done >= seen
        scale = 1 + expected_states[result.done].abs().max()
        torch.testing.assert_close(result.x, expected_states[result.done], rtol=0, atol=float(1e-9 * scale))
    assert result.done == len(plan) >= seen


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_error_is_about_the_tolerance_and_there_are_far_fewer_rounds_than_rows(eta: float) -> None:
    levels = linear().levels([*range(1000, 0, -10), 0])
    plan = samplers.ddim(levels, eta=eta)
    expected = run(DATA.denoise, plan, START, NOISE)
    count = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        *results, last = parallel.rounds(DATA.denoise, plan, START, NOISE, tolerance=tolerance)
        error = (last.x - expected).square().mean(1).sqrt().max()
        assert error < 10 * tolerance
        count.append(len(results) + 1)
    assert count == sorted(count)
    assert count[1] < len(plan) / 2


@given(window=st.integers(1, 12), tolerance=st.floats(0, 0.5))
def test_there_are_never_more_rounds_than_rows(window: int, tolerance: float) -> None:
    plan = samplers.ddim(LEVELS)
    results = [*parallel.rounds(DATA.denoise, plan, START, window=window, tolerance=tolerance)]
    assert len(results) <= len(plan)
    assert [item.done for item in results] == sorted(item.done for item in results)
    assert results[-1].done == len(plan)
    assert all(item.nfe <= window for item in results)


def test_a_window_of_one_equals_the_loop() -> None:
    plan = samplers.unipc(LEVELS, order=2)
    results = parallel.run(DATA.denoise, plan, START, window=1)
    torch.testing.assert_close(results, run(DATA.denoise, plan, START), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["plain", "labels", "guided", "clipped", "learned"])
def test_the_network_is_evaluated_once_per_round_with_the_same_result(case: str) -> None:
    model = tiny_model(classes=0 if case in ("plain", "clipped", "learned") else 3, learned_variance=case == "learned")
    plan = model.plan(8, eta=0.5, clip_x0=case == "clipped")
    if case == "learned":
        plan = model.plan(8, sigma="learned")
    labels = torch.tensor([0, 2, 1]) if model.config.network.classes else None
    denoise = model.denoiser(labels, 2.0 if case == "guided" else None)
    calls: list[int] = []
    for part in (denoise.conditional, denoise.unconditional) if isinstance(denoise, Guided) else (denoise,):
        body = part.body
        part.body = lambda x, c, body=body: (calls.append(len(x)), body(x, c))[1]
    noise = model.noise(3, seed=5)
    expected = run(denoise, plan, noise)
    calls.clear()
    *before, last = parallel.rounds(denoise, plan, noise, tolerance=0)
    torch.testing.assert_close(last.x, expected, rtol=1e-3, atol=1e-3)
    assert len(calls) == (len(before) + 1) * (2 if case == "guided" else 1)
    assert calls[0] == 3 * 8


def test_the_gradient_mode_of_the_caller_is_unchanged() -> None:
    steps = parallel.rounds(DATA.denoise, samplers.ddim(LEVELS), START)
    next(steps)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, r"^window 0: "),
        ({"tolerance": -1.0}, r"^tolerance -1\.0: "),
        ({"tolerance": math.nan}, "tolerance nan"),
    ],
)
def test_arguments_out_of_range_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DdimError, match=message):
        next(parallel.rounds(DATA.denoise, samplers.ddim(LEVELS), START, **settings))


@pytest.mark.parametrize("method", ["reversible", "lossless"])
def test_a_plan_with_two_initial_states_is_an_error(method: str) -> None:
    plan = tiny_model().inversion(method, 5).resume_plan
    with pytest.raises(DdimError, match=r"^plan bdia\(equal-angle, S=5,"):
        next(parallel.rounds(DATA.denoise, plan, START))


def test_a_stochastic_plan_requires_noise() -> None:
    with pytest.raises(ValueError):
        next(parallel.rounds(DATA.denoise, samplers.ddim(LEVELS, eta=1.0), START))


def test_the_window_moves_past_the_leading_converged_states_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = samplers.ddim(LEVELS)
    moved = [[9.0, 0.0, 9.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    values = iter(moved)
    monkeypatch.setattr(parallel._Path, "improve", lambda self, some: torch.tensor(next(values)[: len(some)]))
    results = [*parallel.rounds(DATA.denoise, plan, START, window=6)]
    assert [item.done for item in results] == [2, 3, 9]
    assert [item.nfe for item in results] == [6, 6, 6]
