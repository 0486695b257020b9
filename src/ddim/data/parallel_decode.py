"""Many pictures at once: decoded by a few threads, the bad ones counted and named."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from ddim.data.adjustments import Told
from ddim.data.decode import Source
from ddim.data.image import MisfitError, list_images, open_image, read_image
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError, either, printable

T = TypeVar("T")
CHUNK = 64
_SHOWN = 5


class Items(Protocol):
    """Where pictures come from, before they are decoded."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def source(self, index: int) -> Source:
        """The path or the bytes of picture `index`."""
        ...

    def name(self, index: int) -> str:
        """What to call picture `index`."""
        ...


@dataclass(frozen=True)
class Files:
    """Picture files below a folder."""

    root: Path
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> Source:
        """The path of picture `index`."""
        return self.paths[index]

    def name(self, index: int) -> str:
        """Its path below the folder."""
        return printable(self.paths[index].relative_to(self.root).as_posix())


@dataclass(frozen=True, eq=False)
class Picked:
    """Some of the pictures of other items, in a given order."""

    items: Items
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def source(self, index: int) -> Source:
        """The path or the bytes of picture `index`."""
        return self.items.source(int(self.order[index]))

    def name(self, index: int) -> str:
        """What to call picture `index`."""
        return self.items.name(int(self.order[index]))


@dataclass
class DecodeReport:
    """What one pass over some pictures found.

    Attributes:
        pixels: uint8, (N, H, W, C), rows of bad pictures undefined; None if they were not kept.
        bad: What is wrong with each bad picture, by its index, in order.
        told: What befell them.
        whole: Whether all were tried.
    """

    pixels: np.ndarray | None = None
    bad: dict[int, DdimError] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    whole: bool = True


def workers() -> int:
    """How many threads decode at once: the cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def gather(
    items: Items, policy: ImagePolicy, keep: bool, patience: int | None = None
) -> Generator[tuple[int, int], None, DecodeReport]:
    """Decode all pictures, a chunk at a time.

    Args:
        items: The pictures.
        policy: The grid.
        keep: Whether the pixels are to be kept.
        patience: The number of bad pictures after which no more are tried; None to try all.

    Yields:
        How many are done, and how many there are.

    Returns:
        What was found.
    """
    count = len(items)
    found = DecodeReport(np.zeros((count, *policy.shape), np.uint8) if keep else None)

    def decode(start: int) -> tuple[dict[int, DdimError], Told]:
        bad, told = dict[int, DdimError](), Told()
        for index in range(start, min(start + CHUNK, count)):
            try:
                picture, _ = read_image(items.source(index), policy, items.name(index), told)
            except DdimError as error:
                bad[index] = error
                continue
            if found.pixels is not None:
                found.pixels[index] = picture
        return bad, told

    pool = ThreadPoolExecutor(workers())
    try:
        for step, (bad, told) in enumerate(pool.map(decode, range(0, count, CHUNK))):
            found.bad.update(bad)
            found.told.add(told)
            yield min((step + 1) * CHUNK, count), count
            if patience is not None and len(found.bad) > patience:
                found.whole = (step + 1) * CHUNK >= count
                break
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def decode_batch(items: Items, indices: np.ndarray, policy: ImagePolicy, where: str) -> np.ndarray:
    """Decode some pictures by threads; the result does not depend on how many.

    Args:
        items: The pictures.
        indices: int, (B,).
        policy: The grid.
        where: The set, for errors.

    Returns:
        uint8, (B, H, W, C).

    Raises:
        DdimError: If one of them has become unreadable.
    """
    out = np.empty((len(indices), *policy.shape), np.uint8)

    def place(job: tuple[int, int]) -> None:
        name = f"{where}/{items.name(job[1])}"
        out[job[0]] = open_image(items.source(job[1]), policy, name)

    with ThreadPoolExecutor(workers()) as pool:
        for _ in pool.map(place, enumerate(indices.tolist())):
            pass
    return out


def scan(folder: Path | str, policy: ImagePolicy | None = None) -> list[tuple[str, str]]:
    """Try to decode every picture of a folder.

    Args:
        folder: The folder.
        policy: If given, pictures that it refuses are listed too.

    Returns:
        For each bad picture its path below the folder and the reason, in order; nothing if all are sound.

    Raises:
        DdimError: If there is no such folder.
    """
    return drain(iter_scan(folder, policy))


def iter_scan(
    folder: Path | str, policy: ImagePolicy | None = None
) -> Generator[tuple[int, int], None, list[tuple[str, str]]]:
    """As `scan`, step by step.

    Args:
        folder: The folder.
        policy: If given, pictures that it refuses are listed too.

    Yields:
        How many are done, and how many there are.

    Returns:
        What `scan` returns.

    Raises:
        DdimError: If there is no such folder.
    """
    items = Files(Path(folder), list_images(folder))
    any_size = ImagePolicy(height=1, width=1, channels=3, fit="stretch", filter="box")
    found = yield from gather(items, policy or any_size, keep=False)
    return [(items.name(index), error.wrong) for index, error in found.bad.items()]


def drain(steps: Generator[Any, None, T]) -> T:
    """Run a generator of steps to its end and give what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def complaint(where: str, total: int, bad: dict[int, DdimError], whole: bool = True) -> DdimError:
    """One line for the pictures of a set that cannot be used.

    Args:
        where: The set.
        total: How many pictures it has.
        bad: What is wrong with each bad picture.
        whole: Whether all were tried.

    Returns:
        The error to raise: the first few by name, the number of the others, and how to mend it.
    """
    least = "" if whole else "at least "
    misfits = [error for error in bad.values() if isinstance(error, MisfitError)]
    if misfits:
        wrong = f"{least}{len(misfits)} of {total} pictures do not fit the grid: {named(misfits)}"
        return MisfitError(where, wrong, misfits[0].mend)
    wrong = f"{least}{len(bad)} of {total} pictures cannot be read: {named(list(bad.values()))}"
    return DdimError(where, wrong, either("remove them", "leave them out with skip_unreadable=True"))


def named(bad: Sequence[DdimError]) -> str:
    """The first few bad pictures with their reasons, and the number of the others."""
    shown = ", ".join(f"{error.what} {error.wrong}" for error in bad[:_SHOWN])
    return shown + (f", and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
