"""One random stream per sample: sample i depends only on (seed, i), never on the batch or a global generator.

The streams are numpy's counter-based Philox 4x64, keyed by (seed, index); the top word of the counter is the draw
number: 0 for x_T, k + 1 for the noise of plan row k. `torch.Generator` is unsuitable: on a CPU it uses only 32 bits of
its seed, and its numbers depend on the requested shape. `Noise.torch` draws from it, for the same images as diffusers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError, warn
from ddim.process import device_noise

_WORD = 2**64
Device = torch.device | str


def normal(seed: int, index: int, draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """The standard normal numbers of one draw for one sample.

    Args:
        seed: The run's seed, 0 <= seed < 2^64.
        index: The sample's index in the run, 0 <= index < 2^64.
        draw: 0 for x_T, k + 1 for plan row k.
        shape: Shape of one sample, for example (C, H, W).

    Returns:
        float32, `shape`.
    """
    return _stream(seed, index, draw).standard_normal(shape, dtype=np.float32)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n training samples in epoch `epoch`: a permutation, int64, (n,)."""
    return _stream(seed, epoch, _WORD - 1).permutation(n)


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A torch generator on a device, seeded by a hash of integers.

    For training, where a step draws for the whole batch at once. On a CPU torch uses only 32 bits of the seed.
    """
    seeded = torch.Generator(device=device)
    seeded.manual_seed(hash_seed(*key))
    return seeded


def hash_seed(*key: int) -> int:
    """A hash of integers as a seed in 0..2^63-1."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def sample_categorical(u: Tensor, probabilities: Tensor) -> Tensor:
    """Categories sampled by inverting the distribution function at u; exact up to rounding of the cumulative sums.

    Args:
        u: In [0, 1), (...).
        probabilities: (K,), or (..., K) with one distribution per u; normalised if they do not sum to 1.

    Returns:
        int64, (...); never a category of probability 0.
    """
    edges = probabilities.double().cumsum(-1)
    at = u.double()[..., None] * edges[..., -1:]
    if probabilities.ndim == 1:
        ids = torch.searchsorted(edges, at.squeeze(-1).contiguous(), right=True)
    else:
        ids = torch.searchsorted(edges, at.contiguous(), right=True).squeeze(-1)
    # u near 1 times the sum can round to the sum itself: clamp to the last category of nonzero probability.
    return torch.minimum(ids, (edges < edges[..., -1:]).sum(-1))


@contextlib.contextmanager
def temporary_seed(device: torch.device | str, seed: int) -> Iterator[None]:
    """Seed the global generator of one device, and restore its state on exit.

    For operations without a generator argument: dropout, and the initialisation of a network.
    """
    at = torch.device(device)
    cuda = at.type == "cuda"
    with torch.random.fork_rng([at] if cuda else []):
        # torch.manual_seed would seed every device, but fork_rng restores only this one.
        if cuda:
            torch.cuda.default_generators[at.index or torch.cuda.current_device()].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Noise:
    """The random numbers of a batch of samples, generated on request.

    Args:
        seed: The run's seed.
        indices: The samples' indices in the run, (N,).
        shape: Shape of one sample, for example (C, H, W).
        device: Device of the returned tensors; the numbers do not depend on it. On a GPU with triton installed they are
            generated there; `ddim.process.device_noise` documents how exactly they agree with the host's.
    """

    seed: int
    indices: tuple[int, ...]
    shape: tuple[int, ...]
    device: Device = "cpu"

    @staticmethod
    def torch(seed: int) -> TorchSeed:
        """The noise of diffusers' pipelines with `generator=torch.Generator().manual_seed(seed)`, see `TorchSeed`."""
        return TorchSeed(seed)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < _WORD:
            raise DdimError(f"seed {self.seed}", "is not an integer in 0..2^64-1", "choose another seed")
        if any(not isinstance(index, numbers.Integral) or not 0 <= index < _WORD for index in self.indices):
            raise DdimError("sample index", "is negative, too large or not an integer", "count samples from 0")

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        name, device = type(self).__name__, str(self.device)
        return f"{name}(seed={self.seed}, {len(self)} samples, shape={self.shape}, device={device!r})"

    def start(self) -> Tensor:
        """x_T of every sample: float32, (N, *shape)."""
        return self._draw(0)

    def row(self, k: int) -> Tensor:
        """The random numbers of row k >= 0 of a plan, here the noise z_k: float32, (N, *shape)."""
        if k < 0:
            raise ValueError(f"plan rows count from 0, not {k}")
        return self._draw(k + 1)

    @functools.cached_property
    def _keys(self) -> Tensor:
        return device_noise.stream_keys(self.seed, self.indices, self.device)

    def _draw(self, draw: int) -> Tensor:
        if _draws_on(torch.device(self.device)):
            return device_noise.normal(self._keys, draw, self.shape)
        out = np.empty((len(self.indices), *self.shape), dtype=np.float32)
        for place, index in zip(out, self.indices, strict=True):
            place[...] = normal(self.seed, index, draw, self.shape)
        return torch.from_numpy(out).to(self.device)


