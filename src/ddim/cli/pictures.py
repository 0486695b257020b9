"""The pictures of a command's IMAGES arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddim.errors import DdimError, say

if TYPE_CHECKING:
    from ddim.data import ImagePolicy
    from ddim.model import Model
    from ddim.token_model import TokenModel


def read_pictures(
    images: tuple[str, ...], policy: ImagePolicy, split: str | None, limit: int | None
) -> tuple[np.ndarray, list[str]]:
    """Picture files, or one data set, on the model's grid.

    Args:
        images: Picture files; or one folder, parquet file, hub name or "digits".
        policy: The model's.
        split: Which part of a data set.
        limit: At most so many.

    Returns:
        uint8, (N, H, W, C), and a name for each.

    Raises:
        DdimError: If something cannot be read.
    """
    from ddim import data

    if limit is not None and limit < 1:
        raise DdimError(f"--limit {limit}", "is less than 1", "give 1 or more, or leave it out")
    suffix = Path(images[0]).suffix.lower()
    alone = len(images) == 1
    if alone and images[0] == "digits" and policy.shape == (28, 28, 1):
        found = data.digits_as_mnist(split or "train", limit)
    elif alone and (Path(images[0]).is_dir() or suffix in ("", ".parquet")):
        found = data.load(images[0], policy, split or "train", limit)
    else:
        if split is not None:
            raise DdimError("--split", "goes with a data set, not with picture files", "leave it out")
        chosen = images[:limit]
        return np.stack([open_said(Path(name), policy) for name in chosen]), list(chosen)
    return found.batch(range(len(found))), [found.names(i) for i in range(len(found))]


def read_items(
    data: tuple[str, ...], model: Model | TokenModel, split: str | None, limit: int | None
) -> tuple[np.ndarray, list[str]]:
    """What a model's likelihood is measured of: its pictures, or the sequences of its text, one after another.

    Args:
        data: As `read_pictures`; or one text.
        model: The model.
        split: Which part of a data set.
        limit: At most so many.

    Returns:
        uint8, (N, H, W, C), or int64, (N, L), and a name for each.

    Raises:
        DdimError: If something cannot be read.
    """
    from ddim.data.text import TextPolicy, load_text

    policy = model.config.data
    if not isinstance(policy, TextPolicy):
        return read_pictures(data, policy, split, limit)
    if limit is not None and limit < 1:
        raise DdimError(f"--limit {limit}", "is less than 1", "give 1 or more, or leave it out")
    if len(data) > 1:
        raise DdimError(f"{len(data)} files", "are given, a text is one", "give one file or folder")
    found = load_text(data[0], policy, split or "train")
    items = found.apart()
    if (left := len(found.ids) - items.size) and limit is None:
        say(f"{found.name}: the last {left} tokens, less than a sequence, are left out")
    names = [f"{found.name}[{i * policy.length}:{(i + 1) * policy.length}]" for i in range(len(items))]
    return items[:limit], names[:limit]


def open_said(path: Path, policy: ImagePolicy) -> np.ndarray:
    """A picture file on the model's grid, uint8 (H, W, C); another size or kind of its own is said."""
    from ddim.data import open_picture
    from ddim.data.pictures import natural_policy

    own = natural_policy(path)
    changed = [f"{own.width}x{own.height} brought to {policy.width}x{policy.height}"]
    changed = changed if (own.width, own.height) != (policy.width, policy.height) else []
    if own.channels > policy.channels:
        changed.append("colour reduced to grey")
    if changed:
        say(f"{path}: {', '.join(changed)}")
    return open_picture(path, policy)
