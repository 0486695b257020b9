"""One stream of noise per sample: sample i is a function of (seed, i), never of a batch or of a global generator.

The streams are Philox 4x64 (counter based, numpy's), keyed by (seed, index); the top word of the counter is the
draw's number: 0 for x_T, k + 1 for the noise of plan row k. `torch.Generator` would not do: on a CPU it keeps 32
bits of its seed, and what it draws depends on the shape asked for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import numbers
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError, warn
from ddim.process import device_noise

_WORD = 2**64


def normal(seed: int, index: int, draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers of one sample and one draw.

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
    """The order in which epoch `epoch` of a training visits n pictures; int64, (n,)."""
    return _stream(seed, epoch, _WORD - 1).permutation(n)


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A torch generator on a device, seeded by a hash of integers.

    For draws in training, where one step may draw a whole batch at once. On a CPU torch keeps 32 bits of it.
    """
    made = torch.Generator(device=device)
    made.manual_seed(hash_seed(*key))
    return made


def hash_seed(*key: int) -> int:
    """A seed in 0..2^63-1 that is a hash of integers."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def sample_categorical(u: Tensor, probabilities: Tensor) -> Tensor:
    """The category of each u by the inverse of the distribution function, exact but for rounding of the sums.

    Args:
        u: In [0, 1), (...).
        probabilities: (K,), or (..., K), one distribution each; a sum that is not 1 is divided away.

    Returns:
        int64, (...); never a category of probability 0.
    """
    edges = probabilities.double().cumsum(-1)
    at = u.double()[..., None] * edges[..., -1:]
    if probabilities.ndim == 1:
        ids = torch.searchsorted(edges, at.squeeze(-1).contiguous(), right=True)
    else:
        ids = torch.searchsorted(edges, at.contiguous(), right=True).squeeze(-1)
    # u near 1 times the sum may round to the sum itself: then the last category that has any probability.
    return torch.minimum(ids, (edges < edges[..., -1:]).sum(-1))


@contextlib.contextmanager
def temporary_seed(device: torch.device | str, seed: int) -> Iterator[None]:
    """Seed the global generator of one device for a while, and put its state back.

    For what takes no generator argument: dropout, and the first weights of a network.
    """
    at = torch.device(device)
    cuda = at.type == "cuda"
    with torch.random.fork_rng([at] if cuda else []):
        # torch.manual_seed would seed every device, and only this one's state is put back.
        if cuda:
            torch.cuda.default_generators[at.index or torch.cuda.current_device()].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Noise:
    """The randomness of a batch of samples, drawn when asked for.

    Args:
        seed: The run's seed.
        indices: The samples' indices in the run, (N,).
        shape: Shape of one sample, for example (C, H, W).
        device: Where the draws go; what is drawn does not depend on it. On a GPU they are made there where triton is
            installed (`ddim.process.device_noise`, which says how exactly the numbers agree).
    """

    seed: int
    indices: tuple[int, ...]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < _WORD:
            raise DdimError(f"seed {self.seed}", "is no whole number in 0..2^64-1", "choose another seed")
        if any(not isinstance(index, numbers.Integral) or not 0 <= index < _WORD for index in self.indices):
            raise DdimError("sample index", "is negative, too large or no whole number", "count samples from 0")

    def __len__(self) -> int:
        return len(self.indices)

    def start(self) -> Tensor:
        """x_T of every sample: float32, (N, *shape)."""
        return self._draw(0)

    def row(self, k: int) -> Tensor:
        """What row k >= 0 of a plan draws: here the noise z_k, float32, (N, *shape)."""
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


@dataclass(frozen=True, eq=False)
class TokenNoise(Noise):
    """The randomness of a batch of samples of categories.

    Args:
        seed: As for `Noise`, like the next three.
        indices: As above.
        shape: As above, for example (L,).
        device: As above.
        pi: What x_T is drawn from, float64, (K,).
    """

    pi: Tensor | None = None

    def start(self) -> Tensor:
        """x_T of every sample, each token drawn from pi: int64, (N, *shape)."""
        assert self.pi is not None
        return sample_categorical(self._draw(0)[..., 0], self.pi.to(self.device))

    def _draw(self, draw: int) -> Tensor:
        """Uniform on [0, 1), three for each token: float64, (N, *shape, 3)."""
        if _draws_on(torch.device(self.device)):
            return device_noise.uniform(self._keys, draw, (*self.shape, 3))
        out = np.empty((len(self.indices), *self.shape, 3))
        for place, index in zip(out, self.indices, strict=True):
            place[...] = _stream(self.seed, index, draw).random(place.shape)
        return torch.from_numpy(out).to(self.device)


@functools.cache
def _draws_on(device: torch.device) -> bool:
    """Whether numbers are drawn on a device; a GPU is tried once, and its numbers are compared with numpy's."""
    if device.type != "cuda" or not device_noise.available():
        return False
    try:
        got = device_noise.normal(device_noise.stream_keys(1, (2,), device), 3, (4096,)).cpu().numpy()[0]
    except Exception as error:  # whatever a compiler or a driver may raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warn(f"random numbers are drawn on the host: triton fails on {device} ({reason})")
        return False
    if not np.allclose(got, normal(1, 2, 3, (4096,)), rtol=1e-6, atol=0):
        warn(f"random numbers are drawn on the host: triton's numbers on {device} are not numpy's")
        return False
    return True


def _stream(seed: int, index: int, draw: int) -> np.random.Generator:
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, 0, draw], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
