"""What preprocessing changes in the images of a dataset is reported in one warning, with numbers, for every format."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_kit import random_image, save
from PIL import Image

from ddim.data import ImagePolicy, load
from ddim.errors import DdimError, DdimWarning, Hint

GRID = ImagePolicy(height=8, width=8, channels=1)


def warnings_of(folder: Path, policy: ImagePolicy | None = GRID) -> list[DdimWarning]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(folder, policy)
    return [warning.message for warning in caught if isinstance(warning.message, DdimWarning)]


def ramp(largest: int, dtype: type, lowest: int = 0) -> np.ndarray:
    return np.linspace(lowest, largest, 64).round().astype(dtype).reshape(8, 8)


def as_png(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path.with_suffix(".png"))


def as_tiff(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path.with_suffix(".tiff"))


def as_integer_tiff(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.int32)).save(path.with_suffix(".tiff"))


@pytest.mark.parametrize("write", [as_png, as_tiff, as_integer_tiff])
@pytest.mark.parametrize("largest", [1, 255, 1023, 4095, 16383, 32767])
def test_a_narrow_range_of_16_bit_values_is_reported(tmp_path: Path, write: Callable[..., None], largest: int) -> None:
    for index in range(3):
        write(tmp_path / str(index), ramp(largest, np.uint16))
    [warning] = warnings_of(tmp_path)
    levels = (largest + 128) // 257 + 1
    for number in (f"0 to {largest} of", f"{levels} of 256", "3 use"):
        assert number in str(warning)
    assert levels == len(np.unique([(value + 128) // 257 for value in range(largest + 1)]))


def test_a_narrow_range_far_from_0_is_reported(tmp_path: Path) -> None:
    as_png(tmp_path / "a", ramp(32768 + 4095, np.uint16, 32768))
    assert "32768 to 36863" in str(warnings_of(tmp_path)[0])


@pytest.mark.parametrize("largest", [1, 2, 15, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_of_small_values_are_reported(tmp_path: Path, largest: int, channels: int) -> None:
    values = np.repeat(ramp(largest, np.uint8)[..., None], channels, 2)
    save(tmp_path / "a.png", values)
    [warning] = warnings_of(tmp_path, ImagePolicy(height=8, width=8, channels=channels))
    assert f"0 to {largest} of 0 to 255" in str(warning)


def test_images_that_use_their_range_are_not_reported(tmp_path: Path) -> None:
    save(tmp_path / "a.png", ramp(255, np.uint8))
    save(tmp_path / "b.png", ramp(3, np.uint8))  # a few dark images of a dataset are normal
    save(tmp_path / "c.png", (ramp(1, np.uint8) * 255))
    assert not warnings_of(tmp_path)
    as_png(tmp_path / "d", ramp(65535, np.uint16))
    [warning] = warnings_of(tmp_path)
    assert "of the range" not in str(warning)


def test_floating_point_images_are_an_error(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DdimError):
        load(tmp_path, GRID)


@pytest.mark.parametrize(("size", "lost"), [((8, 16), 50), ((16, 8), 50), ((10, 8), 20), ((32, 24), 25), ((9, 90), 90)])
def test_cropping_is_reported_with_the_lost_fraction(tmp_path: Path, size: tuple[int, int], lost: int) -> None:
    for index in range(4):
        save(tmp_path / f"{index}.png", random_image(index, *size, 1))
    save(tmp_path / "square.png", random_image(9, 8, 8, 1))
    [warning] = warnings_of(tmp_path)
    assert "of 5 images 4 cropped" in str(warning)
    assert f"{lost}% of each" in str(warning)
    assert isinstance(warning.hint, Hint)
    [warning] = warnings_of(tmp_path, GRID.model_copy(update={"fit": "stretch"}))
    assert "cropped to the" not in str(warning)
    assert "4 resized" in str(warning)


def test_the_reported_fraction_is_what_cropping_removes(tmp_path: Path) -> None:
    """An image whose sides are black and whose centre is white: the crop keeps only the white half."""
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 255
    save(tmp_path / "a.png", wide)
    assert "50%" in str(warnings_of(tmp_path)[0])
    with pytest.warns(DdimWarning):
        assert (load(tmp_path, GRID).batch([0]) == 255).all()


def test_resizing_without_cropping_is_reported(tmp_path: Path) -> None:
    save(tmp_path / "a.png", random_image(0, 16, 16, 1))
    save(tmp_path / "b.png", random_image(1, 8, 8, 1))
    [warning] = warnings_of(tmp_path)
    assert "1 resized to 8x8 from 16x16" in str(warning)
    assert "cropped to the" not in str(warning)


def test_a_box_of_the_target_size_is_not_reported(tmp_path: Path) -> None:
    save(tmp_path / "a.png", random_image(0, 20, 10, 1))
    assert not warnings_of(tmp_path, GRID.model_copy(update={"box": (1, 2, 9, 10)}))


@pytest.mark.slow
def test_cropping_of_the_digits_is_reported() -> None:
    pytest.importorskip("sklearn")
    with pytest.warns(DdimWarning, match=r"\b50\b"):
        load("digits", ImagePolicy(height=8, width=16, channels=1))
