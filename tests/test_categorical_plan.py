"""Plans over discrete data: their rows are the kernels of Appendix A and sample from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import SCHEDULES, randn
from ddim import samplers
from ddim.errors import DdimError
from ddim.plan.categorical import CategoricalPlan, CategoricalRow
from ddim.plan.plan import Plan
from ddim.process.categorical import (
    Alphabet,
    markov_posterior,
    markov_weights,
    mixture_weights,
    posterior,
    sharpen,
    sigma_largest,
)
from ddim.process.parameterization import TokenPrediction
from ddim.process.rng import TokenNoise, sample_categorical
from ddim.process.schedule import Level, from_betas, zero_terminal_snr
from ddim.sampling.loop import trajectory

SHORT = from_betas([0.1, 0.25, 0.3, 0.4, 0.6, 1.0], "short")
LEVELS = SHORT.levels([6, 5, 2, 1, 0])
CUSTOM = Alphabet(torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64))
ALPHABETS = {"uniform": Alphabet.uniform(4), "mask": Alphabet.masked(3), "custom": CUSTOM}
every_alphabet = pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS)
SAMPLERS: dict[str, Callable[..., CategoricalPlan]] = {
    "eta 0": samplers.discrete,
    "eta 0.3": lambda levels, alphabet: samplers.discrete(levels, alphabet, 0.3),
    "eta 1": lambda levels, alphabet: samplers.discrete(levels, alphabet, 1),
    "markov": samplers.discrete_markov,
}
every_kernel = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


def predictions(size: int, mask: int | None, seed: int = 0) -> Tensor:
    """p(x_0 | x_t) for each x_t: (K, K); no x_0 is a mask."""
    logits = 2 * randn(size, size, seed=seed)
    if mask is not None:
        logits[:, mask] = -math.inf
    return logits.softmax(-1)


@every_alphabet
@every_kernel
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_samples_of_a_row_have_the_distribution_of_its_kernel(k: int, make: Any, alphabet: Alphabet) -> None:
    """For each x_t, the frequencies over 2^14 Sobol points of the three uniform numbers are the probabilities."""
    plan = make(LEVELS, alphabet)
    row, K = plan.rows[k], alphabet.size
    predicted = predictions(K, alphabet.mask)
    fresh = torch.quasirandom.SobolEngine(3).draw(2**14, dtype=torch.float64)
    for x_t in range(K):
        x = torch.full((len(fresh),), x_t)
        prediction = TokenPrediction(predicted[x])
        drawn = plan.advance(row, [x], [prediction], fresh)
        shares = torch.bincount(drawn, minlength=K) / len(fresh)
        here, probs = torch.tensor(x_t), predicted[x_t]
        if plan.kernel == "markov":
            expected = markov_posterior(here, probs, row.now, row.next, alphabet.pi)
        else:
            expected = posterior(here, probs, row.now, row.next, row.keep, alphabet.pi)
        assert (shares - expected).abs().max() < 2e-3, (x_t, shares, expected)
        assert (shares[expected == 0] == 0).all()


@st.composite
def falling_steps(draw: st.DrawFn) -> tuple[Level, Level, Tensor]:
    schedule = draw(st.sampled_from([SHORT, SCHEDULES["linear"], SCHEDULES["cosine"]]))
    s = draw(st.integers(0, schedule.T - 1))
    t = draw(st.integers(s + 1, schedule.T))
    pi = torch.softmax(2 * randn(draw(st.integers(2, 5)), seed=draw(st.integers(0, 99))), -1)
    return schedule.level(t), schedule.level(s), pi


@given(falling_steps())
def test_the_markov_kernel_is_the_reversal_of_the_chain(step: tuple[Level, Level, Tensor]) -> None:
    """By Bayes' rule on the chain that keeps a token with probability abar_t / abar_s, else redraws it from pi."""
    now, following, pi = step
    K, keep = len(pi), now.alpha_bar / following.alpha_bar
    eye = torch.eye(K, dtype=torch.float64)
    forward = keep * eye + (1 - keep) * pi  # x_s, x_t
    before = following.alpha_bar * eye + following.variance * pi  # x_0, x_s
    joint = before[:, None, :] * forward.T[None]  # x_0, x_t, x_s
    bayes = joint / joint.sum(-1, keepdim=True)
    x0, x_t = torch.arange(K)[:, None].expand(K, K), torch.arange(K)[None].expand(K, K)
    actual = markov_posterior(x_t.flatten(), eye[x0.flatten()], now, following, pi).view(K, K, K)
    torch.testing.assert_close(actual, bayes, rtol=1e-9, atol=1e-12)
    # Averaged over the true q(x_0 | x_t) it takes q(x_t) to q(x_s).
    p0 = torch.softmax(randn(K, seed=3), 0)
    q_t = p0 @ (now.alpha_bar * eye + now.variance * pi)
    back = (p0[:, None] * (now.alpha_bar * eye + now.variance * pi) / q_t).T  # x_t, x_0
    moved = markov_posterior(torch.arange(K), back, now, following, pi)
    torch.testing.assert_close(q_t @ moved, p0 @ before, rtol=0, atol=1e-12)


