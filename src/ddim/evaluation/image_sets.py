"""Images from any source (a model, folder, dataset, array or iterable) as an `ImageSource` that can be measured."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.data import ImageSet
from ddim.data.parallel_decode import drain
from ddim.data.pixels import to_uint8
from ddim.errors import DdimError, either
from ddim.evaluation.accumulate import CHUNK, FeatureStats, Make, iter_gather
from ddim.evaluation.features import Extractor
from ddim.evaluation.sample_folder import generate, identity, read_sheet
from ddim.evaluation.statistics import Protocol, Statistics
from ddim.model.model import Model
from ddim.plan.base import BasePlan
from ddim.process.rng import permutation
from ddim.sampling.microbatch import Label, labels_of

Arrays = np.ndarray | Tensor
FARTHEST = 3.0  # samples overshoot [-1, 1] a little; a larger magnitude means another value range


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A countable source that produces images in order.

    Args:
        name: Display name.
        count: Number of images; for samples, the number requested.
        make: Function that produces the images of a range of indices, uint8 (B, H, W, C).
        what: Everything that determines the images; verified when a measurement is resumed.
        grid: Resolution and channels, such as "28x28x1".
        split: Split of a dataset; "" if it has none.
        fingerprint: Content hash that distinguishes datasets of the same name.
        resize: How images are resized to that resolution; "" if they never are.
        timed: Whether the time `make` takes is the time of sampling.
    """

    name: str
    count: int
    make: Make
    what: dict[str, Any]
    grid: str
    split: str = ""
    fingerprint: str = ""
    resize: str = ""
    timed: bool = True


def from_data(dataset: ImageSet) -> ImageSource:
    """A dataset or a folder of images, in a fixed shuffled order that mixes its classes."""
    order = permutation(0, 0, len(dataset))

    def make(indices: range) -> Iterator[np.ndarray]:
        for first in range(indices.start, indices.stop, 512):
            yield dataset.batch(order[first : min(first + 512, indices.stop)])

    policy, digest = dataset.policy, dataset.fingerprint()
    what = {"data": dataset.name, "split": dataset.split, "fingerprint": digest, "count": len(dataset)}
    what |= {"policy": policy.model_dump()}
    height, width, channels = policy.shape
    grid = f"{height}x{width}x{channels}"
    resize = "" if policy.fit == "exact" else f"{policy.fit}, {policy.filter}"
    return ImageSource(dataset.name, len(dataset), make, what, grid, dataset.split, digest, resize)


def from_model(
    model: Model,
    plan: BasePlan[Any],
    n: int,
    seed: int = 0,
    name: str = "",
    label: Label = None,
    folder: Path | None = None,
) -> ImageSource:
    """Samples 0..n - 1 of a run, as 8-bit images.

    Args:
        model: The model.
        plan: The sampling plan.
        n: Number of samples.
        seed: The run's seed.
        name: The model's name.
        label: Class labels for a conditional model, see `ddim.sampling.microbatch.Label`.
        folder: Samples folder to write to; samples already in it are reused. None for no files.

    Raises:
        DdimError: If the plan does not fit the model.
    """
    model.check_plan(plan, to_clean=True)
    classes = model.config.network.classes
    first = labels_of(label, range(1), classes)
    model.denoiser(None if first is None else torch.tensor(first))
    model.noise(1, seed)

    def make(indices: range) -> Iterator[np.ndarray]:
        labels = labels_of(label, indices, classes)
        for block in model.sample_blocks(plan, indices, seed, labels):
            if not torch.isfinite(block).all():
                raise DdimError(
                    "samples", "have values that are not finite", either("use another grid", "use dtype='float32'")
                )
            yield np.stack(model.kind.render(block))

    def make_stored(indices: range) -> Iterator[np.ndarray]:
        assert folder is not None
        for first in range(indices.start, indices.stop, CHUNK):
            n = min(CHUNK, indices.stop - first)
            for _ in generate(model, plan, folder, n, first, seed, name, n, label):
                pass
            yield read_sheet(folder, range(first, first + n))

    height, width, channels = model.shape[1], model.shape[2], model.shape[0]
    what = {"seed": seed, "label": label, **identity(model, plan, "")}
    grid = f"{height}x{width}x{channels}"
    return ImageSource(f"{name} {plan.name}", n, make_stored if folder else make, what, grid, timed=folder is None)


