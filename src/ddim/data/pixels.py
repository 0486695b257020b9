"""Conversion between stored images, uint8 NHWC in [0, 255], and network inputs, float NCHW in [-1, 1], or ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

BIN = 2 / 255
"""The distance between neighbouring values of an 8-bit image in [-1, 1]."""


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """Convert images to the network's range, x = u / 127.5 - 1.

    Args:
        images: uint8, (N, H, W, C), in [0, 255].

    Returns:
        float32, (N, C, H, W), in [-1, 1].

    Raises:
        TypeError: If the images are not uint8 (N, H, W, C).
    """
    tensor = torch.as_tensor(images)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4:
        raise TypeError(f"images must be uint8 (N, H, W, C), not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert the network's range to images: round to the nearest of 256 levels; values outside [-1, 1] saturate.

    Args:
        images: float, (N, C, H, W), nominally in [-1, 1].

    Returns:
        uint8, (N, H, W, C).
    """
    scaled = images.detach().to("cpu", torch.float32).add(1.0).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert the network's range to PIL images, rounded and saturated as in `to_uint8`.

    Args:
        images: float, (N, C, H, W), C = 1 or 3, nominally in [-1, 1].

    Returns:
        N images of mode "L" or "RGB".
    """
    from PIL import Image

    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in to_uint8(images)]


def quantize(images: np.ndarray | Tensor, levels: int) -> Tensor:
    """Quantise images to ids of K levels: floor(u K / 256).

    Args:
        images: uint8, (N, H, W, C), in [0, 255].
        levels: K, 2..256.

    Returns:
        int64, (N, C, H, W), in 0..K-1.
    """
    return torch.as_tensor(images).permute(0, 3, 1, 2).long().mul(levels).div(256, rounding_mode="floor")


def dequantize(ids: Tensor, levels: int) -> np.ndarray:
    """Convert ids of K levels to images, with the levels spread over 0..255.

    Args:
        ids: int64, (N, C, H, W), in 0..K-1.
        levels: K.

    Returns:
        uint8, (N, H, W, C).
    """
    return (ids.cpu() * 255 / (levels - 1)).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