@given(falling_steps())
def test_with_a_mask_the_markov_kernel_is_the_least_random_one(step: tuple[Level, Level, Tensor]) -> None:
    now, following, _ = step
    alphabet = Alphabet.masked(3)
    predicted = predictions(4, 3, seed=1)
    for x_t in range(4):
        if x_t < 3:  # a token that is not masked is x_0
            predicted[x_t] = torch.nn.functional.one_hot(torch.tensor(x_t), 4).double()
        here = torch.tensor(x_t)
        largest = sigma_largest(now, following)
        least = posterior(here, predicted[x_t], now, following, largest, alphabet.pi)
        chain = markov_posterior(here, predicted[x_t], now, following, alphabet.pi)
        torch.testing.assert_close(least, chain, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sigma_r", [0.0, 0.1, 0.25])
def test_a_mask_with_a_smaller_sigma_is_the_remasking_of_remdm(sigma_r: float) -> None:
    """Wang et al. (2025), eq. (4): an uncovered token is masked again with probability sigma_R; a mask becomes x_0 with
    (abar_s - (1 - sigma_R) abar_t) / (1 - abar_t)."""
    now, following = SHORT.level(4), SHORT.level(2)
    a_t, a_s, mask = now.alpha_bar, following.alpha_bar, 3
    sigma = ((1 - a_s) - sigma_r) / (1 - a_t)
    kernel = {
        x_t: posterior(torch.tensor(x_t), torch.tensor(1), now, following, sigma, Alphabet.masked(3).pi)
        for x_t in (1, mask)
    }
    uncovered = torch.tensor([0, 1 - sigma_r, 0, sigma_r], dtype=torch.float64)
    to_x0 = (a_s - (1 - sigma_r) * a_t) / (1 - a_t)
    masked = torch.tensor([0, to_x0, 0, 1 - to_x0], dtype=torch.float64)
    torch.testing.assert_close(kernel[1], uncovered, rtol=0, atol=1e-14)
    torch.testing.assert_close(kernel[mask], masked, rtol=0, atol=1e-14)


@every_alphabet
def test_eta_scales_between_the_least_and_the_most_random_kernel(alphabet: Alphabet) -> None:
    for eta in (0.0, 0.25, 1.0):
        plan = samplers.discrete(LEVELS, alphabet, eta)
        for row in plan.rows:
            assert row.keep == pytest.approx((1 - eta) * sigma_largest(row.now, row.next), abs=1e-16)
            assert (row.keep, row.to_x0, row.fresh) == mixture_weights(row.now, row.next, row.keep)
            assert row.keep * row.now.alpha_bar + row.to_x0 == pytest.approx(row.next.alpha_bar, abs=1e-14)
    assert all(row.fresh == pytest.approx(0, abs=1e-15) for row in samplers.discrete(LEVELS, alphabet, 0).rows)
    assert all(row.keep == 0 for row in samplers.discrete(LEVELS, alphabet, 1).rows)
    assert all(
        (row.keep, row.to_x0, row.fresh) == markov_weights(row.now, row.next)
        for row in samplers.discrete_markov(LEVELS, alphabet).rows
    )


def test_the_network_gets_the_printed_levels_and_its_prediction_is_sharpened() -> None:
    plan = samplers.discrete(LEVELS, CUSTOM, 0.3, temperature=0.5, top_p=0.8)
    seen: list[tuple[Tensor, Level]] = []

    def denoise(x: Tensor, level: Level, /) -> TokenPrediction:
        seen.append((x, level))
        return TokenPrediction(predictions(4, None)[x])

    noise = TokenNoise(3, (0, 1), (5,), "cpu", CUSTOM.pi)
    steps = list(trajectory(denoise, plan, noise))
    assert [level for _, level in seen] == [row.now for row in plan.rows]
    for step, (x, _) in zip(steps, seen, strict=True):
        expected = sharpen(predictions(4, None)[x], 0.5, 0.8)
        assert torch.equal(step.x0, expected)
        assert (expected == 0).any()
    assert torch.equal(seen[0][0], noise.start())
    assert all(torch.equal(x, step.x) for step, (x, _) in zip(steps, seen[1:], strict=False))


@given(st.floats(0.05, 5), st.floats(0.01, 1), st.integers(0, 99))
def test_sharpen_is_temperature_and_then_top_p(temperature: float, top_p: float, seed: int) -> None:
    """Powers of p, then the fewest most likely categories whose cumulative probability reaches top-p; order is kept."""
    p = torch.softmax(3 * randn(6, seed=seed), 0)
    actual = sharpen(p, temperature, top_p)
    assert float(actual.sum()) == pytest.approx(1, abs=1e-12)
    tempered = p.double().pow(1 / temperature) / p.double().pow(1 / temperature).sum()
    torch.testing.assert_close(sharpen(p, temperature), tempered, rtol=1e-9, atol=1e-12)
    order = tempered.argsort(descending=True)
    count = int((tempered[order].cumsum(0) < top_p * (1 - 1e-12)).sum()) + 1
    keep = order[: min(count, 6)]
    assert {*actual.nonzero()[:, 0].tolist()} == {*keep[tempered[keep] > 0].tolist()}
    torch.testing.assert_close(actual[keep], tempered[keep] / tempered[keep].sum(), rtol=1e-9, atol=1e-12)
    assert torch.equal(sharpen(p, 1.0, 1.0), p)


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_sample_categorical_inverts_the_distribution_function(shape: tuple[int, ...]) -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.1, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64).expand(shape)
    expected = torch.tensor([1, 1, 1, 3, 3, 4, 4]).expand(shape)
    assert torch.equal(sample_categorical(u, p), expected)
    assert torch.equal(sample_categorical(u, p.expand(*shape, 6)), expected)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)  # its sum rounds
    assert sample_categorical(torch.tensor(1 - 2**-53, dtype=torch.float64), third) == 2


