"""PNG files: single images with metadata, and grids of images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ddim._io.atomic import write_atomic


def png(image: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """Encode an image as PNG.

    Args:
        image: uint8, (H, W, C), C 1 or 3.
        text: Metadata as iTXt entries.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    out = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def png_text(path: Path) -> dict[str, str]:
    """The metadata of a PNG file; empty if the file is truncated or damaged, which is found by decoding it."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return dict(image.text)  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError):
        return {}


def save_png(path: Path, image: np.ndarray, text: Mapping[str, str] | None = None, sync: bool = False) -> None:
    """Write an image, uint8 (H, W, C), atomically."""
    write_atomic(path, png(image, text), sync)


def sheet(images: np.ndarray, columns: int, gap: int = 2, zoom: int = 1) -> np.ndarray:
    """Arrange images in a grid on a white background.

    Args:
        images: uint8, (N, H, W, C).
        columns: Images per row.
        gap: Pixels between images.
        zoom: Integer factor by which every pixel is enlarged.

    Returns:
        uint8, (height, width, C).
    """
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    out = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        out[top : top + h, left : left + w] = image
    return out


def labelled_rows(rows: Sequence[tuple[str, np.ndarray]], caption: str = "", zoom: int = 1) -> np.ndarray:
    """Draw rows of images, with a label at the left of each row and a caption below.

    Args:
        rows: Label and images, uint8 (N, H, W, C), the same N in every row.
        caption: A line of text below the images.
        zoom: Integer factor by which every pixel is enlarged.

    Returns:
        uint8, (H, W, 3).
    """
    font = ImageFont.load_default(13)
    left = 12 + max(int(font.getlength(label)) for label, _ in rows)
    strips = [sheet(images, len(images), zoom=zoom) for _, images in rows]
    height = sum(strip.shape[0] for strip in strips)
    width = max(left + strips[0].shape[1], 12 + int(font.getlength(caption)))
    page = Image.new("RGB", (width, height + (26 if caption else 4)), "white")
    draw, top = ImageDraw.Draw(page), 0
    for (label, _), strip in zip(rows, strips, strict=True):
        draw.text((6, top + strip.shape[0] // 2), label, "black", font, anchor="lm")
        page.paste(Image.fromarray(strip[:, :, 0] if strip.shape[2] == 1 else strip), (left, top))
        top += strip.shape[0]
    if caption:
        draw.text((6, top + 5), caption, "black", font)
    return np.asarray(page)
