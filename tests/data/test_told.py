"""What pictures lose on the way to the grid is said: once a set, with numbers, whatever the format."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from picture_kit import picture, save
from PIL import Image

from ddim.data import ImagePolicy, load
from ddim.errors import DdimError, DdimWarning, Hint

GRID = ImagePolicy(height=8, width=8, channels=1)


def told(folder: Path, policy: ImagePolicy | None = GRID) -> list[DdimWarning]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(folder, policy)
    return [one.message for one in said if isinstance(one.message, DdimWarning)]


def ramp(largest: int, dtype: type, lowest: int = 0) -> np.ndarray:
    return np.linspace(lowest, largest, 64).round().astype(dtype).reshape(8, 8)


def as_png(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path.with_suffix(".png"))


def as_tiff(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path.with_suffix(".tiff"))


def as_whole_numbers(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.int32)).save(path.with_suffix(".tiff"))


@pytest.mark.parametrize("write", [as_png, as_tiff, as_whole_numbers])
@pytest.mark.parametrize("largest", [1, 255, 1023, 4095, 16383, 32767])
def test_16_bits_of_which_few_are_used(tmp_path: Path, write: Callable[..., None], largest: int) -> None:
    for index in range(3):
        write(tmp_path / str(index), ramp(largest, np.uint16))
    [said] = told(tmp_path)
    levels = (largest + 128) // 257 + 1
    for number in (f"0 to {largest} of", f"{levels} of 256", "3 use"):
        assert number in str(said)
    assert levels == len(np.unique([(value + 128) // 257 for value in range(largest + 1)]))


def test_values_far_from_0_are_looked_at_too(tmp_path: Path) -> None:
    as_png(tmp_path / "a", ramp(32768 + 4095, np.uint16, 32768))
    assert "32768 to 36863" in str(told(tmp_path)[0])


@pytest.mark.parametrize("largest", [1, 2, 15, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_of_small_numbers(tmp_path: Path, largest: int, channels: int) -> None:
    values = np.repeat(ramp(largest, np.uint8)[..., None], channels, 2)
    save(tmp_path / "a.png", values)
    [said] = told(tmp_path, ImagePolicy(height=8, width=8, channels=channels))
    assert f"0 to {largest} of 0 to 255" in str(said)


def test_what_uses_its_range_is_not_told(tmp_path: Path) -> None:
    save(tmp_path / "a.png", ramp(255, np.uint8))
    save(tmp_path / "b.png", ramp(3, np.uint8))  # of one set some may be dark
    save(tmp_path / "c.png", (ramp(1, np.uint8) * 255))
    assert not told(tmp_path)
    as_png(tmp_path / "d", ramp(65535, np.uint16))
    [said] = told(tmp_path)
    assert "of the range" not in str(said)


def test_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DdimError):
        load(tmp_path, GRID)


@pytest.mark.parametrize(("size", "lost"), [((8, 16), 50), ((16, 8), 50), ((10, 8), 20), ((32, 24), 25), ((9, 90), 90)])
def test_what_is_cropped_is_told_with_its_share(tmp_path: Path, size: tuple[int, int], lost: int) -> None:
    for index in range(4):
        save(tmp_path / f"{index}.png", picture(index, *size, 1))
    save(tmp_path / "square.png", picture(9, 8, 8, 1))
    [said] = told(tmp_path)
    assert "of 5 pictures 4 cropped" in str(said)
    assert f"{lost}% of each" in str(said)
    assert isinstance(said.hint, Hint)
    [said] = told(tmp_path, GRID.model_copy(update={"fit": "stretch"}))
    assert "cropped to the" not in str(said)
    assert "4 resized" in str(said)


def test_the_part_that_is_cut_is_what_is_told(tmp_path: Path) -> None:
    """Half of a picture black, half white: what is left of it is what the share says."""
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 255
    save(tmp_path / "a.png", wide)
    assert "50%" in str(told(tmp_path)[0])
    with pytest.warns(DdimWarning):
        assert (load(tmp_path, GRID).batch([0]) == 255).all()


def test_another_size_of_the_same_shape_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(0, 16, 16, 1))
    save(tmp_path / "b.png", picture(1, 8, 8, 1))
    [said] = told(tmp_path)
    assert "1 resized to 8x8 from 16x16" in str(said)
    assert "cropped to the" not in str(said)


def test_a_box_that_fits_loses_only_what_was_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(0, 20, 10, 1))
    assert not told(tmp_path, GRID.model_copy(update={"box": (1, 2, 9, 10)}))


def test_the_digits_on_another_shape_are_told() -> None:
    pytest.importorskip("sklearn")
    with pytest.warns(DdimWarning, match=r"\b50\b"):
        load("digits", ImagePolicy(height=8, width=16, channels=1))
