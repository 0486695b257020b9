"""Random numbers drawn on a GPU match numpy's: on a GPU if there is one, else in triton's interpreter.

Triton decides when it is imported whether it compiles or interprets, so without a GPU the tests run in a process of
their own, which `test_in_triton_s_interpreter` starts.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ddim.errors import DdimWarning
from ddim.process import device_noise, rng
from ddim.process.rng import Noise, TokenNoise
from scripted import Scripted

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = device_noise.available()
HALF = 2**22  # of the 23-bit integers of the ziggurat
with_triton = pytest.mark.skipif(not (TRITON and (CUDA or INTERPRETED)), reason="needs triton and a GPU")
with_gpu = pytest.mark.skipif(not (TRITON and CUDA), reason="needs triton and a GPU")
KEYS = [(0, 0), (1, 2**32), (2**32 + 1, 1), (2**63, 2**63 + 5), (2**64 - 1, 2**64 - 1)]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if CUDA and not INTERPRETED else "cpu")


@pytest.mark.skipif(CUDA or INTERPRETED or not TRITON, reason="needs triton, and no GPU")
def test_in_triton_s_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def first(accepted: Callable[[int], bool], below: int) -> int:
    """The first integer that is not accepted, if all before it are; `below` if all are."""
    low, high = 0, below
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if accepted(middle) else (low, middle)
    return low


def test_every_entry_of_the_first_two_tables_matches_numpy() -> None:
    """ki: where numpy stops to accept at once. wi: an accepted power of two times it."""
    ki, wi, _ = device_noise.ziggurat()
    numpy = Scripted()
    for box in range(256):
        assert first(lambda m, box=box: numpy.normal(box | m << 9)[1] == 1, 2**23) == ki[box]
        x, _ = numpy.normal(box | HALF << 9, 0)
        assert x == np.float32(HALF) * wi[box]
        assert numpy.normal(box | 1 << 8 | HALF << 9, 0)[0] == -x


def test_every_entry_of_the_density_matches_numpy() -> None:
    """The uniform number at which the wedge test fails determines the last bit of either edge's density."""
    ki, wi, fi = device_noise.ziggurat()
    numpy = Scripted()

    def fails(density: np.ndarray, box: int, integer: int) -> int:
        x = float(np.float32(integer) * wi[box])
        limit = np.exp(-0.5 * x * x)

        def accepted(u: int) -> bool:
            return float((density[box - 1] - density[box]) * np.float32(u / 2**24) + density[box]) < limit

        return first(accepted, 2**24)

    for box in range(1, 256):
        integers = [int(ki[box]) + share * (2**23 - 1 - int(ki[box])) // 3 for share in range(4)]
        edges = [first(lambda u, w=box | m << 9: numpy.normal(w, u << 8)[1] == 2, 2**24) for m in integers]
        assert edges == [fails(fi, box, m) for m in integers]
        for changed, towards in itertools.product((box - 1, box), (0, 2)):
            other = fi.copy()
            other[changed] = np.nextafter(fi[changed], np.float32(towards))
            assert edges != [fails(other, box, m) for m in integers]


def test_the_tail_matches_numpy() -> None:
    numpy = Scripted()
    for sign, u in itertools.product((0, 1), (0, 1, 2**12, 2**22, 2**23)):
        far = np.float32(-0.27366123732975828) * np.log1p(np.float32(-u / 2**24))
        x, words = numpy.normal((2**23 - 1 - 256 * (1 - sign)) << 9, u << 8, 0xFFFFFF << 8)
        assert words == 3
        expected = np.float32(device_noise.TAIL_START) + far
        assert abs(abs(x) - expected) <= np.spacing(expected)
        assert (x < 0) == bool(sign)


def both(
    seed: int, indices: tuple[int, ...], draw: int, count: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    got = device_noise.normal(device_noise.stream_keys(seed, indices, device), draw, (count,))
    assert (got.dtype, got.device.type) == (torch.float32, device.type)
    return got.cpu().numpy(), np.stack([rng.normal(seed, index, draw, (count,)) for index in indices])


def compare(got: np.ndarray, expected: np.ndarray) -> None:
    tail = np.abs(expected) >= np.float32(device_noise.TAIL_START)
    assert np.array_equal(got[~tail], expected[~tail])
    assert np.abs(got[tail].view(np.int32) - expected[tail].view(np.int32)).max(initial=0) <= 1


@with_triton
@pytest.mark.parametrize(("seed", "index"), KEYS)
def test_normal_numbers_of_every_key_match_numpy(seed: int, index: int, device: torch.device) -> None:
    for draw in (0, 3, 2**40):
        compare(*both(seed, (index, 7), draw, 300, device))


@with_triton
@pytest.mark.parametrize("count", [1, 2, 1009, 1024, 3072])
def test_normal_numbers_of_every_count_match_numpy(count: int, device: torch.device) -> None:
    """Within a pass, at the end of one, and over several."""
    compare(*both(11, (0, 1), 1, count, device))


@with_triton
def test_many_normal_numbers_match_numpy(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for tails whose first pair is rejected; on a GPU 25 million, in the interpreter in long passes."""
    if device.type == "cpu":
        monkeypatch.setattr(device_noise, "_BLOCKS", 16384)
        compare(*both(2, (0, 1), 1, 250_000, device))
    else:
        for draw in range(16):
            compare(*both(2, tuple(range(512)), draw, 3072, device))


@with_triton
@pytest.mark.parametrize(("seed", "index"), KEYS)
def test_uniform_numbers_match_numpy(seed: int, index: int, device: torch.device) -> None:
    for draw, count in ((0, 1), (1, 515), (2**40, 1030)):
        got = device_noise.uniform(device_noise.stream_keys(seed, (7, index), device), draw, (count,))
        philox = np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, draw], np.uint64))
        assert np.array_equal(got[1].cpu().numpy(), np.random.Generator(philox).random(count))


@with_triton
def test_no_samples_and_no_numbers(device: torch.device) -> None:
    assert device_noise.normal(device_noise.stream_keys(0, (), device), 0, (3,)).shape == (0, 3)
    assert device_noise.uniform(device_noise.stream_keys(0, (1,), device), 0, (0, 3)).shape == (1, 0, 3)


@with_triton
def test_the_draw_may_be_a_tensor(device: torch.device) -> None:
    keys = device_noise.stream_keys(4, (1, 2), device)
    number = torch.tensor([5], device=device)
    assert torch.equal(device_noise.normal(keys, number, (2, 9)), device_noise.normal(keys, 5, (2, 9)))
    assert torch.equal(device_noise.uniform(keys, number, (2, 9)), device_noise.uniform(keys, 5, (2, 9)))


@with_triton
def test_noise_draws_through_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    host, tokens = Noise(5, (2, 9), (3, 4, 4)), TokenNoise(5, (2, 9), (40,), pi=torch.ones(3).double())
    expected = host.row(2), tokens.row(2), tokens.start()
    monkeypatch.setattr(rng, "_draws_on", lambda _: True)
    there = Noise(5, (2, 9), (3, 4, 4), device), TokenNoise(5, (2, 9), (40,), device, torch.ones(3).double())
    drawn = there[0].row(2), there[1].row(2), there[1].start()
    for got, reference in zip(drawn, expected, strict=True):
        assert got.device.type == device.type
        assert torch.equal(got.cpu(), reference)


@with_gpu
def test_a_gpu_draws_without_synchronisation() -> None:
    noise = Noise(5, tuple(range(9)), (3, 8, 8), "cuda")
    assert rng._draws_on(torch.device("cuda"))
    noise.row(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = noise.row(1), Noise(6, (1,), (3, 8, 8), "cuda").row(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compare(got[0].cpu().numpy(), Noise(5, tuple(range(9)), (3, 8, 8)).row(1).numpy())
    compare(got[1].cpu().numpy(), Noise(6, (1,), (3, 8, 8)).row(1).numpy())


@with_gpu
def test_a_captured_graph_draws_from_its_current_key_tensors() -> None:
    device = torch.device("cuda")
    keys, number = device_noise.stream_keys(4, (1, 2), device), torch.zeros(1, dtype=torch.int64, device=device)
    device_noise.normal(keys, number, (50,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = device_noise.normal(keys, number, (50,))
    for draw in (0, 7):
        number.fill_(draw)
        graph.replay()
        compare(out.cpu().numpy(), both(4, (1, 2), draw, 50, device)[1])


def test_without_a_gpu_the_host_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_noise, "normal", None)
    assert not rng._draws_on(torch.device("cpu"))
    assert torch.equal(Noise(0, (3,), (4,)).row(0)[0], torch.from_numpy(rng.normal(0, 3, 1, (4,))))


def fails(*_: object) -> torch.Tensor:
    raise RuntimeError("no compiler\nand more")


@pytest.mark.parametrize("normal", [fails, lambda keys, draw, shape: torch.zeros(1, *shape)], ids=["fails", "wrong"])
def test_the_host_draws_with_a_warning_if_triton_fails(
    normal: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_noise, "available", lambda: True)
    monkeypatch.setattr(device_noise, "stream_keys", lambda *_: torch.zeros(1, 2))
    monkeypatch.setattr(device_noise, "normal", normal)
    with pytest.warns(DdimWarning):
        assert not rng._draws_on.__wrapped__(torch.device("cuda"))
