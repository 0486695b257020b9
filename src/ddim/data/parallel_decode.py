"""Decoding of many images by a thread pool, with a report of the invalid ones."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from ddim.data.adjustments import Report
from ddim.data.decode import Source
from ddim.data.image import MisfitError, list_images, open_image, read_image
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError, either, printable

T = TypeVar("T")
CHUNK = 64
_SHOWN = 5


class Items(Protocol):
    """A sequence of encoded images."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def source(self, index: int) -> Source:
        """The path or the encoded bytes of image `index`."""
        ...

    def name(self, index: int) -> str:
        """The name of image `index` in messages."""
        ...


@dataclass(frozen=True)
class Files:
    """Image files below a folder."""

    root: Path
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> Source:
        """The path of image `index`."""
        return self.paths[index]

    def name(self, index: int) -> str:
        """The path of image `index` below the folder."""
        return printable(self.paths[index].relative_to(self.root).as_posix())


@dataclass(frozen=True, eq=False)
class Subset:
    """A subset of the images of other items, in the order of the indices `order`."""

    items: Items
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def source(self, index: int) -> Source:
        """The path or the encoded bytes of image `index`."""
        return self.items.source(int(self.order[index]))

    def name(self, index: int) -> str:
        """The name of image `index` in messages."""
        return self.items.name(int(self.order[index]))


@dataclass
class DecodeReport:
    """The result of decoding images once.

    Attributes:
        pixels: uint8, (N, H, W, C), undefined for invalid images; None if pixels are not stored.
        bad: The error of each invalid image, by its index, in order.
        adjusted: The conversions of all images.
        complete: Whether all images were tried.
    """

    pixels: np.ndarray | None = None
    bad: dict[int, DdimError] = field(default_factory=dict)
    adjusted: Report = field(default_factory=Report)
    complete: bool = True


def workers() -> int:
    """Number of decoding threads: the cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def decode_all(
    items: Items, policy: ImagePolicy, keep: bool, max_bad: int | None = None
) -> Generator[tuple[int, int], None, DecodeReport]:
    """Decode all images in parallel, in chunks.

    Args:
        items: The encoded images.
        policy: The preprocessing.
        keep: Whether to keep the pixels.
        max_bad: Stop after more than this number of invalid images; None to try all.

    Yields:
        The number of images done, and the total.

    Returns:
        The pixels, errors and conversions.
    """
    count = len(items)
    report = DecodeReport(np.zeros((count, *policy.shape), np.uint8) if keep else None)

    def decode(start: int) -> tuple[dict[int, DdimError], Report]:
        bad, adjusted = dict[int, DdimError](), Report()
        for index in range(start, min(start + CHUNK, count)):
            try:
                pixels, _ = read_image(items.source(index), policy, items.name(index), adjusted)
            except DdimError as error:
                bad[index] = error
                continue
            if report.pixels is not None:
                report.pixels[index] = pixels
        return bad, adjusted

    pool = ThreadPoolExecutor(workers())
    try:
        for step, (bad, adjusted) in enumerate(pool.map(decode, range(0, count, CHUNK))):
            report.bad.update(bad)
            report.adjusted.add(adjusted)
            yield min((step + 1) * CHUNK, count), count
            if max_bad is not None and len(report.bad) > max_bad:
                report.complete = (step + 1) * CHUNK >= count
                break
    finally:
        pool.shutdown(cancel_futures=True)
    return report


def decode_batch(items: Items, indices: np.ndarray, policy: ImagePolicy, where: str) -> np.ndarray:
    """Decode a batch in parallel; the result does not depend on the number of threads.

    Args:
        items: The encoded images.
        indices: int, (B,).
        policy: The preprocessing.
        where: The dataset's name in an error.

    Returns:
        uint8, (B, H, W, C).

    Raises:
        DdimError: If an image cannot be read.
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
    """Decode every image of a folder to find invalid ones.

    Args:
        folder: The folder.
        policy: If not None, images that it rejects are listed too.

    Returns:
        Path below the folder and reason of each invalid image, in order; empty if all are valid.

    Raises:
        DdimError: If the folder does not exist.
    """
    return drain(iter_scan(folder, policy))


def iter_scan(
    folder: Path | str, policy: ImagePolicy | None = None
) -> Generator[tuple[int, int], None, list[tuple[str, str]]]:
    """As `scan`, with progress.

    Args:
        folder: The folder.
        policy: If not None, images that it rejects are listed too.

    Yields:
        The number of images done, and the total.

    Returns:
        The result of `scan`.

    Raises:
        DdimError: If the folder does not exist.
    """
    items = Files(Path(folder), list_images(folder))
    any_size = ImagePolicy(height=1, width=1, channels=3, fit="stretch", filter="box")
    report = yield from decode_all(items, policy or any_size, keep=False)
    return [(items.name(index), error.problem) for index, error in report.bad.items()]


def drain(steps: Generator[Any, None, T]) -> T:
    """Run a generator to its end, and return its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def unreadable_error(where: str, total: int, bad: dict[int, DdimError], complete: bool = True) -> DdimError:
    """The error for the invalid images of a dataset.

    Args:
        where: The dataset's name.
        total: Number of its images.
        bad: The error of each invalid image.
        complete: Whether all images were tried.

    Returns:
        The error to raise: names and reasons of the first invalid images, the number of the others, and a hint.
    """
    least = "" if complete else "at least "
    misfits = [error for error in bad.values() if isinstance(error, MisfitError)]
    if misfits:
        problem = f"{least}{len(misfits)} of {total} images do not fit the resolution: {list_errors(misfits)}"
        return MisfitError(where, problem, misfits[0].hint)
    problem = f"{least}{len(bad)} of {total} images cannot be read: {list_errors(list(bad.values()))}"
    return DdimError(where, problem, either("remove them", "skip them with skip_unreadable=True"))


def list_errors(bad: Sequence[DdimError]) -> str:
    """The names and reasons of the first invalid images, and the number of the others."""
    shown = ", ".join(f"{error.subject} {error.problem}" for error in bad[:_SHOWN])
    return shown + (f", and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
