"""Accumulates the moments of images' features, chunk by chunk, in a resumable file that is written atomically.

Chunks have a fixed size and are summed in order from the first image, so that the result is bit-identical however often
the computation was interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim._io.reading import entry
from ddim._io.safetensors import read_tensors, write_tensors
from ddim.data.parallel_decode import drain
from ddim.errors import DdimError, shorten, warn
from ddim.evaluation import moments
from ddim.evaluation.features import Extractor
from ddim.evaluation.moments import Moments

CHUNK = 64  # images
KEEP = 10_000  # largest number of features stored
SHOWN = 256  # largest number of images stored
SHOWN_BYTES = 16 << 20  # largest total size of the images stored
SAVE_EVERY = 20.0  # seconds
FORMAT = "ddim-gathering"

Make = Callable[[range], Iterable[np.ndarray]]
"""Function from a range of indices to its images in order: uint8 (B, H, W, C), with any batch sizes B."""


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Feature statistics of the first images of a source.

    Args:
        moments: Moments of the features of all images.
        features: Features of the first `KEEP` images, float32, (K, D).
        images: The first `SHOWN` images (fewer if they are large), uint8, (P, H, W, C).
        seconds: Time spent producing the timed images, without feature extraction.
        timed: Number of images that `seconds` covers.
    """

    moments: Moments
    features: Tensor
    images: np.ndarray
    seconds: float = 0.0
    timed: int = 0

    @property
    def count(self) -> int:
        """Number of images."""
        return self.moments.count

    def add(
        self, chunk: np.ndarray, features: Tensor, seconds: float | None = None, in_place: bool = False
    ) -> FeatureStats:
        """New statistics with one more chunk; with `in_place`, `self.moments` is updated in place and shared."""
        room = min(SHOWN, max(1, SHOWN_BYTES // chunk[0].size))
        return FeatureStats(
            (self.moments if in_place else self.moments.copy()).add(features),
            torch.cat([self.features, features[: max(0, KEEP - len(self.features))]]),
            np.concatenate([self.images, chunk[: max(0, room - len(self.images))]]),
            self.seconds + (seconds or 0.0),
            self.timed + (0 if seconds is None else len(chunk)),
        )


def iter_gather(
    make: Make,
    n: int,
    extractor: Extractor,
    path: Path | None = None,
    what: Mapping[str, Any] | None = None,
    timed: bool = True,
    every: float | None = None,
) -> Generator[int, None, FeatureStats]:
    """Extract the features of images 0..n - 1, resuming from a file.

    Args:
        make: Produces the images.
        n: Number of images.
        extractor: The feature extractor.
        path: File for the intermediate and final statistics; None for no file.
        what: Everything that determines the images; a file with different values is refused.
        timed: Whether to record the time spent producing the images.
        every: Seconds between two writes, `SAVE_EVERY` if None; closing the generator also writes.

    Yields:
        The number of images done: once before the first, then after each chunk.

    Returns:
        The statistics of the n images.

    Raises:
        DdimError: If the file is damaged or holds other images, or `make` produces another number of images.
    """
    if n < 1:
        raise DdimError(f"-n {n}", "is less than 1", "use 1 or more")
    settings = {**(what or {}), "extractor": {"name": extractor.name, "sha256": extractor.sha256}}
    whole, complete = _read(path, settings) if path is not None and path.exists() else (None, None)
    if complete is not None and complete.count >= n:
        yield n
        return _first(complete, n, path)
    start = saved = whole.count if whole else 0
    yield start
    last, pause = time.monotonic(), SAVE_EVERY if every is None else every
    try:
        for chunk, seconds in _chunks(make, start, n):
            features, spent = extractor(chunk), seconds if timed else None
            if whole is None:
                whole = FeatureStats(Moments(features.shape[1]), features[:0], chunk[:0])
            if len(chunk) < CHUNK:  # incomplete last chunk: stored separately, since a resume needs full chunks
                result = whole.add(chunk, features, spent)
                _write(path, settings, whole, (chunk, features))
                saved = whole.count
                yield n
                return result
            whole = whole.add(chunk, features, spent, in_place=True)
            if time.monotonic() - last > pause or whole.count == n:
                _write(path, settings, whole)
                last, saved = time.monotonic(), whole.count
            yield whole.count
    finally:
        if whole is not None and whole.count > saved:
            _write(path, settings, whole)
    assert whole is not None
    return whole


def gather(make: Make, n: int, extractor: Extractor) -> FeatureStats:
    """Run `iter_gather` to the end, without a file."""
    return drain(iter_gather(make, n, extractor))


def _chunks(make: Make, start: int, n: int) -> Iterator[tuple[np.ndarray, float]]:
    """The images in full chunks and a last, possibly smaller one, each with the seconds spent producing it."""
    pending, done, spent, start_time = np.empty(0), start, 0.0, time.monotonic()
    batches = iter(make(range(start, n)))
    for batch in batches:
        pending = np.concatenate([pending, batch]) if len(pending) else batch
        spent += time.monotonic() - start_time
        while len(pending) >= (size := min(CHUNK, n - done)) > 0:
            if done + size == n and (len(pending) > size or next(batches, None) is not None):
                raise DdimError("images", f"are more than {n}", f"yield exactly {n}")
            yield pending[:size], spent
            pending, done, spent = pending[size:], done + size, 0.0
        start_time = time.monotonic()
    if done != n:
        raise DdimError("images", f"are {done + len(pending)}, not {n}", f"yield exactly {n}")


def _first(stats: FeatureStats, n: int, path: Path | None) -> FeatureStats:
    """The statistics of the first n images of a file that holds n or more."""
    if stats.count == n:
        return stats
    if n > len(stats.features):
        stored = len(stats.features)
        problem = f"has {stats.count} images, with features of {stored} only"
        raise DdimError(path, problem, f"use at most {stored}, or at least {stats.count}")
    features = stats.features[:n]
    return replace(stats, moments=moments.of(features, CHUNK), features=features, images=stats.images[:n])


def _write(
    path: Path | None, request: Mapping[str, Any], whole: FeatureStats, tail: tuple[np.ndarray, Tensor] | None = None
) -> None:
    if path is None:
        return
    tensors = {"mean": whole.moments.mean, "scatter": whole.moments.scatter, "features": whole.features}
    tensors["pictures"] = torch.from_numpy(np.ascontiguousarray(whole.images))
    if tail is not None:
        tensors |= {"tail_pictures": torch.from_numpy(np.ascontiguousarray(tail[0])), "tail_features": tail[1]}
    meta = {"format": FORMAT, "version": 1, "what": request, "count": whole.count}
    write_tensors(path, tensors, {**meta, "seconds": whole.seconds, "timed": whole.timed})


def _fits(sums: Moments, features: Tensor, images: np.ndarray) -> bool:
    """Whether the content of a file has the shapes and dtypes that `_write` stores."""
    dim = features.shape[1:]
    sums_fit = sums.mean.shape == dim and sums.scatter.shape == 2 * dim and sums.count >= 0
    doubles = sums.mean.dtype == sums.scatter.dtype == torch.float64
    return sums_fit and doubles and features.ndim == 2 and images.ndim == 4 and images.dtype == np.uint8


def _read(path: Path, request: Mapping[str, Any]) -> tuple[FeatureStats | None, FeatureStats]:
    """The statistics in a file: of its full chunks, from which it can be resumed, and of all its images."""
    tensors, meta = read_tensors(path)
    again = "remove it to compute it again"
    if meta.get("format") != FORMAT or meta.get("version") != 1:
        raise DdimError(path, "is not an evaluation file of this version", again)
    was, now = dict(entry(meta, "what", dict, path, hint=again)), json.loads(json.dumps(request))
    count, timed = (entry(meta, key, int, path, hint=again) for key in ("count", "timed"))
    try:
        features, images = tensors["features"], tensors["pictures"].numpy()
        sums = Moments(features.shape[1], count, tensors["mean"], tensors["scatter"])
        if not _fits(sums, features, images):
            raise ValueError
        whole = FeatureStats(sums, features, images, entry(meta, "seconds", float, path, hint=again), timed)
    except (KeyError, TypeError, ValueError, IndexError):
        raise DdimError(path, "is not an evaluation file of this version", again) from None
    software = was.pop("software", None), now.pop("software", None)
    if was != now:
        key = next(key for key in {**was, **now} if was.get(key) != now.get(key))
        raise DdimError(path, f"is of other images: {key} is {shorten(str(was.get(key)))}, not {now.get(key)}", again)
    if software[0] != software[1]:
        warn(f"{path.name}: was started with {software[0]} and is resumed with {software[1]}; last bits may differ")
    if not all(torch.isfinite(part).all() for part in (sums.mean, sums.scatter, features)):
        raise DdimError(path, "has numbers that are not finite", again)
    if "tail_features" not in tensors:
        return whole, whole
    return whole if whole.count else None, whole.add(tensors["tail_pictures"].numpy(), tensors["tail_features"])
