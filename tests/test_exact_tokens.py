from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.exact import IidTokens, MarkovTokens
from ddim.process.schedule import Level

INITIAL = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
TRANSITION = torch.tensor([[0.1, 0.6, 0.3], [0.7, 0.05, 0.25], [0.0, 0.4, 0.6]], dtype=torch.float64)
MASKED = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)  # the last kind of token is the mask: never in data
MASKED_MOVES = torch.tensor([[0.3, 0.7, 0.0], [0.9, 0.1, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
SOME_PI = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
MASK_PI = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

DATA: dict[str, Any] = {
    "iid": IidTokens(INITIAL),
    "iid, pi given": IidTokens(INITIAL, SOME_PI),
    "iid, mask": IidTokens(MASKED, MASK_PI),
    "iid, two kinds": IidTokens(torch.tensor([0.9, 0.1])),
    "markov": MarkovTokens(INITIAL, TRANSITION),
    "markov, pi given": MarkovTokens(INITIAL, TRANSITION, SOME_PI),
    "markov, mask": MarkovTokens(MASKED, MASKED_MOVES, MASK_PI),
}
every_data = pytest.mark.parametrize("data", DATA.values(), ids=DATA)
LEVELS = [Level(0, math.inf), Level(1, 3.0), Level(2, -1.0), Level(3, -math.inf)]


def kinds(data: Any) -> int:
    return len(data.pi)


def sequences(k: int, length: int) -> Tensor:
    """All of them: int64, (k^length, length)."""
    return torch.tensor(list(itertools.product(range(k), repeat=length)))


def chain(data: Any, x0: Tensor) -> float:
    """The probability of one clean sequence, token by token."""
    ids = x0.tolist()
    if isinstance(data, IidTokens):
        return math.prod(float(data.probabilities[i]) for i in ids)
    moves = math.prod(float(data.transition[i, j]) for i, j in itertools.pairwise(ids))
    return float(data.initial[ids[0]]) * moves


def enumerate_all(data: Any, level: Level, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every sequence, p(x_0) of each, and q(x_t | x_0) of each pair with x_t as the column."""
    every = sequences(kinds(data), length)
    prior = torch.tensor([chain(data, x0) for x0 in every], dtype=torch.float64)
    noising = torch.ones(len(every), len(every), dtype=torch.float64)
    for row, x0 in enumerate(every.tolist()):
        for column, xt in enumerate(every.tolist()):
            for clean, noised in zip(x0, xt, strict=True):
                unchanged = level.alpha_bar if clean == noised else 0.0
                noising[row, column] *= unchanged + (1 - level.alpha_bar) * float(data.pi[noised])
    return every, prior, noising


@every_data
@pytest.mark.parametrize("length", [1, 3])
def test_posterior_and_probabilities_equal_full_enumeration(data: Any, length: int) -> None:
    for level in LEVELS:
        every, prior, noising = enumerate_all(data, level, length)
        joint = prior[:, None] * noising
        evidence = joint.sum(0)
        torch.testing.assert_close(data.log_prob(every).exp(), prior, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(data.noised_log_prob(every, level).exp(), evidence, rtol=1e-12, atol=1e-15)
        assert evidence.sum().item() == pytest.approx(1, abs=1e-12)
        one_hot = torch.nn.functional.one_hot(every, kinds(data)).double()
        expected = torch.einsum("cx,clk->xlk", joint / evidence, one_hot)
        possible = evidence > 0
        got = data.predict(every[possible], level)
        torch.testing.assert_close(got, expected[possible], rtol=0, atol=1e-12)
        assert possible.any()
        if not possible.all():
            with pytest.raises(DdimError, match=r"^tokens x_t: "):
                data.predict(every[~possible][:1], level)


def test_a_longer_chain_by_enumeration() -> None:
    data = DATA["markov, pi given"]
    every, prior, noising = enumerate_all(data, LEVELS[2], 4)
    joint = prior[:, None] * noising
    one_hot = torch.nn.functional.one_hot(every, 3).double()
    expected = torch.einsum("cx,clk->xlk", joint / joint.sum(0), one_hot)
    torch.testing.assert_close(data.predict(every, LEVELS[2]), expected, rtol=0, atol=1e-12)


def test_a_chain_whose_rows_are_equal_is_iid() -> None:
    iid, markov = DATA["iid, pi given"], MarkovTokens(INITIAL, INITIAL.expand(3, 3), SOME_PI)
    x = sequences(3, 4)
    torch.testing.assert_close(markov.log_prob(x), iid.log_prob(x))
    for level in LEVELS:
        torch.testing.assert_close(markov.predict(x, level), iid.predict(x, level), rtol=0, atol=1e-13)
        torch.testing.assert_close(markov.noised_log_prob(x, level), iid.noised_log_prob(x, level))


@every_data
def test_long_sequences_do_not_underflow(data: Any) -> None:
    x = data.sample(3, 1200, seed=1)
    posterior = data.predict(x, LEVELS[1])
    torch.testing.assert_close(posterior.sum(-1), torch.ones(3, 1200, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(data.noised_log_prob(x, LEVELS[0]), data.log_prob(x), rtol=1e-12, atol=0)
    assert data.log_prob(x).max() < -300


def test_without_signal_only_the_mask_itself_is_possible() -> None:
    data = DATA["markov, mask"]
    x = torch.full((1, 3), 2)
    prior = torch.stack([MASKED, MASKED @ MASKED_MOVES, MASKED @ MASKED_MOVES @ MASKED_MOVES])
    torch.testing.assert_close(data.predict(x, LEVELS[3])[0], prior)
    assert data.noised_log_prob(x, LEVELS[3]).item() == pytest.approx(0, abs=1e-12)


@every_data
def test_samples_have_the_frequencies_of_the_data(data: Any) -> None:
    n, k = 12_000, kinds(data)
    drawn = data.sample(n, 3, seed=2)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (n, 3)
    every = sequences(k, 3)
    probability = torch.tensor([chain(data, x0) for x0 in every], dtype=torch.float64)
    place = (drawn * torch.tensor([k * k, k, 1])).sum(1)
    frequency = torch.bincount(place, minlength=k**3).double() / n
    assert ((frequency - probability).abs() <= 5 * (probability * (1 - probability) / n).sqrt()).all()
    assert torch.equal(data.sample(5, 3, seed=2), drawn[:5])
    assert not torch.equal(data.sample(50, 3, seed=3), drawn[:50])


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: IidTokens(torch.tensor([0.5, 0.6])), r"^probabilities: "),
        (lambda: IidTokens(torch.tensor([1.5, -0.5])), r"^probabilities: "),
        (lambda: IidTokens(torch.tensor([[0.5, 0.5]])), r"^probabilities of shape \(1, 2\): "),
        (lambda: IidTokens(INITIAL, torch.tensor([0.5, 0.5])), r"^pi of shape \(2,\): "),
        (lambda: IidTokens(INITIAL, torch.tensor([0.5, 0.5, math.nan])), r"^pi: "),
        (lambda: MarkovTokens(INITIAL, TRANSITION[:2]), r"^transition of shape \(2, 3\): .*\bK = 3\b"),
        (lambda: MarkovTokens(INITIAL, TRANSITION.T), r"^transition row 0: "),
        (lambda: MarkovTokens(INITIAL, TRANSITION, INITIAL[:2]), "pi of shape"),
        (lambda: DATA["iid"].log_prob(torch.tensor([[0, 3]])), r"^tokens 0\.\.3: .*\b0\.\.2\b"),
        (lambda: DATA["markov"].predict(torch.tensor([[-1, 1]]), LEVELS[1]), r"^tokens -1\.\.1: "),
        (lambda: DATA["markov"].log_prob(torch.tensor([0, 1])), r"^tokens of shape \(2,\) and torch\.int64: "),
        (lambda: DATA["iid"].predict(torch.zeros(1, 2), LEVELS[1]), r"^tokens of shape \(1, 2\) and torch\.float32: "),
        (
            lambda: DATA["iid"].noised_log_prob(torch.zeros(1, 0, dtype=torch.int64), LEVELS[1]),
            r"^tokens of shape \(1, 0\) and torch\.int64: ",
        ),
    ],
)
def test_invalid_data_is_an_error(make: Callable[[], Any], wrong: str) -> None:
    with pytest.raises(DdimError, match=wrong):
        make()
