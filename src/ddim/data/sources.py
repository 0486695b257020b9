"""Loading of image datasets: scikit-learn's digits, a folder, parquet files, or a dataset of the hub."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import numpy as np

from ddim.data.digits import load_digits
from ddim.data.image import MisfitError, list_files, list_images, natural_policy
from ddim.data.image_set import ImageSet
from ddim.data.labels import Labels
from ddim.data.parallel_decode import DecodeReport, Files, Items, Picked, complaint, drain, gather, named
from ddim.data.parquet import Rows, read_hub, read_parquet
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError, printable, warn

HOLD = 2 << 30  # maximum bytes of pixels in memory; a larger dataset is decoded batch by batch
PATIENCE = 1000  # decoding stops after more than this number of unreadable images
SPLITS = ("train", "test", "validation", "valid", "val", "dev")

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_Found = tuple[Items, Labels]


def load(
    source: str | Path,
    policy: ImagePolicy | None = None,
    split: str = "train",
    limit: int | None = None,
    skip_unreadable: bool = False,
    label_column: str | None = None,
) -> ImageSet:
    """Load an image dataset; every image is decoded once, so that invalid ones are found now.

    A source is one of:

    - "digits": scikit-learn's 8x8 digits, "train" the first 1,500 and "test" the other 297;
    - a folder of images. If it has a folder `train` or `test`, its folders are the splits, otherwise all of it is
      "train". If every image is in a folder one level down, those folders are the classes;
    - a parquet file, or a folder of them. A shard's split is the first word of its name, or its folder
      (train-00000-of-00003.parquet, test/0000.parquet), otherwise "train";
    - "owner/name", a dataset of the Hugging Face hub.

    A dataset of up to 2 GiB of pixels is kept in memory; a larger one is decoded batch by batch.

    Args:
        source: The source.
        policy: The preprocessing; by default the first image's size and channels, which the others must share.
        split: The split.
        limit: Maximum number of images, the first ones.
        skip_unreadable: Leave out images that cannot be read, instead of raising.
        label_column: The label column of a table; by default `label`, if it exists. `ImageSet.label_columns` lists the
            other possible columns.

    Returns:
        The dataset, in an order that depends on names or rows only.

    Raises:
        DdimError: If there is no such source, split or label column, it has no images, or some cannot be read or do not
            fit the policy; the message names them.

    Warns:
        DdimWarning: If images were converted or left out.
    """
    return drain(iter_load(source, policy, split, limit, skip_unreadable, label_column))


def iter_load(
    source: str | Path,
    policy: ImagePolicy | None = None,
    split: str = "train",
    limit: int | None = None,
    skip_unreadable: bool = False,
    label_column: str | None = None,
) -> Generator[tuple[int, int], None, ImageSet]:
    """As `load`, with progress.

    Args:
        source: The source.
        policy: The preprocessing.
        split: The split.
        limit: Maximum number of images.
        skip_unreadable: Leave out images that cannot be read.
        label_column: The label column.

    Yields:
        The number of images decoded, and the total.

    Returns:
        The dataset.

    Raises:
        DdimError: As `load`.
    """
    if limit is not None and limit < 1:
        raise DdimError("limit", f"is {limit}", "give a whole number of at least 1, or none")
    if source == "digits":
        _no_columns("digits", label_column)
        return load_digits(policy, split, limit)
    path = Path(source).expanduser().absolute()
    where = printable(source)
    if path.exists():
        name = path.resolve().name
        items, labels = _local(path, where, split, label_column)
    elif isinstance(source, str) and _HUB.fullmatch(source):
        name = source
        items, labels = read_hub(source, split, label_column)
    else:
        raise DdimError(where, "no such file or folder", "check the path, or give owner/name for the hub")
    items, labels = _full(items, labels, where, skip_unreadable)
    if limit is not None and limit < len(items):
        items = Picked(items, np.arange(limit))
        labels = labels.of(np.arange(limit))
    preprocessing = policy or _first_policy(items, where)
    keep = len(items) * preprocessing.height * preprocessing.width * preprocessing.channels <= HOLD
    report = yield from gather(items, preprocessing, keep, None if skip_unreadable else PATIENCE)
    pixels = report.pixels
    if report.bad:
        items, good = _without(items, report, where, skip_unreadable)
        pixels = None if pixels is None else pixels[good]
        labels = labels.of(good)
    report.adjusted.warn(where, len(items), preprocessing)
    return ImageSet(name, split, preprocessing, items, pixels, labels.numbers, labels.classes, labels.columns)


def _local(path: Path, where: str, split: str, label_column: str | None) -> _Found:
    if path.is_dir():
        shards, images = list_files(path, frozenset({".parquet"})), list_images(path)
        if shards and images:
            problem = "holds both parquet files and pictures"
            raise DdimError(where, problem, "give a folder or a parquet file inside it")
        if images:
            _no_columns(where, label_column)
            return _folder(path, where, split)
        if not shards:
            raise DdimError(where, "holds no pictures", "give a folder of PNG or JPEG files or of parquet files")
    elif path.suffix.lower() == ".parquet":
        shards = [path]
    else:
        raise DdimError(where, "is neither a folder nor a parquet file", "give the folder that holds the pictures")
    by_split = dict[str, list[Path]]()
    for shard in shards:
        by_split.setdefault(_split_of(shard, path), []).append(shard)
    _need(where, split, list(by_split))
    return read_parquet(by_split[split], where, split, label_column)


def _folder(path: Path, where: str, split: str) -> _Found:
    inside = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if {"train", "test"} & set(inside) and set(inside) <= set(SPLITS):
        _need(where, split, inside)
        path = path / split
    else:
        _need(where, split, ["train"])
    paths = list_images(path)
    if not paths:
        raise DdimError(f"{where}/{split}", "holds no pictures", "put PNG or JPEG files in it")
    parents = [image.relative_to(path).parts[:-1] for image in paths]
    if not all(len(parts) == 1 for parts in parents):
        return Files(path, paths), Labels()
    classes = sorted({parts[0] for parts in parents})
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[parts[0]] for parts in parents], np.int64)
    return Files(path, paths), Labels(labels, tuple(map(printable, classes)))


def _split_of(shard: Path, root: Path) -> str:
    word = re.match(r"[A-Za-z]+(?=[-_.])", shard.name)
    if word and word[0].lower() in SPLITS:
        return word[0].lower()
    inside = shard.relative_to(root).parts[:-1] if root.is_dir() else ()
    return next((part for part in reversed(inside) if part in SPLITS), "train")


def _need(where: str, split: str, there: list[str]) -> None:
    if split not in there:
        raise DdimError(where, f"has no split {split!r}", f"use one of {', '.join(sorted(there))}")


def _no_columns(where: str, label_column: str | None) -> None:
    if label_column is not None:
        problem = f"has no columns: {where} is no table"
        raise DdimError(f"label_column={label_column!r}", problem, "leave it out")


def _full(items: Items, labels: Labels, where: str, skip: bool) -> _Found:
    """Leave out the rows of a table without an image, if there are many; raises unless they may be skipped."""
    empty = items.empty() if isinstance(items, Rows) else np.empty(0, np.int64)
    if len(empty) <= PATIENCE:
        return items, labels  # a few are reported by name when they are decoded
    problem = f"{len(empty)} of {len(items)} rows hold no picture, the first of them {items.name(int(empty[0]))}"
    if not skip or len(empty) == len(items):
        raise DdimError(where, problem, "fetch it again, or store encoded pictures in it")
    warn(f"{where}: left out: {problem}")
    good = np.setdiff1d(np.arange(len(items)), empty)
    return Picked(items, good), labels.of(good)


def _first_policy(items: Items, where: str) -> ImagePolicy:
    """The natural policy of the first valid image."""
    bad = dict[int, DdimError]()
    for index in range(len(items)):
        try:
            return natural_policy(items.source(index), items.name(index))
        except DdimError as error:
            bad[index] = error
        if len(bad) > PATIENCE:
            break
    raise DdimError(where, f"no picture can be read: {named(list(bad.values()))}", "give sound PNG or JPEG files")


def _without(items: Items, found: DecodeReport, where: str, skip: bool) -> tuple[Items, np.ndarray]:
    """Leave out the invalid images, with a warning, or raise: the other items and their indices."""
    bad = found.bad
    if not skip or any(isinstance(error, MisfitError) for error in bad.values()):
        raise complaint(where, len(items), bad, found.whole)
    if len(bad) == len(items):
        problem = f"no picture can be read: {named(list(bad.values()))}"
        raise DdimError(where, problem, "give sound PNG or JPEG files")
    warn(f"{where}: {len(bad)} of {len(items)} pictures left out: {named(list(bad.values()))}")
    good = np.setdiff1d(np.arange(len(items)), np.fromiter(bad, np.int64))
    return Picked(items, good), good
