"""Small images for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ddim.data import ImagePolicy


def random_image(seed: int, height: int = 6, width: int = 6, channels: int = 3) -> np.ndarray:
    """A random image, uint8 (H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    """Save an image, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path, **options)
    return path


def exact(height: int, width: int, channels: int, **more: object) -> ImagePolicy:
    """A policy that accepts only images of this shape."""
    return ImagePolicy(height=height, width=width, channels=channels, fit="exact", **more)
