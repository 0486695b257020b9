"""A feature space that costs nothing, and pictures to put into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddim.evaluation import Extractor, from_module
from ddim.evaluation.accumulate import Make


class Small(nn.Module):
    """Two convolutions with fixed weights; any number of channels is averaged first."""

    def __init__(self, features: int = 6, scale: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Parameter(torch.randn(12, 1, 3, 3, generator=generator))
        self.second = nn.Parameter(scale * torch.randn(features, 12, 1, 1, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.conv2d(x.mean(1, keepdim=True), self.first, stride=2).relu()
        return nn.functional.conv2d(inner, self.second).mean((2, 3))


def small(features: int = 6, name: str = "small") -> Extractor:
    return from_module(Small(features), name)


def save_script(path: Path, features: int = 6) -> Path:
    """The same as a TorchScript file."""
    torch.jit.save(torch.jit.script(Small(features).eval()), path)
    return path


def random_pictures(n: int, size: int = 8, channels: int = 1, seed: int = 0) -> np.ndarray:
    """uint8, (N, H, W, C): blots of differing place, size and brightness."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows, columns = np.indices((size, size))
    middle, width = generator.uniform(1, size - 1, (n, 2)), generator.uniform(1, 3, n)
    away = (rows - middle[:, :1, None]) ** 2 + (columns - middle[:, 1:, None]) ** 2
    blots = generator.uniform(100, 255, n)[:, None, None] * np.exp(-away / width[:, None, None] ** 2)
    return np.repeat(blots.astype(np.uint8)[..., None], channels, axis=3)


def maker(pictures: np.ndarray, block: int) -> Make:
    """A `Make` of an array, in blocks of that size."""

    def make(some: range) -> Iterator[np.ndarray]:
        for first in range(some.start, some.stop, block):
            yield pictures[first : min(first + block, some.stop)]

    return make
