"""Label columns of any name: used only if they are named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_kit import random_image
from PIL import Image

from ddim.data import load
from ddim.data.labels import missing_labels
from ddim.errors import DdimError

FINE, COARSE = [0, 1, 2, 5, 2, 1], [0, 0, 1, 1, 1, 0]


def cell(index: int) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(random_image(index, 8, 8, 1).squeeze()).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def table(library: Any, path: Path, **columns: list[Any]) -> Path:
    features = {"img": library.Image()}
    types = {"class": library.ClassLabel(names=["a", "b"])}
    for key, values in columns.items():
        kind = "string" if isinstance(values[0], str) else "float64" if isinstance(values[0], float) else "int64"
        features[key] = types.get(key, library.Value(kind))
    rows = {"img": [cell(i) for i in range(6)], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    library.Dataset.from_dict(rows, features=library.Features(features)).to_parquet(path)
    return path


@pytest.fixture
def cifar100(library: Any, tmp_path: Path) -> Path:
    """The label columns of CIFAR-100, and a column that cannot hold labels."""
    return table(library, tmp_path / "c100" / "train-0.parquet", fine_label=FINE, coarse_label=COARSE, weight=[0.5] * 6)


def test_without_a_name_no_column_is_used_and_all_are_listed(cifar100: Path) -> None:
    images = load(cifar100)
    assert images.labels is None
    assert images.label_columns == ("fine_label", "coarse_label")
    problem, hint = missing_labels(images.label_columns, "otherwise")
    assert "fine_label, coarse_label" in problem
    assert "label_column='fine_label'" in hint
    assert missing_labels((), "otherwise") == ("has no labels", "otherwise")


def test_a_single_other_column_is_not_used_either(library: Any, tmp_path: Path) -> None:
    images = load(table(library, tmp_path / "a.parquet", digit=FINE))
    assert (images.labels, images.label_columns) == (None, ("digit",))


def test_a_named_column_is_used(library: Any, cifar100: Path, tmp_path: Path) -> None:
    assert load(cifar100, label_column="fine_label").labels.tolist() == FINE
    assert load(cifar100, label_column="coarse_label").labels.tolist() == COARSE
    assert load(cifar100, label_column="coarse_label", limit=3).labels.tolist() == COARSE[:3]
    assert len({load(cifar100, label_column=name).fingerprint() for name in (None, "fine_label", "coarse_label")}) == 3
    words = table(library, tmp_path / "w.parquet", kind=["b", "a", "b", "a", "c", "c"], label=COARSE)
    assert load(words).labels.tolist() == COARSE
    images = load(words, label_column="kind")
    assert (images.labels.tolist(), images.classes, images.label_columns) == (
        [1, 0, 1, 0, 2, 2],
        ("a", "b", "c"),
        ("label",),
    )
    numbers = table(library, tmp_path / "k.parquet", **{"class": COARSE})
    assert load(numbers, label_column="class").classes == ("a", "b")


@pytest.mark.parametrize("wrong", ["fine", "img", "weight", ""])
def test_a_column_without_labels_is_an_error(cifar100: Path, wrong: str) -> None:
    with pytest.raises(DdimError, match="coarse_label"):
        load(cifar100, label_column=wrong)


@pytest.mark.parametrize("values", [[1, None, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0], [2**40, 0, 0, 0, 0, 0]])
def test_a_column_with_gaps_or_invalid_numbers_is_an_error(library: Any, tmp_path: Path, values: list[Any]) -> None:
    path = table(library, tmp_path / "a.parquet", kind=values)
    assert load(path).labels is None
    with pytest.raises(DdimError):
        load(path, label_column="kind")


def test_label_column_is_an_error_for_data_without_columns(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    for source in (tmp_path, "digits"):
        with pytest.raises(DdimError):
            load(source, label_column="label")
