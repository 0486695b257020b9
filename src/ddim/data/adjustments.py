"""Counts of what preprocessing changes in the images of a dataset, reported in one warning."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from PIL import Image

from ddim.data.policy import ImagePolicy
from ddim.errors import either, warn

MAX_16_BIT = 65535
_MIXED = {"colour reduced to grey", "grey spread to RGB"}  # reported only if it applies to some images and not to all
_SHOWN = 3


@dataclass
class Extent:
    """The range of pixel values over a number of images.

    Args:
        count: Number of images.
        lowest: The smallest value.
        largest: The largest value.
    """

    count: int = 0
    lowest: int = MAX_16_BIT
    largest: int = 0

    def add(self, other: Extent) -> None:
        """Extend the range by another one."""
        self.count += other.count
        self.lowest, self.largest = min(self.lowest, other.lowest), max(self.largest, other.largest)


@dataclass
class Report:
    """Counts of the conversions that images went through in preprocessing.

    Attributes:
        notes: Number of images per conversion, such as "CMYK converted to RGB".
        deep: Range of the stored values of 16-bit grey images.
        plain: Range of the values of all other images, as 8 bits.
        cut: Number of images per fraction of pixels lost to cropping to the aspect ratio.
        resized: Number of resized images per original size (width, height).
    """

    notes: Counter[str] = field(default_factory=Counter)
    deep: Extent = field(default_factory=Extent)
    plain: Extent = field(default_factory=Extent)
    cut: Counter[float] = field(default_factory=Counter)
    resized: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, other: Report) -> None:
        """Add the counts of other images."""
        self.notes.update(other.notes)
        self.deep.add(other.deep)
        self.plain.add(other.plain)
        self.cut.update(other.cut)
        self.resized.update(other.resized)

    def add_image(self, image: Image.Image) -> None:
        """Add the values of an 8-bit image."""
        ends = image.getextrema()
        pairs = ends if isinstance(ends[0], tuple) else (ends,)
        self.plain.add(Extent(1, min(int(low) for low, _ in pairs), max(int(high) for _, high in pairs)))

    def warn(self, where: str, total: int, policy: ImagePolicy, alone: bool = False) -> None:
        """Warn about all conversions in one line, if there were any.

        Args:
            where: The dataset's name.
            total: Number of images.
            policy: The preprocessing.
            alone: Whether the images are a few named files; then lost colour is reported too.

        Warns:
            DdimWarning: If anything was converted.
        """
        parts = [f"{n} {note}" for note, n in sorted(self.notes.items()) if note not in _MIXED or n < total or alone]
        extents = (self.deep, MAX_16_BIT), (self.plain, 255)
        parts += [self._range(extent, top) for extent, top in extents if is_dark(extent, top)]
        shape, hint = f"{policy.width}x{policy.height}", ""
        if self.cut:
            lost = sum(share * n for share, n in self.cut.items()) / self.cut.total()
            most = f", at most {max(self.cut):.0%}" if len(self.cut) > 1 else ""
            parts.append(f"{self.cut.total()} cropped to the shape of {shape}: {lost:.0%} of each is lost{most}")
            hint = either("to keep whole images, use fit='stretch'", "to reject other sizes, use fit='exact'")
        if self.resized:
            sizes = ", ".join(f"{wide}x{high}" for wide, high in sorted(self.resized)[:_SHOWN])
            more = f" and {len(self.resized) - _SHOWN} other sizes" if len(self.resized) > _SHOWN else ""
            parts.append(f"{self.resized.total()} resized to {shape} from {sizes}{more}")
        if parts:
            warn(f"{where}: of {total} images {', '.join(parts)}", hint)

    @staticmethod
    def _range(extent: Extent, top: int) -> str:
        share, step = (extent.largest - extent.lowest) / top, top // 255
        levels = (extent.largest + step // 2) // step - (extent.lowest + step // 2) // step + 1
        effect = f": they become {levels} of 256 grey levels" if top == MAX_16_BIT else ""
        problem = (
            f"{extent.count} use values {extent.lowest} to {extent.largest} of 0 to {top} ({share:.1%} of the range)"
        )
        return f"{problem}{effect}, low contrast; rescale the values if this is not intended"


def is_dark(extent: Extent, top: int) -> bool:
    """Whether images use so small a part of the range of values that this is probably a mistake.

    For 16 bits, less than half of the range, which leaves at most 128 of 256 levels. For 8 bits, where photographs
    may be dark, only values below a quarter of the range, such as masks of 0 and 1.
    """
    if not extent.count:
        return False
    return extent.largest - extent.lowest < top / 2 if top == MAX_16_BIT else extent.largest < top / 4
