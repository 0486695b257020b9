"""Reading the images or text of a command's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddim.cli._datasets import refit
from ddim.errors import DdimError, warn

if TYPE_CHECKING:
    from ddim.data import ImagePolicy
    from ddim.model.model import Model


def read_images(
    images: tuple[str, ...], policy: ImagePolicy, split: str | None, limit: int | None
) -> tuple[np.ndarray, list[str]]:
    """Read image files, or one data set, at the model's resolution.

    Args:
        images: Image files; or one folder, parquet file, hub name or "digits".
        policy: The model's data policy.
        split: Split of a data set; "train" if None.
        limit: Maximum number of images; all if None.

    Returns:
        The images, uint8, (N, H, W, C), and a name for each.

    Raises:
        DdimError: If an image cannot be read, or `split` is passed with image files.
    """
    from ddim import data
    from ddim.data.adjustments import Report
    from ddim.data.image import read_image

    suffix = Path(images[0]).suffix.lower()
    single = len(images) == 1
    if single and images[0] == "digits" and policy.shape == (28, 28, 1):
        dataset = data.digits_as_mnist(split or "train", limit)
    elif single and (Path(images[0]).is_dir() or suffix in ("", ".parquet")):
        dataset = data.load(images[0], policy, split or "train", limit)
    else:
        if split is not None:
            raise DdimError("--split", "applies to data sets, not to image files", "leave it out")
        files = images[:limit]
        adjustments = Report()
        arrays = np.stack([read_image(Path(name), policy, adjusted=adjustments)[0] for name in files])
        adjustments.warn(files[0] if len(files) == 1 else f"{len(files)} files", len(files), policy, alone=True)
        return arrays, list(files)
    return dataset.batch(range(len(dataset))), [dataset.names(i) for i in range(len(dataset))]


def read_items(
    data: tuple[str, ...], model: Model, split: str | None, limit: int | None, fit: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """Read the items whose likelihood is measured: images, or consecutive sequences of a text.

    Args:
        data: As for `read_images`; or one text.
        model: The model.
        split: Split of a data set; "train" if None.
        limit: Maximum number of items; all if None.
        fit: The value of --fit, for images.

    Returns:
        Images, uint8, (N, H, W, C), or tokens, int64, (N, L), and a name for each item.

    Raises:
        DdimError: If an item cannot be read, or more than one text is passed.
    """
    from ddim.data.text import TextPolicy, load_text

    policy = refit(model.config.data, fit)
    if not isinstance(policy, TextPolicy):
        return read_images(data, policy, split, limit)
    if len(data) > 1:
        raise DdimError(f"{len(data)} files", "are more than one text", "use one file or folder")
    text = load_text(data[0], policy, split or "train")
    items = text.non_overlapping()
    if (remainder := len(text.ids) - items.size) and limit is None:
        warn(f"{text.name}: tokens after the last whole sequence are left out ({remainder})")
    names = [f"{text.name}[{i * policy.length}:{(i + 1) * policy.length}]" for i in range(len(items))]
    return items[:limit], names[:limit]


def open_with_warnings(path: Path, policy: ImagePolicy) -> np.ndarray:
    """Read an image file at the model's resolution, uint8 (H, W, C); warn about lossy changes."""
    from ddim.data.adjustments import Report
    from ddim.data.image import read_image

    adjustments = Report()
    image, _ = read_image(path, policy, adjusted=adjustments)
    adjustments.warn(str(path), 1, policy, alone=True)
    return image