def from_arrays(images: Arrays | Iterable[Arrays], name: str = "images") -> ImageSource:
    """The images of an array or of an iterable of arrays, which is read once into memory.

    Args:
        images: uint8 (N, H, W, C), or float (N, C, H, W) in [-1, 1]; or an iterable of such arrays.
        name: Display name.

    Raises:
        DdimError: If there are no images, their sizes differ, or an array has another dtype, shape or value range.
    """
    parts = [images] if isinstance(images, np.ndarray | Tensor) else [*images]
    arrays = [_as_uint8(part) for part in parts]
    if not sum(map(len, arrays)):
        raise DdimError(name, "has no images", "pass at least two")
    if len({part.shape[1:] for part in arrays}) > 1:
        shapes = ", ".join(sorted({"x".join(map(str, part.shape[1:])) for part in arrays}))
        raise DdimError(name, f"has images of several sizes ({shapes})", "resize them to one size first")
    whole = np.concatenate(arrays)
    height, width, channels = whole.shape[1:]
    make: Callable[[range], list[np.ndarray]] = lambda indices: [whole[indices.start : indices.stop]]  # noqa: E731
    return ImageSource(name, len(whole), make, {"data": name}, f"{height}x{width}x{channels}")


def _as_uint8(part: Arrays) -> np.ndarray:
    if (isinstance(part, Tensor) and part.is_floating_point()) or part.dtype in (np.float32, np.float64):
        floats = torch.as_tensor(part)
        if floats.ndim == 4 and torch.isfinite(floats).all():
            if len(floats) and floats.abs().max() > FARTHEST:
                problem = f"reach {float(floats.abs().max()):g}, outside [-1, 1]"
                raise DdimError("images", problem, "divide by 127.5 and subtract 1, or pass uint8")
            return to_uint8(floats)
        raise DdimError("images", f"are {tuple(floats.shape)}, or not finite", "pass (N, C, H, W) in [-1, 1]")
    array = part.numpy() if isinstance(part, Tensor) else np.asarray(part)
    if array.dtype != np.uint8 or array.ndim != 4:
        problem = f"are {array.dtype} {array.shape}"
        raise DdimError("images", problem, "pass uint8 (N, H, W, C), or float (N, C, H, W) in [-1, 1]")
    return array


def protocol(images: ImageSource, extractor: Extractor, count: int) -> Protocol:
    """The protocol of statistics of `count` images."""
    return Protocol(
        data=images.name,
        split=images.split,
        fingerprint=images.fingerprint,
        count=count,
        grid=images.grid,
        resize=images.resize,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
    )


def iter_measure(
    images: ImageSource, extractor: Extractor, path: Path | None = None
) -> Generator[int, None, tuple[Statistics, FeatureStats]]:
    """Statistics of a source of images, resumed from a file if `path` is given.

    Yields the number of images done; see `ddim.evaluation.accumulate.iter_gather`.
    """
    stats = yield from iter_gather(images.make, images.count, extractor, path, images.what, images.timed)
    return Statistics(stats.moments, stats.features, protocol(images, extractor, stats.count)), stats


def measure(
    images: ImageSource | ImageSet | Arrays | Iterable[Arrays], extractor: Extractor, name: str = "images"
) -> Statistics:
    """Feature statistics of images from any source.

    Args:
        images: An `ImageSource`, a dataset, an array, or an iterable of arrays.
        extractor: The feature extractor, see `ddim.evaluation.extractors.load`.
        name: Display name of arrays.

    Raises:
        DdimError: If they are not images that the extractor accepts.
    """
    if isinstance(images, ImageSet):
        images = from_data(images)
    elif not isinstance(images, ImageSource):
        images = from_arrays(images, name)
    statistics, _ = drain(iter_measure(images, extractor))
    return statistics