@dataclass(frozen=True, eq=False, repr=False)
class TokenNoise(Noise):
    """The random numbers of a batch of samples of discrete data.

    Args:
        seed: As for `Noise`.
        indices: As for `Noise`.
        shape: Shape of one sample, for example (L,).
        device: As for `Noise`.
        pi: The distribution of the tokens of x_T, float64, (K,).
    """

    pi: Tensor | None = None

    def start(self) -> Tensor:
        """x_T of every sample, each token drawn from pi: int64, (N, *shape)."""
        assert self.pi is not None
        return sample_categorical(self._draw(0)[..., 0], self.pi.to(self.device))

    def _draw(self, draw: int) -> Tensor:
        """Uniform numbers on [0, 1), three per token: float64, (N, *shape, 3)."""
        if _draws_on(torch.device(self.device)):
            return device_noise.uniform(self._keys, draw, (*self.shape, 3))
        out = np.empty((len(self.indices), *self.shape, 3))
        for place, index in zip(out, self.indices, strict=True):
            place[...] = _stream(self.seed, index, draw).random(place.shape)
        return torch.from_numpy(out).to(self.device)


@dataclass(frozen=True)
class TorchSeed:
    """The seed of noise drawn as diffusers' pipelines draw it, from one `torch.Generator` on the CPU.

    All samples of a batch are drawn together: first x_T, then the noise of each row. So sample i depends on the number
    of samples as well as on the seed, and no sample can be drawn without the others.

    Args:
        seed: 0 <= seed < 2^64.

    Raises:
        DdimError: If the seed is out of range.
    """

    seed: int

    def __post_init__(self) -> None:
        Noise(self.seed, (), ())  # checks the range

    def __str__(self) -> str:
        return f"torch:{self.seed}"

    def of(self, n: int, shape: tuple[int, ...], device: Device = "cpu") -> TorchNoise:
        """The noise of a batch.

        Args:
            n: The number of samples.
            shape: Shape of one sample, for example (C, H, W).
            device: Device of the returned tensors; the numbers are drawn on the CPU.
        """
        return TorchNoise(self.seed, tuple(range(n)), tuple(shape), device, _TorchDraws(self.seed, (n, *shape)))


class _TorchDraws:
    """The draws of one generator for a whole batch, in order; they are stored, because a part cannot be redrawn."""

    def __init__(self, seed: int, shape: tuple[int, ...]):
        self._generator, self._shape = torch.Generator().manual_seed(seed), shape
        self._draws: list[Tensor] = []

    def __getitem__(self, draw: int) -> Tensor:
        while len(self._draws) <= draw:
            self._draws.append(torch.randn(self._shape, generator=self._generator, dtype=torch.float32))
        return self._draws[draw]


@dataclass(frozen=True, eq=False, repr=False)
class TorchNoise(Noise):
    """The noise of some samples of a batch that one `torch.Generator` draws, see `TorchSeed`.

    Args:
        seed: As for `TorchSeed`.
        indices: The samples' indices in the batch, (N,).
        shape: Shape of one sample.
        device: Device of the returned tensors.
        whole: The draws of the whole batch.
    """

    whole: _TorchDraws | None = None

    def at(self, indices: Sequence[int]) -> TorchNoise:
        """The noise of other samples of the batch."""
        return replace(self, indices=tuple(indices))

    def _draw(self, draw: int) -> Tensor:
        assert self.whole is not None
        return self.whole[draw][list(self.indices)].to(self.device)


@functools.cache
def _draws_on(device: torch.device) -> bool:
    """Whether random numbers are generated on a device; a GPU is tested once by comparing its numbers with numpy's."""
    if device.type != "cuda" or not device_noise.available():
        return False
    try:
        generated = device_noise.normal(device_noise.stream_keys(1, (2,), device), 3, (4096,)).cpu().numpy()[0]
    except Exception as error:  # a compiler or a driver may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warn(f"random numbers are drawn on the host: triton fails on {device} ({reason})")
        return False
    if not np.allclose(generated, normal(1, 2, 3, (4096,)), rtol=1e-6, atol=0):
        warn(f"random numbers are drawn on the host: triton's numbers on {device} differ from numpy's")
        return False
    return True


def _stream(seed: int, index: int, draw: int) -> np.random.Generator:
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, 0, draw], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
