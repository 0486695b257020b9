"""Image decoding: from the bytes of a file of any mode and depth to an upright, opaque 8-bit image, grey or RGB."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddim._io import limits
from ddim._io.reading import read_stream
from ddim.data.adjustments import Extent, Report
from ddim.errors import DdimError, printable

Source = str | Path | bytes | BinaryIO
IMAGE_BYTES = 512 << 20
"""The largest image file: above 50 million pixels of 8 bytes."""

# EPS and similar formats are excluded: Pillow would pass an untrusted file to an interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_REPLACE = "replace or remove it"
_REDUCED = "16-bit reduced to 8 bits"


def read_bytes(source: Source, name: str) -> bytes:
    """Read the bytes of an image file.

    Args:
        source: A path, the bytes of a file, or a binary file open for reading.
        name: Its name in an error.

    Returns:
        The bytes, at least one.

    Raises:
        DdimError: If it does not exist, is not a regular file, cannot be read, is empty, or has more than
            `IMAGE_BYTES`.
    """
    if isinstance(source, bytes):
        data = source
    else:
        try:
            if isinstance(source, (str, Path)):
                info = os.stat(source)
                mode = info.st_mode
                if not stat.S_ISREG(mode):
                    type_name = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
                    raise DdimError(name, f"is {type_name}, not an image", "pass the path of an image file")
                if info.st_size > IMAGE_BYTES:
                    raise DdimError(
                        name, f"has {info.st_size:,} bytes, too large for an image", "pass the path of an image file"
                    )
                source = Path(source).read_bytes()
            data = source if isinstance(source, bytes) else read_stream(source, IMAGE_BYTES + 1)
        except DdimError:
            raise
        except FileNotFoundError:
            raise DdimError(name, "no such file", "check the path") from None
        except PermissionError:
            raise DdimError(name, "permission denied", "make it readable (chmod u+r)") from None
        except (OSError, ValueError) as error:
            raise DdimError(name, f"cannot be read ({_short(error)})", "check the path and the disk") from None
    if len(data) > IMAGE_BYTES:
        raise DdimError(name, f"has more than {IMAGE_BYTES:,} bytes", "shrink it or remove it")
    if not data:
        raise DdimError(name, "is empty (0 bytes)", _REPLACE)
    return data


@contextlib.contextmanager
def decoded(
    source: Source, name: str, matte: int, report: Report | None = None
) -> Iterator[tuple[Image.Image, set[str]]]:
    """Decode an image, upright and opaque, in its original size; use it while the context lasts.

    Threads that decode at the same time wait for each other if together they would have more than
    `ddim._io.limits.PIXELS` pixels open: memory is bounded by one image of that size, whatever the number of threads.

    Args:
        source: A path, the bytes of a file, or a binary file open for reading.
        name: Its name in an error.
        matte: Grey level 0..255 behind transparent pixels.
        report: Collects the range of its values.

    Yields:
        An image of mode L or RGB, and the conversions, such as "CMYK converted to RGB".

    Raises:
        DdimError: If it cannot be read or decoded, or has more than `ddim._io.limits.PIXELS` pixels.
    """
    image = _open(read_bytes(source, name), name)
    with _BUDGET.reserve(image.width * image.height):
        yield _load(image, name, matte, report or Report())


def decode(source: Source, name: str, matte: int, report: Report | None = None) -> tuple[Image.Image, set[str]]:
    """As `decoded`, but returns the image and the conversions."""
    with decoded(source, name, matte, report) as result:
        return result


def _open(data: bytes, name: str) -> Image.Image:
    """Open an image, reading the header only, and check its size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        raise DdimError(name, "is not an image of a supported format", "use PNG or JPEG, or remove it") from None
    except Image.DecompressionBombError:
        raise DdimError(name, f"has too many pixels, more than {limits.PIXELS:,}", "shrink it or remove it") from None
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise DdimError(name, f"is damaged or truncated ({_short(error)})", _REPLACE) from None
    if image.width * image.height > limits.PIXELS:
        problem = f"is {image.width}x{image.height}, too many pixels: more than {limits.PIXELS:,}"
        raise DdimError(name, problem, "shrink it or remove it")
    return image


def _load(image: Image.Image, name: str, matte: int, report: Report) -> tuple[Image.Image, set[str]]:
    """Decode an opened image, make it upright and opaque, and list the conversions."""
    try:
        notes = set[str]()
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.add("animated or multi-page, first frame used")
        if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
            notes.add(_REDUCED)  # Pillow reduces 16-bit colour to the high bytes
        image.load()
        image = _upright(image, notes)
        if image.mode.startswith("I"):
            return _from_16_bits(image, name, matte, notes, report), notes
        image = _plain(image, name, matte, notes)
        report.add_image(image)
        return image, notes
    except DdimError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise DdimError(name, f"is damaged or truncated ({_short(error)})", _REPLACE) from None


class _PixelBudget:
    """A budget of `ddim._io.limits.PIXELS` pixels for images being decoded; a decoder waits until its image fits."""

    def __init__(self) -> None:
        self._free, self._changed = limits.PIXELS, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Reserve a number of pixels while the context lasts."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_BUDGET = _PixelBudget()


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats in FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image, notes: set[str]) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block of an image that is otherwise valid
        return image
    if turn is None:
        return image
    notes.add("turned upright by EXIF")
    info, image = image.info, image.transpose(turn)
    image.info = info
    return image


def _plain(image: Image.Image, name: str, matte: int, notes: set[str]) -> Image.Image:
    """Convert any mode to L or RGB, with transparent parts over the matte."""
    if image.mode == "F":
        raise DdimError(name, "has floating-point pixels of unknown range", "save it with 8 or 16 bits")
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.convert("RGB")
        if alpha.getextrema() != (255, 255):
            notes.add(f"transparent, composited over matte {matte}")
            background = Image.new("RGB", rgba.size, (matte, matte, matte))
            background.paste(image, mask=alpha)
            image = background
        return image.getchannel(0) if grey else image
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        notes.add(f"{image.mode} converted to RGB")
    wanted = "L" if grey else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _from_16_bits(image: Image.Image, name: str, matte: int, notes: set[str], report: Report) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DdimError(name, "has integers beyond 16 bits", "save it with 8 or 16 bits")
    notes.add(_REDUCED)
    report.deep.add(Extent(1, int(values.min()), int(values.max())))
    grey = (values + 128) // 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and (values == transparent).any():
        notes.add(f"transparent, composited over matte {matte}")
        grey[values == transparent] = matte
    return Image.fromarray(grey.astype(np.uint8))


def _short(error: BaseException) -> str:
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__)[:120]
