from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from ddim.errors import DdimError
from ddim.process import rng
from ddim.process.rng import Noise, TokenNoise

SHAPE = (1, 4, 4)
MAKERS: dict[str, Callable[..., Noise]] = {
    "normal": Noise,
    "tokens": partial(TokenNoise, pi=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)),
}
every_noise = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_noise
@pytest.mark.parametrize("draw", ["start", "row 0", "row 9"])
def test_a_sample_does_not_depend_on_its_batch(draw: str, make: Callable[..., Noise]) -> None:
    def draw_noise(indices: tuple[int, ...]) -> torch.Tensor:
        noise = make(seed=3, indices=indices, shape=SHAPE)
        return noise.start() if draw == "start" else noise.row(int(draw.split()[1]))

    order = tuple(np.random.default_rng(0).permutation(64).tolist())
    together = draw_noise(tuple(range(64)))
    if make is Noise:
        assert (together.shape, together.dtype) == ((64, *SHAPE), torch.float32)
    elif draw == "start":
        assert (together.shape, together.dtype) == ((64, *SHAPE), torch.int64)
    else:
        assert (together.shape, together.dtype) == ((64, *SHAPE, 3), torch.float64)
    assert len({sample.numpy().tobytes() for sample in together}) == 64
    assert torch.equal(torch.cat([draw_noise((i,)) for i in range(64)]), together)
    assert torch.equal(torch.cat([draw_noise(tuple(range(i, min(i + 7, 64)))) for i in range(0, 64, 7)]), together)
    assert torch.equal(draw_noise(order), together[list(order)])


def test_noise_equals_the_normal_function() -> None:
    noise = Noise(5, (2, 9), SHAPE)
    for position, index in enumerate((2, 9)):
        assert np.array_equal(noise.start()[position].numpy(), rng.normal(5, index, 0, SHAPE))
        assert np.array_equal(noise.row(4)[position].numpy(), rng.normal(5, index, 5, SHAPE))


def test_token_noise_uses_uniform_numbers_of_the_same_streams() -> None:
    """Three per token; x_T is drawn from pi with the first."""
    noise = MAKERS["tokens"](5, (2, 9), SHAPE)
    for draw, values in ((0, noise.start()), (5, noise.row(4))):
        for position, index in enumerate((2, 9)):
            philox = np.random.Philox(key=np.array([5, index], np.uint64), counter=np.array([0, 0, 0, draw], np.uint64))
            expected = np.random.Generator(philox).random((*SHAPE, 3))
            if draw:
                assert np.array_equal(values[position].numpy(), expected)
            else:
                assert np.array_equal(
                    values[position].numpy(), np.searchsorted([0.2, 0.7], expected[..., 0], side="right")
                )


@every_noise
def test_draws_of_a_sample_are_different(make: Callable[..., Noise]) -> None:
    noise = make(0, (3,), SHAPE)
    rows = [noise.row(k) for k in range(4)]
    assert len({row.numpy().tobytes() for row in rows}) == 4
    with pytest.raises(ValueError, match=r"\b0\b"):
        noise.row(-1)


def test_every_key_has_different_numbers() -> None:
    values = [0, 1, 2, 2**32, 2**32 + 1, 2**63, 2**64 - 2]
    keys = list(itertools.product(values, values, [0, 1, 2, 1000]))
    draws = {rng.normal(*key, (4,)).tobytes() for key in keys}
    assert len(draws) == len(keys)


def test_seeds_that_agree_in_their_low_32_bits_differ() -> None:
    near, far = 7, 7 + 2**32
    assert not np.array_equal(rng.normal(near, 0, 0, (8,)), rng.normal(far, 0, 0, (8,)))


def test_torch_generators_are_not_sufficient() -> None:
    """On a CPU torch uses only 32 bits of a seed, and a draw depends on the requested shape."""

    def draw(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(7, 8), draw(7 + 2**32, 8))
    assert not torch.equal(draw(7, 7), draw(7, 64)[:7])


@every_noise
def test_global_generators_are_not_used(make: Callable[..., Noise]) -> None:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    noise = make(0, (0, 1), SHAPE)
    noise.start(), noise.row(3)
    rng.permutation(0, 0, 10), rng.generator("cpu", 1, 2)
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert repr(before[1:]) == repr(after[1:])


def test_the_stream_is_philox_with_this_layout() -> None:
    """Key (seed, index), the draw in the counter's top word; and numpy's normal numbers have this golden hash.

    The hash was computed with numpy 2.4. If it fails and the first assertion holds, numpy has changed its stream:
    all published samples change with it, and the release notes must say so.
    """
    philox = np.random.Philox(key=np.array([7, 3], np.uint64), counter=np.array([0, 0, 0, 2], np.uint64))
    drawn = rng.normal(7, 3, 2, (1000,))
    assert np.array_equal(drawn, np.random.Generator(philox).standard_normal(1000, dtype=np.float32))
    golden = "7d934d1845ee53ca8fc1f4bebd28d07c08bc19ce9503c7cf06590ae8a20cab22"
    assert hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest() == golden


def test_numbers_are_normal_and_uniform_within_and_across_streams() -> None:
    """Kolmogorov-Smirnov at fixed keys: within one stream, and the first number of 4096 streams of each kind."""
    normal = {
        "within": rng.normal(1, 0, 0, (4096,)),
        "indices": np.array([rng.normal(1, i, 0, (1,))[0] for i in range(4096)]),
        "seeds": np.array([rng.normal(s, 0, 0, (1,))[0] for s in range(4096)]),
        "draws": np.array([rng.normal(1, 0, k, (1,))[0] for k in range(4096)]),
    }
    for name, numbers in normal.items():
        assert stats.kstest(numbers, "norm").pvalue > 1e-3, name
    for first, second in itertools.combinations(normal.values(), 2):
        assert abs(np.corrcoef(first[1:], second[1:])[0, 1]) < 5 / np.sqrt(4096)


def test_permutations_are_permutations_and_differ() -> None:
    orders = [rng.permutation(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(100))
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(orders[0], rng.permutation(0, 0, 100))


def test_training_generators_are_functions_of_their_whole_key() -> None:
    keys = [(0,), (1,), (0, 1), (1, 0), (2**32,), (2**64,), (12, 3), (1, 23)]
    draws = [torch.randn(4, generator=rng.generator("cpu", *key)) for key in keys]
    assert len({draw.numpy().tobytes() for draw in draws}) == len(keys)
    assert torch.equal(draws[2], torch.randn(4, generator=rng.generator("cpu", 0, 1)))


@every_noise
def test_the_length_of_a_noise_is_its_batch_size(make: Callable[..., Noise]) -> None:
    assert len(make(0, (4, 5), SHAPE)) == 2
    assert make(0, (), SHAPE).start().shape == (0, *SHAPE)


@every_noise
@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_keys_out_of_range_are_errors(seed: int, index: int, make: Callable[..., Noise]) -> None:
    with pytest.raises(DdimError):
        make(seed, (index,), SHAPE)
