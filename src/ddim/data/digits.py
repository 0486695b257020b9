"""scikit-learn's handwritten digits: 1,797 images of 8x8 that need no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ddim.data.adjustments import Report
from ddim.data.decode import Source
from ddim.data.image import preprocess
from ddim.data.image_set import ImageSet
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError

_TRAIN = 1500
_NATURAL = ImagePolicy(height=8, width=8, channels=1, fit="exact")


@dataclass(frozen=True, eq=False)
class _Digits:
    """The digits of one split before preprocessing: uint8, (N, 8, 8)."""

    small: np.ndarray
    split: str

    def __len__(self) -> int:
        return len(self.small)

    def source(self, index: int) -> Source:
        return bytes(self.small[index])

    def name(self, index: int) -> str:
        return f"digits {self.split}[{index}]"


def load_digits(policy: ImagePolicy | None = None, split: str = "train", limit: int | None = None) -> ImageSet:
    """Load the digits; "train" is the first 1,500 and "test" the other 297.

    Args:
        policy: The preprocessing; by default none, 8x8x1.
        split: "train" or "test".
        limit: Maximum number of images.

    Returns:
        The dataset, in memory, with labels 0..9; intensities 0..16 become 0..255.

    Raises:
        DdimError: If there is no such split, or scikit-learn is not installed.
    """
    items, labels = _read(split, limit)
    target, adjusted = policy or _NATURAL, Report()
    pixels = np.stack([preprocess(Image.fromarray(digit), target, "digits", adjusted) for digit in items.small])
    adjusted.warn("digits", len(items), target)
    return _pack("digits", items, pixels, labels, target)


def digits_as_mnist(split: str = "train", limit: int | None = None) -> ImageSet:
    """Load the digits in the style of MNIST: 20x20 in the middle of a black 28x28, with three times the contrast.

    The contrast sharpens the strokes, which are blurred by upsampling from 8x8, as a model trained on MNIST expects.

    Args:
        split: "train" (the first 1,500) or "test" (the other 297).
        limit: Maximum number of images.

    Returns:
        The dataset, in memory, 28x28x1, with labels 0..9.

    Raises:
        DdimError: If there is no such split, or scikit-learn is not installed.
    """
    items, labels = _read(split, limit)
    inner = ImagePolicy(height=20, width=20, channels=1, filter="bicubic")
    pixels = np.stack([preprocess(Image.fromarray(digit), inner, "digits") for digit in items.small])
    pixels = np.clip((pixels.astype(np.int16) - 128) * 3 + 128, 0, 255).astype(np.uint8)
    pixels = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    return _pack("digits-as-mnist", items, pixels, labels, ImagePolicy(height=28, width=28, channels=1))


def _read(split: str, limit: int | None) -> tuple[_Digits, np.ndarray]:
    parts = {"train": slice(0, _TRAIN), "test": slice(_TRAIN, None)}
    if split not in parts:
        raise DdimError("digits", f"has no split {split!r}", "use one of train, test")
    try:
        from sklearn.datasets import load_digits as fetch
    except ImportError:
        raise DdimError("scikit-learn", "is not installed", "run: pip install 'ddim[data]'") from None
    levels, labels = fetch(return_X_y=True)
    small = np.rint(levels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    part = parts[split]
    return _Digits(small[part][:limit], split), labels[part][:limit].astype(np.int64)


def _pack(name: str, items: _Digits, pixels: np.ndarray, labels: np.ndarray, policy: ImagePolicy) -> ImageSet:
    return ImageSet(name, items.split, policy, items, pixels, labels, tuple("0123456789"))
