from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_kit import exact, random_image, save
from PIL import Image

from ddim.data import ImagePolicy, ImageSet, iter_load, iter_scan, load, open_image, scan, sources
from ddim.errors import DdimError, DdimWarning

pytestmark = pytest.mark.filterwarnings("ignore:.* (cropped|resized) to:ddim.DdimWarning")  # expected here

GRID = ImagePolicy(height=5, width=4, channels=3)


def error_of(*arguments: object, **options: object) -> str:
    """The message of the error that `load` raises, on one line."""
    with pytest.raises(DdimError) as caught:
        load(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of several sizes."""
    for index in range(10):
        save(tmp_path / "set" / f"{index}.png", random_image(index, 5 + index % 3, 6))
    return tmp_path / "set"


@pytest.fixture
def broken(folder: Path) -> Path:
    """The same with three unreadable files."""
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    (folder / "5.png").write_text("not an image")
    (folder / "9.png").write_bytes(b"")
    return folder


def test_a_batch_equals_the_images_opened_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = [7, 0, 0, 9, 3]
    singles = np.stack([open_image(folder / f"{index}.png", GRID) for index in order])
    in_memory = load(folder, GRID)
    monkeypatch.setattr(sources, "MAX_BYTES", 0)
    lazy = load(folder, GRID)
    assert lazy._pixels is None
    assert in_memory._pixels is not None
    for images in (in_memory, lazy):
        batch = images.batch(order)
        assert batch.dtype == np.uint8
        assert np.array_equal(batch, singles)
        assert np.array_equal(images.batch(np.array(order, np.int32)), singles)
        assert images.batch([]).shape == (0, 5, 4, 3)
        assert np.array_equal(np.concatenate(list(images.slices(4))), images.batch(range(10)))
    assert in_memory.fingerprint() == lazy.fingerprint()


def test_a_batch_does_not_depend_on_threads_and_is_a_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(folder, GRID).batch(range(10))
    monkeypatch.setattr("ddim.data.parallel_decode.workers", lambda: 1)
    images = load(folder, GRID)
    images.batch(range(10))[:] = 0
    assert np.array_equal(images.batch(range(10)), expected)


@pytest.mark.parametrize("wrong", [[10], [-1], [0.5], [[1, 2]], [True]])
def test_invalid_indices_raise_index_error(folder: Path, wrong: list[object]) -> None:
    with pytest.raises(IndexError):
        load(folder, GRID).batch(wrong)


def test_order_limit_and_names(folder: Path) -> None:
    images = load(folder, GRID, limit=4)
    assert [images.names(index) for index in range(len(images))] == ["0.png", "1.png", "2.png", "3.png"]
    assert np.array_equal(images.batch(range(4)), load(folder, GRID).batch(range(4)))
    assert len(load(folder, GRID, limit=99)) == 10
    for limit in (0, -3):
        assert "limit: " in error_of(folder, GRID, limit=limit)


def test_by_default_images_keep_their_size(tmp_path: Path) -> None:
    save(tmp_path / "a.png", random_image(1, 3, 8, 1))
    images = load(tmp_path)
    assert images.policy == exact(3, 8, 1)
    assert np.array_equal(images.batch([0])[0], random_image(1, 3, 8, 1))


def test_images_of_different_sizes_are_an_error_and_never_skipped(folder: Path) -> None:
    for skip in (False, True):
        message = error_of(folder, skip_unreadable=skip)
        assert "1.png" in message
        assert "'crop'" in message


def test_the_error_names_all_unreadable_files(broken: Path) -> None:
    message = error_of(broken, GRID)
    assert "3.png" in message
    assert "5.png" in message
    assert "9.png" in message
    assert "skip_unreadable" in message


def test_unreadable_files_are_skipped_with_one_warning(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1 << 20, 0):
        monkeypatch.setattr(sources, "MAX_BYTES", limit)
        with pytest.warns(DdimWarning, match=r"\b9\.png\b") as caught:
            images = load(broken, GRID, skip_unreadable=True)
        assert len([item for item in caught if "skipped" in str(item.message)]) == 1
        valid = [0, 1, 2, 4, 6, 7, 8]
        assert [images.names(index) for index in range(7)] == [f"{index}.png" for index in valid]
        singles = np.stack([open_image(broken / f"{index}.png", GRID) for index in valid])
        assert np.array_equal(images.batch(range(7)), singles)


def test_many_unreadable_files_stop_the_scan_with_an_error(tmp_path: Path) -> None:
    for index in range(12):
        (tmp_path / f"{index:02}.png").write_text("no")
    save(tmp_path / "valid.png", random_image(1))
    assert "04.png" in error_of(tmp_path, GRID)
    (tmp_path / "valid.png").unlink()
    assert error_of(tmp_path).startswith(f"{tmp_path}: ")
    assert error_of(tmp_path, GRID, skip_unreadable=True).startswith(f"{tmp_path}: ")


def test_labels_match_their_images_when_some_are_skipped(tmp_path: Path) -> None:
    for index, name in enumerate(["cat", "dog", "cat", "ant"]):
        save(tmp_path / name / f"{index}.png", random_image(index))
    (tmp_path / "cat" / "1.png").write_text("no")
    with pytest.warns(DdimWarning, match="cat/1"):
        images = load(tmp_path, skip_unreadable=True)
    assert [(images.names(i), images.classes[images.labels[i]]) for i in range(4)] == [
        ("ant/3.png", "ant"),
        ("cat/0.png", "cat"),
        ("cat/2.png", "cat"),
        ("dog/1.png", "dog"),
    ]
    assert images.labels.dtype == np.int64


def test_scan_lists_exactly_the_unreadable_files(broken: Path) -> None:
    assert [name for name, _ in scan(broken)] == ["3.png", "5.png", "9.png"]
    assert {reason for name, reason in scan(broken) if name == "9.png"} == {"is empty (0 bytes)"}
    assert len(scan(broken, exact(5, 6, 3))) == 3 + 5  # the unreadable ones, and those of another height
    steps = list(iter_scan(broken))
    assert steps[-1] == (10, 10)


def test_loading_reports_its_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddim.data.parallel_decode.CHUNK", 4)
    assert list(iter_load(folder, GRID)) == [(4, 10), (8, 10), (10, 10)]


def test_class_folders_give_labels_only_if_every_image_is_in_one(tmp_path: Path) -> None:
    save(tmp_path / "b" / "0.png", random_image(0))
    save(tmp_path / "a" / "1.png", random_image(1))
    images = load(tmp_path)
    assert (images.classes, images.labels.tolist()) == (("a", "b"), [0, 1])
    save(tmp_path / "c.png", random_image(2))
    images = load(tmp_path)
    assert (images.classes, images.labels) == (None, None)


def test_split_folders(tmp_path: Path) -> None:
    save(tmp_path / "train" / "x" / "0.png", random_image(0))
    save(tmp_path / "test" / "y" / "1.png", random_image(1))
    images = load(tmp_path, split="test")
    assert (images.names(0), images.classes, images.split) == ("y/1.png", ("y",), "test")
    assert load(tmp_path).names(0) == "x/0.png"
    assert "'val'" in error_of(tmp_path, split="val")
    save(tmp_path / "bus" / "1.png", random_image(1))  # now the folders are classes: bus, test, train
    (tmp_path / "test" / "y" / "1.png").rename(tmp_path / "test" / "1.png")
    (tmp_path / "train" / "x" / "0.png").rename(tmp_path / "train" / "0.png")
    assert load(tmp_path).classes == ("bus", "test", "train")


def test_conversions_are_reported_in_one_warning(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("CMYK", (4, 4)).save(tmp_path / f"c{index}.tif")
    for index in range(2):
        save(tmp_path / f"a{index}.png", random_image(index, 4, 4, 4))
    save(tmp_path / "g.png", random_image(1, 4, 4, 1).astype(np.uint16) * 100)
    save(tmp_path / "plain.png", random_image(1, 4, 4))
    with pytest.warns(DdimWarning) as caught:
        load(tmp_path, exact(4, 4, 3))
    assert len(caught) == 1
    message = str(caught[0].message)
    for part in (
        "of 7 images",
        "3 CMYK converted to RGB",
        "2 transparent, composited over matte 0",
        "1 16-bit reduced to 8 bits",
        "1 grey spread to RGB",
    ):
        assert part in message


def test_an_invalid_source_is_an_error_that_names_it(tmp_path: Path) -> None:
    assert "nowhere: " in error_of(tmp_path / "nowhere")
    assert "nowhere: " in error_of("nowhere")
    assert "./no/where: " in error_of("./no/where")
    assert error_of(tmp_path).startswith(f"{tmp_path}: ")
    assert "a.png: " in error_of(save(tmp_path / "a.png", random_image(1)))
    (tmp_path / "b.parquet").touch()
    assert error_of(tmp_path).startswith(f"{tmp_path}: ")


def test_the_fingerprint_depends_on_the_content_and_not_on_the_location(folder: Path, tmp_path: Path) -> None:
    before = load(folder, GRID).fingerprint()
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "set")
    assert load(moved, GRID).fingerprint() == before
    assert load(moved, GRID, limit=9).fingerprint() != before
    assert load(moved, exact(5, 4, 3, box=(0, 0, 4, 5))).fingerprint() != before
    save(moved / "4.png", random_image(99))
    assert load(moved, GRID).fingerprint() != before


def test_an_image_deleted_after_loading_is_named_in_the_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 0)
    images = load(folder, GRID)
    (folder / "4.png").unlink()
    assert images.batch([3]).shape == (1, 5, 4, 3)
    with pytest.raises(DdimError, match=r"^set/4\.png: "):
        images.batch([3, 4])


def test_a_lazy_set_survives_a_change_of_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 0)
    monkeypatch.chdir(folder.parent)
    images: ImageSet = load("set", GRID)
    monkeypatch.chdir(folder)
    assert len(images.batch(range(10))) == 10


def test_importing_the_package_loads_no_heavy_libraries() -> None:
    code = (
        "import sys, json, ddim.data; "
        "print(json.dumps([m for m in ('torch', 'datasets', 'sklearn', 'pyarrow') if m in sys.modules]))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(process.stdout) == []
