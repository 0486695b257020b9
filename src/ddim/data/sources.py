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
from ddim.data.parallel_decode import (
    DecodeReport,
    Files,
    Items,
    Subset,
    decode_all,
    drain,
    list_errors,
    unreadable_error,
)
from ddim.data.parquet import Rows, read_hub, read_parquet
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError, printable, warn

MAX_BYTES = 2 << 30  # maximum bytes of pixels in memory; a larger dataset is decoded batch by batch
MAX_UNREADABLE = 1000  # decoding stops after more than this number of unreadable images
SPLITS = ("train", "test", "validation", "valid", "val", "dev")

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_Table = tuple[Items, Labels]


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
        raise DdimError("limit", f"is {limit}", "use an integer from 1, or None")
    if source == "digits":
        _check_no_column("digits", label_column)
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
    items, labels = _skip_empty_rows(items, labels, where, skip_unreadable)
    if limit is not None and limit < len(items):
        items = Subset(items, np.arange(limit))
        labels = labels.subset(np.arange(limit))
    preprocessing = policy or _first_policy(items, where)
    keep = len(items) * preprocessing.height * preprocessing.width * preprocessing.channels <= MAX_BYTES
    report = yield from decode_all(items, preprocessing, keep, None if skip_unreadable else MAX_UNREADABLE)
    pixels = report.pixels
    if report.bad:
        items, valid = _skip_unreadable(items, report, where, skip_unreadable)
        pixels = None if pixels is None else pixels[valid]
        labels = labels.subset(valid)
    report.adjusted.warn(where, len(items), preprocessing)
    return ImageSet(name, split, preprocessing, items, pixels, labels.numbers, labels.classes, labels.columns)


def _local(path: Path, where: str, split: str, label_column: str | None) -> _Table:
    if path.is_dir():
        shards, images = list_files(path, frozenset({".parquet"})), list_images(path)
        if shards and images:
            problem = "contains both parquet files and images"
            raise DdimError(where, problem, "pass a folder or a parquet file inside it")
        if images:
            _check_no_column(where, label_column)
            return _folder(path, where, split)
        if not shards:
            raise DdimError(where, "contains no images", "pass a folder of PNG, JPEG or parquet files")
    elif path.suffix.lower() == ".parquet":
        shards = [path]
    else:
        raise DdimError(where, "is neither a folder nor a parquet file", "pass the folder of the images")
    by_split = dict[str, list[Path]]()
    for shard in shards:
        by_split.setdefault(_split_of(shard, path), []).append(shard)
    _check_split(where, split, list(by_split))
    return read_parquet(by_split[split], where, split, label_column)


def _folder(path: Path, where: str, split: str) -> _Table:
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if {"train", "test"} & set(folders) and set(folders) <= set(SPLITS):
        _check_split(where, split, folders)
        path = path / split
    else:
        _check_split(where, split, ["train"])
    paths = list_images(path)
    if not paths:
        raise DdimError(f"{where}/{split}", "contains no images", "put PNG or JPEG files in it")
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


def _check_split(where: str, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise DdimError(where, f"has no split {split!r}", f"use one of {', '.join(sorted(splits))}")


def _check_no_column(where: str, label_column: str | None) -> None:
    if label_column is not None:
        problem = f"cannot be used: {where} is not a table"
        raise DdimError(f"label_column={label_column!r}", problem, "remove it")


def _skip_empty_rows(items: Items, labels: Labels, where: str, skip: bool) -> _Table:
    """Leave out the rows of a table without an image, if there are many; raises unless they may be skipped."""
    empty = items.empty() if isinstance(items, Rows) else np.empty(0, np.int64)
    if len(empty) <= MAX_UNREADABLE:
        return items, labels  # a few are reported by name when they are decoded
    problem = f"{len(empty)} of {len(items)} rows have no image, first {items.name(int(empty[0]))}"
    if not skip or len(empty) == len(items):
        raise DdimError(where, problem, "download it again, or store encoded images in it")
    warn(f"{where}: skipped: {problem}")
    valid = np.setdiff1d(np.arange(len(items)), empty)
    return Subset(items, valid), labels.subset(valid)


def _first_policy(items: Items, where: str) -> ImagePolicy:
    """The natural policy of the first valid image."""
    bad = dict[int, DdimError]()
    for index in range(len(items)):
        try:
            return natural_policy(items.source(index), items.name(index))
        except DdimError as error:
            bad[index] = error
        if len(bad) > MAX_UNREADABLE:
            break
    raise DdimError(where, f"no image can be read: {list_errors(list(bad.values()))}", "use valid PNG or JPEG files")


def _skip_unreadable(items: Items, report: DecodeReport, where: str, skip: bool) -> tuple[Items, np.ndarray]:
    """Leave out the invalid images, with a warning, or raise: the other items and their indices."""
    bad = report.bad
    if not skip or any(isinstance(error, MisfitError) for error in bad.values()):
        raise unreadable_error(where, len(items), bad, report.complete)
    if len(bad) == len(items):
        problem = f"no image can be read: {list_errors(list(bad.values()))}"
        raise DdimError(where, problem, "use valid PNG or JPEG files")
    warn(f"{where}: {len(bad)} of {len(items)} images skipped: {list_errors(list(bad.values()))}")
    valid = np.setdiff1d(np.arange(len(items)), np.fromiter(bad, np.int64))
    return Subset(items, valid), valid
