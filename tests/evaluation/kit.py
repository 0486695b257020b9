"""A small feature extractor, and random images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddim.evaluation import Extractor, from_module
from ddim.evaluation.accumulate import Make


class Small(nn.Module):
    """Two convolutions with fixed weights, applied to the mean of the channels."""

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
    """Save the network of `small` as a TorchScript file."""
    torch.jit.save(torch.jit.script(Small(features).eval()), path)
    return path


def random_images(n: int, size: int = 8, channels: int = 1, seed: int = 0) -> np.ndarray:
    """uint8, (N, H, W, C): blobs of random position, size and brightness."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows, columns = np.indices((size, size))
    centre, width = generator.uniform(1, size - 1, (n, 2)), generator.uniform(1, 3, n)
    distance = (rows - centre[:, :1, None]) ** 2 + (columns - centre[:, 1:, None]) ** 2
    blobs = generator.uniform(100, 255, n)[:, None, None] * np.exp(-distance / width[:, None, None] ** 2)
    return np.repeat(blobs.astype(np.uint8)[..., None], channels, axis=3)


def maker(images: np.ndarray, batch: int) -> Make:
    """A `Make` that yields an array in batches."""

    def make(indices: range) -> Iterator[np.ndarray]:
        for first in range(indices.start, indices.stop, batch):
            yield images[first : min(first + batch, indices.stop)]

    return make
