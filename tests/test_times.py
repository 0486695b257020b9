"""Sampling of training timesteps: uniform or by importance, independent or antithetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim.model.modality import modality_of
from ddim.objective.mse import Objective
from ddim.objective.timestep_sampling import TimestepSampler
from ddim.process.schedule import linear
from models import tiny_config


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform_sampler(T: int) -> TimestepSampler:
    return TimestepSampler(torch.ones(T))


@given(batch=st.integers(1, 33), T=st.integers(1, 50), seed=st.integers(0, 1000))
def test_antithetic_timesteps_come_in_pairs(batch: int, T: int, seed: int) -> None:
    t = uniform_sampler(T).draw(batch, generator(seed))
    assert (t.shape, t.dtype) == ((batch,), torch.int64)
    assert ((t >= 1) & (t <= T)).all()
    half = (batch + 1) // 2
    assert torch.equal(t[half:], T + 1 - t[: batch - half])


@pytest.mark.parametrize("antithetic", [True, False])
def test_timesteps_are_uniform_on_1_to_T(antithetic: bool) -> None:
    t = uniform_sampler(5).draw(20_000, generator(), antithetic)
    counts = torch.bincount(t, minlength=6)
    assert counts[0] == 0
    assert len(counts) == 6
    # 4000 each; five standard deviations, twice as wide for pairs.
    assert (counts[1:] - 4000).abs().max() < 5 * 2 * math.sqrt(20_000 * 0.2 * 0.8)


def test_independent_timesteps_are_not_paired() -> None:
    t = uniform_sampler(1000).draw(64, generator(), antithetic=False)
    assert not torch.equal(t[32:], 1001 - t[:32])


@given(batch=st.integers(1, 33), T=st.integers(1, 50), seed=st.integers(0, 1000))
def test_importance_sampling_with_equal_weights_pairs_like_uniform_sampling(batch: int, T: int, seed: int) -> None:
    """t(u) + t(1 - u) is T + 1, or T + 2 if u is on the boundary between two timesteps."""
    t = TimestepSampler(torch.ones(T), "importance").draw(batch, generator(seed))
    assert (t.shape, t.dtype) == ((batch,), torch.int64)
    assert ((t >= 1) & (t <= T)).all()
    half = (batch + 1) // 2
    sums = t[half:] + t[: batch - half]
    assert ((sums == T + 1) | (sums == T + 2)).all()


@pytest.mark.parametrize("antithetic", [True, False])
def test_importance_sampling_frequencies_are_proportional_to_the_weights(antithetic: bool) -> None:
    weights = torch.tensor([0.0, 3.0, 0.5, 0.0, 1.0, 4.0, 0.0])
    n = 40_000
    counts = torch.bincount(TimestepSampler(weights, "importance").draw(n, generator(), antithetic), minlength=8)[1:]
    expected = n * weights / weights.sum()
    assert (counts[weights == 0] == 0).all()
    assert ((counts - expected).abs() <= 5 * 2 * (expected * (1 - expected / n)).sqrt()).all()


def test_antithetic_pairs_respect_skewed_weights() -> None:
    """At most one of a pair can be among the first timesteps if their total weight is less than half."""
    weights = torch.tensor([1.0, 1.0, 1.0, 9.0])
    t = TimestepSampler(weights, "importance").draw(1000, generator())
    first = t <= 3
    assert not (first[:500] & first[500:]).any()
    assert first.any()


def test_uniform_and_importance_sampling_have_the_same_expected_loss_up_to_the_mean_weight() -> None:
    """E over uniform t of w(t) e(t) equals mean(w) times E over t ~ w of e(t): exact sum against samples."""
    uniform, importance = (
        Objective(linear(50, beta_end=0.3), "v", "sigmoid", drawn=method) for method in ("uniform", "importance")
    )
    errors = torch.rand(50, generator=generator(3))
    timesteps = torch.arange(1, 51)
    weights = uniform.times.weights
    exact = uniform.times.apply_weight(errors, timesteps).mean()
    t = importance.times.draw(200_000, generator(4))
    mean = importance.times.apply_weight(errors[t - 1], t).mean()
    np.testing.assert_allclose(float(mean * weights.mean()), float(exact), rtol=0.01)
    assert not math.isclose(float(errors.mean()), float(mean), rel_tol=0.02)  # the test could see a wrong distribution


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_every_modality_supports_importance_sampling(kind: str) -> None:
    loss = modality_of(tiny_config(kind)).loss("vlb", torch.device("cpu"), "importance")
    weights, n = loss.times.weights, 4000
    t = loss.times.draw(n, generator())
    heavy = weights > weights.median()
    share = float(weights[heavy].sum() / weights.sum())
    assert share > 0.6
    assert abs(float(heavy[t - 1].sum()) - n * share) < 5 * 2 * math.sqrt(n * share * (1 - share))
    assert torch.equal(loss.times.apply_weight(torch.ones(n), t), torch.ones(n))
