from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_kit import exact, random_image
from PIL import Image

from ddim.data import ImagePolicy, load, sources
from ddim.errors import DdimError, DdimWarning


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(out, "PNG")
    return out.getvalue()


def write(library: Any, path: Path, rows: int = 5, column: str = "image", start: int = 0, **more: Any) -> Path:
    """A parquet file of random images with seeds start, start + 1, ..., in the format of the hub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(random_image(start + index)), "path": None} for index in range(rows)]
    features = {column: library.Image(), **{key: kind for key, (kind, _) in more.items()}}
    columns = {column: cells, **{key: values for key, (_, values) in more.items()}}
    data = library.Dataset.from_dict(columns, features=library.Features(features))
    data.to_parquet(path)
    return path


def error_of(*arguments: object, **options: object) -> str:
    """The message of the error that `load` raises, on one line."""
    with pytest.raises(DdimError) as caught:
        load(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("column", ["image", "img", "photograph"])
def test_images_and_labels_survive_a_round_trip(
    library: Any, tmp_path: Path, column: str, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = library.ClassLabel(names=["cat", "dog"])
    write(
        library,
        tmp_path / "pets" / "train-00000-of-00001.parquet",
        column=column,
        label=(kind, [0, 1, 1, 0, 1]),
    )
    capfd.readouterr()
    before = sorted(tmp_path.rglob("*"))
    images = load(tmp_path / "pets")
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == before
    assert np.array_equal(images.batch(range(5)), np.stack([random_image(index) for index in range(5)]))
    assert (images.labels.tolist(), images.classes) == ([0, 1, 1, 0, 1], ("cat", "dog"))
    assert (images.name, images.split, images.policy) == ("pets", "train", exact(6, 6, 3))
    assert images.names(3).startswith("train[3]")


def test_shards_are_in_order_and_splits_are_separate(library: Any, tmp_path: Path) -> None:
    write(library, tmp_path / "train-00001-of-00002.parquet", 2, start=3)
    write(library, tmp_path / "train-00000-of-00002.parquet", 3)
    write(library, tmp_path / "data" / "test" / "0000.parquet", 2, start=7)
    train, test = load(tmp_path), load(tmp_path, split="test")
    assert np.array_equal(train.batch(range(5)), np.stack([random_image(index) for index in range(5)]))
    assert np.array_equal(test.batch(range(2)), np.stack([random_image(7), random_image(8)]))
    assert "'validation'" in error_of(tmp_path, split="validation")
    single = tmp_path / "train-00001-of-00002.parquet"
    assert np.array_equal(load(single).batch([0])[0], random_image(3))
    assert "train-00001-of-00002.parquet: " in error_of(single, split="test")


def test_encoded_bytes_are_decoded_like_image_files(library: Any, tmp_path: Path) -> None:
    deep = np.full((6, 6), 32896, np.uint16)
    data = library.Dataset.from_dict({"image": [{"bytes": png(deep), "path": None}]})
    data.to_parquet(tmp_path / "a.parquet")
    with pytest.warns(DdimWarning, match=r"\b16-bit\b"):
        images = load(tmp_path / "a.parquet")
    assert (images.batch([0]) == 128).all()


def test_plain_binary_cells(library: Any, tmp_path: Path) -> None:
    data = library.Dataset.from_dict({"image": [png(random_image(1)), png(random_image(2))], "label": ["b", "a"]})
    data.to_parquet(tmp_path / "a.parquet")
    images = load(tmp_path / "a.parquet")
    assert np.array_equal(images.batch([1])[0], random_image(2))
    assert (images.labels.tolist(), images.classes) == ([1, 0], ("a", "b"))


@pytest.mark.filterwarnings("ignore:.* cropped to:ddim.DdimWarning")
def test_rows_decoded_on_demand_equal_rows_in_memory(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(library, tmp_path / "a.parquet", 150)
    policy = ImagePolicy(height=3, width=4, channels=1)
    in_memory = load(path, policy, limit=140)
    monkeypatch.setattr(sources, "MAX_BYTES", 0)
    lazy = load(path, policy, limit=140)
    order = np.random.default_rng(0).permutation(140)
    assert np.array_equal(in_memory.batch(order), lazy.batch(order))
    assert in_memory.fingerprint() == lazy.fingerprint()


def test_unreadable_rows_are_named(library: Any, tmp_path: Path) -> None:
    cells = [{"bytes": png(random_image(1)), "path": None}, {"bytes": b"no", "path": None}, None]
    features = library.Features({"image": library.Image()})
    library.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "a.parquet")
    message = error_of(tmp_path / "a.parquet")
    assert "a.parquet: " in message
    assert "train[1]" in message
    assert "train[2]" in message
    with pytest.warns(DdimWarning, match=r"\b3\b"):
        assert len(load(tmp_path / "a.parquet", skip_unreadable=True)) == 1


def test_a_label_column_with_gaps_gives_no_labels(library: Any, tmp_path: Path) -> None:
    path = write(library, tmp_path / "a.parquet", 2, label=(library.Value("int64"), [1, None]))
    assert load(path).labels is None
    path = write(library, tmp_path / "b.parquet", 2, label=(library.Value("int64"), [1, 4]))
    assert (load(path).labels.tolist(), load(path).classes) == ([1, 4], None)


def test_files_that_are_not_tables_of_images_are_errors(library: Any, tmp_path: Path) -> None:
    valid = write(library, tmp_path / "valid" / "train-0.parquet", 50)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(valid.read_bytes()[:-100])
    assert "broken.parquet: " in error_of(broken)
    broken.write_bytes(b"")
    assert "broken.parquet: " in error_of(broken)
    middle = bytearray(valid.read_bytes())
    middle[100:2000] = bytes(1900)
    broken.write_bytes(middle)
    error_of(broken)
    words = tmp_path / "words.parquet"
    library.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet(words)
    assert "words.parquet: " in error_of(words)
    numbers = tmp_path / "numbers.parquet"
    library.Dataset.from_dict({"image": [1.5]}).to_parquet(numbers)
    assert "numbers.parquet: " in error_of(numbers)
    assert "none.parquet: " in error_of(write(library, tmp_path / "none.parquet", 0))
    library.Dataset.from_dict({"img": [1]}).to_parquet(tmp_path / "valid" / "train-1.parquet")
    assert "valid/train-1.parquet: " in error_of(tmp_path / "valid")


@pytest.mark.slow
def test_a_hub_name_without_network_fails_quickly_in_one_line(library: Any) -> None:
    code = (
        "from ddim.data import load\n"
        "from ddim.errors import DdimError\n"
        "try: load('nobody/nothing-here')\n"
        "except DdimError as error: print(error)"
    )
    proxies = {"HTTPS_PROXY": "http://127.0.0.1:9", "HF_ENDPOINT": "http://127.0.0.1:9"}
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **proxies}, check=True
    )
    assert time.monotonic() - start < 20  # most of it the import of the library
    assert len(process.stdout.splitlines()) == 1
    assert "the hub cannot be reached" in process.stdout
    assert process.stderr == ""


def test_without_the_library_the_hint_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "'ddim[data]'" in error_of(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "'ddim[data]'" in error_of("digits")


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_named_by_a_row_is_never_opened(library: Any, tmp_path: Path, count: int) -> None:
    import pyarrow
    from pyarrow import parquet

    secret = tmp_path / "secret.png"
    secret.write_bytes(png(random_image(0)))
    cells = [{"bytes": None, "path": str(secret)}] * count + [{"bytes": png(random_image(1)), "path": "1.png"}]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, kind)}), tmp_path / "train.parquet")
    message = error_of(tmp_path / "train.parquet")
    assert "train[0]" in message
    assert "secret.png" in message
    with pytest.warns(DdimWarning, match=r"train\[0\]"):
        assert len(load(tmp_path / "train.parquet", skip_unreadable=True)) == 1


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}], ids=str)
def test_many_empty_rows_fail_fast(cell: Any, library: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    parquet.write_table(pyarrow.table({"image": pyarrow.array([cell] * 200_000, kind)}), tmp_path / "train.parquet")
    start = time.monotonic()
    message = error_of(tmp_path / "train.parquet")
    assert time.monotonic() - start < 10
    assert "train.parquet: " in message
    assert "train[0]" in message


def test_decoding_stops_after_the_maximum_number_of_unreadable_rows(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_UNREADABLE", 100)
    cells = [{"bytes": png(random_image(0)), "path": None}] + [{"bytes": b"junk", "path": None}] * 3000
    data = library.Dataset.from_dict({"image": cells}, features=library.Features({"image": library.Image()}))
    data.to_parquet(tmp_path / "train.parquet")
    message = error_of(tmp_path / "train.parquet")
    assert "train.parquet: " in message
    assert "train[1]" in message
