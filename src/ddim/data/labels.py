"""Class labels of a dataset, from folders or from a column of a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ddim.errors import DdimError, printable

DEFAULT = "label"
_SHOWN = 12  # columns named in a message


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a dataset.

    Attributes:
        numbers: Class indices, int64, (N,), or None.
        classes: The name of each class, or None.
        columns: Other columns of the table that could be labels.
    """

    numbers: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()

    def subset(self, indices: np.ndarray) -> Labels:
        """The labels of the images at the indices."""
        return self if self.numbers is None else replace(self, numbers=self.numbers[indices])


def read_column(datasets: Any, data: Any, images: str, name: str | None, where: str) -> Labels:
    """Read the labels of a table.

    Args:
        datasets: The `datasets` library.
        data: The table.
        images: The image column.
        name: The label column; None for `label`, if it exists.
        where: The table's name in an error.

    Returns:
        The labels; strings are converted to class indices. Without `name`, there are no labels if the column `label` is
        missing or does not hold labels.

    Raises:
        DdimError: If there is no such column, or it does not hold labels; the message lists possible columns.
    """
    candidates = [key for key, kind in data.features.items() if key != images and _can_be_labels(datasets, kind)]
    columns = tuple(printable(key) for key in candidates if key != (name or DEFAULT))
    if name is None and DEFAULT not in data.features:
        return Labels(columns=columns)
    column = name or DEFAULT
    alternatives = f"possible columns: {', '.join(columns[:_SHOWN])}" if columns else "no other column is possible"
    if column not in data.features or column == images:
        problem = "is not a label column" if column in data.features else "is not a column"
        raise DdimError(f"label_column={name!r}", f"{problem} of {where}; {alternatives}", "name another column")
    kind, values = data.features[column], data.data.column(column).to_pylist()
    if values and all(isinstance(value, str) for value in values):
        classes = tuple(sorted(set(values)))
        index_of = {word: index for index, word in enumerate(classes)}
        return Labels(np.array([index_of[word] for word in values], np.int64), classes, columns)
    if not all(type(value) is int and 0 <= value < 2**31 for value in values):
        if name is None:
            return Labels(columns=columns)
        wrong = next(value for value in values if not (type(value) is int and 0 <= value < 2**31))
        problem = f"contains {printable(repr(wrong))[:40]} in {where}, not an integer from 0 or a string"
        raise DdimError(f"label_column={name!r}", f"{problem}; {alternatives}", "name another column")
    names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    return Labels(np.array(values, np.int64), names, columns)


def missing_labels(columns: tuple[str, ...], otherwise: str) -> tuple[str, str]:
    """The problem and hint of an error for a dataset without labels that needs them.

    Args:
        columns: The columns that could be labels, `ImageSet.label_columns`; the user has to choose one.
        otherwise: The hint if there is no such column.
    """
    if not columns:
        return "has no labels", otherwise
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    problem = f"has no labels in a column {DEFAULT}; possible label columns: {', '.join(columns[:_SHOWN])}"
    return problem + more, f"name one of them, such as label_column={columns[0]!r}"


def _can_be_labels(datasets: Any, kind: Any) -> bool:
    """Whether a column's type is one that labels can have."""
    if isinstance(kind, datasets.ClassLabel):
        return True
    dtype = str(getattr(kind, "dtype", ""))
    return isinstance(kind, datasets.Value) and (dtype.startswith(("int", "uint")) or dtype.endswith("string"))
