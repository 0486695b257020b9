"""What bringing pictures to the grid does to them, counted over a set and said once, with numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from PIL import Image

from ddim.data.policy import ImagePolicy
from ddim.errors import either, warn

DEEP = 65535
_MIXED = {"colour reduced to grey", "grey spread to RGB"}  # worth a word only if it befell some and not all
_SHOWN = 3


@dataclass
class Extent:
    """The values that some pictures reach.

    Args:
        count: How many pictures.
        lowest: The smallest value of all.
        largest: The largest.
    """

    count: int = 0
    lowest: int = DEEP
    largest: int = 0

    def add(self, other: Extent) -> None:
        """Take in those of other pictures."""
        self.count += other.count
        self.lowest, self.largest = min(self.lowest, other.lowest), max(self.largest, other.largest)


@dataclass
class Told:
    """What befell some pictures on their way to the grid.

    Attributes:
        notes: How many took each conversion, in words.
        deep: The values of grey pictures of 16 bits, as they are stored.
        plain: The values of the others, brought to 8 bits.
        cut: The share of its pixels that each picture lost whose aspect ratio is not the grid's, by its size.
        resized: How many pictures had another size than the grid, by that size (width, height).
    """

    notes: Counter[str] = field(default_factory=Counter)
    deep: Extent = field(default_factory=Extent)
    plain: Extent = field(default_factory=Extent)
    cut: Counter[float] = field(default_factory=Counter)
    resized: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, other: Told) -> None:
        """Take in what befell other pictures."""
        self.notes.update(other.notes)
        self.deep.add(other.deep)
        self.plain.add(other.plain)
        self.cut.update(other.cut)
        self.resized.update(other.resized)

    def see(self, image: Image.Image) -> None:
        """Take in the values of a picture of 8 bits."""
        ends = image.getextrema()
        pairs = ends if isinstance(ends[0], tuple) else (ends,)
        self.plain.add(Extent(1, min(int(low) for low, _ in pairs), max(int(high) for _, high in pairs)))

    def say(self, where: str, total: int, policy: ImagePolicy, alone: bool = False) -> None:
        """Say all of it in one line, if there is anything to say.

        Args:
            where: The set.
            total: How many pictures it has.
            policy: The grid.
            alone: Whether they are no set but a few files that were named: then colour that is lost is said too.
        """
        told = [f"{n} {what}" for what, n in sorted(self.notes.items()) if what not in _MIXED or n < total or alone]
        both = (self.deep, DEEP), (self.plain, 255)
        told += [self._range(extent, top) for extent, top in both if dark(extent, top)]
        shape, mend = f"{policy.width}x{policy.height}", ""
        if self.cut:
            lost = sum(share * n for share, n in self.cut.items()) / self.cut.total()
            most = f", {max(self.cut):.0%} of one at most" if len(self.cut) > 1 else ""
            told.append(f"{self.cut.total()} cropped to the shape of {shape}: {lost:.0%} of each is cut off{most}")
            mend = either("to keep all of each, use fit='stretch'", "to refuse other sizes, use fit='exact'")
        if self.resized:
            sizes = ", ".join(f"{wide}x{high}" for wide, high in sorted(self.resized)[:_SHOWN])
            more = f" and {len(self.resized) - _SHOWN} other sizes" if len(self.resized) > _SHOWN else ""
            told.append(f"{self.resized.total()} resized to {shape} from {sizes}{more}")
        if told:
            warn(f"{where}: of {total} pictures {', '.join(told)}", mend)

    @staticmethod
    def _range(extent: Extent, top: int) -> str:
        share, step = (extent.largest - extent.lowest) / top, top // 255
        levels = (extent.largest + step // 2) // step - (extent.lowest + step // 2) // step + 1
        kept = f": they become {levels} of 256 grey levels" if top == DEEP else ""
        wrong = (
            f"{extent.count} use values {extent.lowest} to {extent.largest} of 0 to {top} ({share:.1%} of the range)"
        )
        return f"{wrong}{kept}, dark or flat; scale the values up before, if that is not meant"


def dark(extent: Extent, top: int) -> bool:
    """Whether pictures use so small a part of the range that they are hardly meant so.

    Of 16 bits less than half: then bits of the 8 that are kept lie idle. Of 8 bits, where photographs may well be dark,
    values below a quarter only, such as those of masks of 0 and 1.
    """
    if not extent.count:
        return False
    return extent.largest - extent.lowest < top / 2 if top == DEEP else extent.largest < top / 4
