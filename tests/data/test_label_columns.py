"""Labels in a column of any name: taken where it is named, and never chosen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_kit import picture
from PIL import Image

from ddim.data import load
from ddim.data.labels import complaint
from ddim.errors import DdimError

FINE, COARSE = [0, 1, 2, 5, 2, 1], [0, 0, 1, 1, 1, 0]


def cell(index: int) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(picture(index, 8, 8, 1).squeeze()).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def table(library: Any, path: Path, **columns: list[Any]) -> Path:
    features = {"img": library.Image()}
    kinds = {"class": library.ClassLabel(names=["a", "b"])}
    for key, values in columns.items():
        kind = "string" if isinstance(values[0], str) else "float64" if isinstance(values[0], float) else "int64"
        features[key] = kinds.get(key, library.Value(kind))
    rows = {"img": [cell(i) for i in range(6)], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    library.Dataset.from_dict(rows, features=library.Features(features)).to_parquet(path)
    return path


@pytest.fixture
def hundred(library: Any, tmp_path: Path) -> Path:
    """Columns as CIFAR-100 has them, and one that no label is."""
    return table(library, tmp_path / "c100" / "train-0.parquet", fine_label=FINE, coarse_label=COARSE, weight=[0.5] * 6)


def test_none_is_chosen_and_all_are_named(hundred: Path) -> None:
    found = load(hundred)
    assert found.labels is None
    assert found.label_columns == ("fine_label", "coarse_label")
    wrong, hint = complaint(found.label_columns, "otherwise")
    assert "fine_label, coarse_label" in wrong
    assert "label_column='fine_label'" in hint
    assert complaint((), "otherwise") == ("has no labels", "otherwise")


def test_a_single_other_column_is_not_chosen_either(library: Any, tmp_path: Path) -> None:
    found = load(table(library, tmp_path / "a.parquet", digit=FINE))
    assert (found.labels, found.label_columns) == (None, ("digit",))


def test_a_named_column_is_taken(library: Any, hundred: Path, tmp_path: Path) -> None:
    assert load(hundred, label_column="fine_label").labels.tolist() == FINE
    assert load(hundred, label_column="coarse_label").labels.tolist() == COARSE
    assert load(hundred, label_column="coarse_label", limit=3).labels.tolist() == COARSE[:3]
    assert len({load(hundred, label_column=name).fingerprint() for name in (None, "fine_label", "coarse_label")}) == 3
    words = table(library, tmp_path / "w.parquet", kind=["b", "a", "b", "a", "c", "c"], label=COARSE)
    assert load(words).labels.tolist() == COARSE
    found = load(words, label_column="kind")
    assert (found.labels.tolist(), found.classes, found.label_columns) == (
        [1, 0, 1, 0, 2, 2],
        ("a", "b", "c"),
        ("label",),
    )
    known = table(library, tmp_path / "k.parquet", **{"class": COARSE})
    assert load(known, label_column="class").classes == ("a", "b")


@pytest.mark.parametrize("wrong", ["fine", "img", "weight", ""])
def test_what_is_no_column_of_labels_is_refused(hundred: Path, wrong: str) -> None:
    with pytest.raises(DdimError, match="coarse_label"):
        load(hundred, label_column=wrong)


@pytest.mark.parametrize("values", [[1, None, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0], [2**40, 0, 0, 0, 0, 0]])
def test_a_column_with_gaps_or_other_numbers_is_refused(library: Any, tmp_path: Path, values: list[Any]) -> None:
    path = table(library, tmp_path / "a.parquet", kind=values)
    assert load(path).labels is None
    with pytest.raises(DdimError):
        load(path, label_column="kind")


def test_what_is_no_table_has_no_columns(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    for source in (tmp_path, "digits"):
        with pytest.raises(DdimError):
            load(source, label_column="label")