PLAN = samplers.discrete(LEVELS, CUSTOM, 0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": 0.1},
        {"to_x0": 0.2},
        {"fresh": 0.0},
        {"keep": -0.1},
        {"keep": math.nan},
        {"next": SHORT.level(6)},
        {"now": SHORT.level(4)},
    ],
)
@pytest.mark.parametrize("kernel", ["ddim", "markov"])
def test_check_finds_planted_errors(changes: dict[str, Any], kernel: str) -> None:
    plan = PLAN if kernel == "ddim" else samplers.discrete_markov(LEVELS, CUSTOM)
    rows = list(plan.rows)
    rows[1] = replace(rows[1], **changes)
    with pytest.raises(DdimError, match=r"^plan row 1 \(t ="):
        replace(plan, rows=tuple(rows)).check()


def test_check_finds_rows_of_another_kernel() -> None:
    with pytest.raises(DdimError, match=r"^plan row 1 \(t = 5 to 2\): "):
        replace(samplers.discrete_markov(LEVELS, CUSTOM), kernel="ddim").check()
    with pytest.raises(DdimError, match=r"^plan row 0 \(t = 6 to 5\): "):
        replace(PLAN, kernel="markov").check()


@every_alphabet
@every_kernel
def test_json_and_printed_table(make: Any, alphabet: Alphabet) -> None:
    plan = replace(make(LEVELS, alphabet), temperature=0.7, made_for="abc")
    again = CategoricalPlan.from_json(plan.to_json())
    assert again == plan
    with pytest.raises(DdimError, match=r"^plan: "):
        Plan.from_json(plan.to_json())
    lines = str(plan).splitlines()
    assert lines[0] == f"{plan.name}: 4 network evaluations"
    assert f"{alphabet.size} categories" in lines[1]
    rows = lines[-len(plan) :]
    columns = [name for name in ("keep", "to_x0", "fresh") if any(getattr(row, name) for row in plan.rows)]
    assert lines[-len(plan) - 1].split() == ["from", "to", "alpha_bar", "alpha_bar", "next", *columns]
    for line, row in zip(rows, plan.rows, strict=True):
        weights = [float(cell.replace(".", "0", cell == ".")) for cell in line.split()[-len(columns) :]]
        assert weights == pytest.approx([getattr(row, name) for name in columns], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": -0.1}, r"^eta -0\.1: .*\b0\.\.1\b"),
        ({"eta": 1.1}, r"^eta 1\.1: .*\b0\.\.1\b"),
        ({"eta": math.nan}, r"^eta nan: .*\b0\.\.1\b"),
        ({"temperature": 0}, r"^temperature 0: "),
        ({"temperature": math.inf}, r"^temperature inf: "),
        ({"top_p": 0}, r"^top-p 0: "),
        ({"top_p": 1.5}, r"^top-p 1\.5: "),
        ({"levels": LEVELS[::-1]}, r"^level t = 1: "),
        ({"levels": LEVELS[:1]}, r"^levels: "),
    ],
)
def test_invalid_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DdimError, match=message):
        samplers.discrete(**{"levels": LEVELS, "alphabet": CUSTOM, **settings})


@pytest.mark.parametrize(
    "create",
    [
        lambda: Alphabet(torch.tensor([0.5, 0.6], dtype=torch.float64)),
        lambda: Alphabet(torch.tensor([1.5, -0.5], dtype=torch.float64)),
        lambda: Alphabet(Alphabet.uniform(3).pi, mask=2),
        lambda: Alphabet(Alphabet.uniform(3).pi, carry_over=True),
    ],
)
def test_an_invalid_alphabet_is_an_error(create: Callable[[], Alphabet]) -> None:
    with pytest.raises(ValueError):
        create()


def test_properties_of_a_row() -> None:
    row = CategoricalRow(SHORT.level(3), SHORT.level(2), at=SHORT.level(4))
    assert (row.query.t, row.memory, row.draws) == (4, 1, True)
    assert zero_terminal_snr(SCHEDULES["cosine"]).level(1000).alpha_bar == 0
