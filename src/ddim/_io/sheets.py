"""Sheets: many images in one file, PNG, WebP or GIF by its suffix."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ddim._io.atomic import write_atomic
from ddim._io.png import png, sheet
from ddim.errors import DdimError

SUFFIXES = (".png", ".webp", ".gif")
TARGET = 500
"""The number of pixels that small sheets are enlarged to, approximately, by a whole factor."""


def zoom(height: int, width: int) -> int:
    """The whole factor by which pixels of a sheet are enlarged so that its longer side is about `TARGET`."""
    return max(1, round(TARGET / max(height, width)))


def check_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Check that the suffix of a file's name is one of those that can be written.

    Raises:
        DdimError: If it is not.
    """
    if path.suffix.lower() not in suffixes:
        names = ", ".join(suffixes)
        raise DdimError(path, f"has the suffix {path.suffix or 'none'}, not one of {names}", f"use {path.stem}.png")


def save_sheet(path: Path, images: np.ndarray, columns: int, text: Mapping[str, str] | None = None) -> None:
    """Write a grid of images, enlarged by a whole factor to about 500 pixels, atomically.

    PNG and WebP are lossless; a GIF has at most 256 colours.

    Args:
        path: The file, with one of `SUFFIXES`.
        images: uint8, (N, H, W, C).
        columns: Images per row.
        text: Metadata, for PNG only.

    Raises:
        DdimError: If the suffix is another.
    """
    check_suffix(path)
    _, height, width, _ = images.shape
    rows = -(-len(images) // columns)
    page = sheet(images, columns, zoom=zoom(rows * (height + 2), columns * (width + 2)))
    write_atomic(path, png(page, text) if path.suffix.lower() == ".png" else _encoded(path, page))


def _encoded(path: Path, page: np.ndarray) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(page[:, :, 0] if page.shape[2] == 1 else page)
    if path.suffix.lower() == ".webp":
        image.save(out, "WEBP", lossless=True)
    else:
        image.save(out, "GIF")
    return out.getvalue()
