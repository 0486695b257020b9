"""Image preprocessing: one image of any mode, depth or orientation to uint8 (H, W, C); and listing of image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ddim.data.adjustments import Report
from ddim.data.decode import Source, decode, decoded
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError, either, printable

_COMMON = ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .avif"
_RARE = ".jp2 .j2k .jpx .ppm .pgm .pbm .pnm .tga"
SUFFIXES = frozenset(f"{_COMMON} {_RARE}".split())

_MODES = {1: "L", 3: "RGB"}
_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
}


class MisfitError(DdimError):
    """A valid image that the policy refuses: it has another size, or is smaller than the crop box."""


def open_image(source: Source, policy: ImagePolicy, name: str | None = None) -> np.ndarray:
    """Read and preprocess an image.

    EXIF orientation, palettes, transparency (over the policy's matte), 16-bit grey (v / 257 rounded), CMYK, one-bit and
    grey images are supported; the first frame of an animation is used; colour profiles are ignored. Pillow reduces
    16-bit colour to the high bytes.

    Args:
        source: A path, the bytes of a file, or a binary file open for reading.
        policy: The preprocessing.
        name: Its name in an error; by default its path.

    Returns:
        uint8, (H, W, C) of the policy, in [0, 255].

    Raises:
        DdimError: If the file does not exist, cannot be read or decoded, or the policy refuses the image.
    """
    return read_image(source, policy, name)[0]


def read_image(
    source: Source, policy: ImagePolicy, name: str | None = None, adjusted: Report | None = None
) -> tuple[np.ndarray, frozenset[str]]:
    """As `open_image`, and returns the conversions too.

    Args:
        source: A path, the bytes of a file, or a binary file open for reading.
        policy: The preprocessing.
        name: Its name in an error; by default its path.
        adjusted: Collects the conversions, the losses and the range of values.

    Returns:
        uint8 (H, W, C), and the conversions, such as "CMYK converted to RGB".

    Raises:
        DdimError: As `open_image`.
    """
    name, conversions = label_of(source, name), Report()
    with decoded(source, name, policy.matte, conversions) as (image, notes):
        if image.mode != _MODES[policy.channels]:
            notes.add("colour reduced to grey" if policy.channels == 1 else "grey spread to RGB")
        pixels = preprocess(image, policy, name, conversions)
    conversions.notes.update(notes)
    if adjusted is not None:
        adjusted.add(conversions)
    return pixels, frozenset(notes)


def natural_policy(source: Source, name: str | None = None) -> ImagePolicy:
    """The policy that keeps an image's size and channels, and refuses images of another size.

    Args:
        source: A path, the bytes of a file, or a binary file open for reading.
        name: Its name in an error; by default its path.

    Returns:
        A policy with fit="exact".

    Raises:
        DdimError: As `open_image`.
    """
    image, _ = decode(source, label_of(source, name), 0)
    return ImagePolicy(height=image.height, width=image.width, channels=1 if image.mode == "L" else 3, fit="exact")


def list_images(folder: Path | str) -> list[Path]:
    """List all files below a folder with the suffix of an image, in a deterministic order.

    Hidden files and folders are skipped; links to folders are followed, each folder once. A broken link is listed, so
    that reading it reports the error.

    Args:
        folder: The folder to search.

    Returns:
        Paths below `folder`, sorted by their path relative to it.

    Raises:
        DdimError: If the folder does not exist, or a folder inside it cannot be read.
    """
    return list_files(Path(folder), SUFFIXES)


def list_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """List all files below a folder with one of the suffixes, except hidden ones.

    Args:
        folder: The folder to search.
        suffixes: Suffixes in lower case, with the dot.

    Returns:
        Paths below `folder`, sorted by their path relative to it.

    Raises:
        DdimError: If the folder does not exist, or a folder inside it cannot be read.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "no such folder"
        raise DdimError(printable(folder), problem, "pass the path of an image folder")
    paths = [path for path in _walk(folder) if path.suffix.lower() in suffixes]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def label_of(source: Source, name: str | None = None) -> str:
    """An image's name in a message: `name`, otherwise its path, otherwise "an image"."""
    if name is None:
        path = source if isinstance(source, (str, Path)) else getattr(source, "name", None)
        name = str(path) if isinstance(path, (str, Path)) else "an image"
    return printable(name)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder that are not hidden, in no particular order."""

    def raise_error(error: OSError) -> None:
        raise DdimError(printable(error.filename), "permission denied", "make it readable (chmod u+rx)")

    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=raise_error, followlinks=True):
        unvisited = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                unvisited.append(name)
        folders[:] = unvisited
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def preprocess(image: Image.Image, policy: ImagePolicy, name: str, adjusted: Report | None = None) -> np.ndarray:
    """Preprocess an upright, opaque image: convert its channels, cut out the box, then fit it to the resolution.

    Args:
        image: An image of mode L or RGB.
        policy: The preprocessing.
        name: Its name in an error.
        adjusted: Collects what cropping and resizing change.

    Returns:
        uint8, (H, W, C) of the policy.

    Raises:
        MisfitError: If the image is smaller than the box, or fit is "exact" and its size differs.
    """
    if image.mode != _MODES[policy.channels]:
        image = image.convert(_MODES[policy.channels])
    wide, high = image.size
    left, upper, right, lower = policy.box or (0, 0, wide, high)
    if right > wide or lower > high:
        raise MisfitError(name, f"is {wide}x{high} too small for the box {policy.box}", "change the box")
    wide, high = right - left, lower - upper
    size = (policy.width, policy.height)
    if policy.fit == "exact" and (wide, high) != size:
        hint = either("resize all images to one size first", "use fit='crop'", "use fit='stretch'")
        raise MisfitError(name, f"is {wide}x{high}, not {size[0]}x{size[1]} (width x height)", hint)
    adjusted = adjusted or Report()
    if (wide, high) != size:
        adjusted.resized[wide, high] += 1
    if policy.fit == "crop":
        part_w = max(1, min(wide, round(high * size[0] / size[1])))
        part_h = max(1, min(high, round(wide * size[1] / size[0])))
        left, upper = left + (wide - part_w) // 2, upper + (high - part_h) // 2
        right, lower = left + part_w, upper + part_h
        if (part_w, part_h) != (wide, high):
            adjusted.cut[1 - part_w * part_h / (wide * high)] += 1
    if (left, upper, right, lower) != (0, 0, *image.size):
        image = image.crop((left, upper, right, lower))
    if image.size != size:
        image = image.resize(size, _FILTERS[policy.filter])
    return np.array(image).reshape(policy.shape)
