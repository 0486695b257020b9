from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_kit import exact, random_image, save
from PIL import Image, ImageChops
from pydantic import ValidationError

from ddim._io import limits
from ddim.data import ImagePolicy, decode, list_images, open_image
from ddim.data.image import read_image
from ddim.errors import DdimError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def error_of(source: object, policy: ImagePolicy | None = None, name: str | None = None) -> str:
    with pytest.raises(DdimError) as caught:
        open_image(source, policy or exact(4, 4, 3), name)
    message = str(caught.value)
    assert "\n" not in message
    return message


# From an upright image to the stored one, for each EXIF orientation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = random_image(1, 4, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(open_image(data, exact(4, 7, 3)), upright)


def test_the_orientation_table_agrees_with_pillow() -> None:
    from PIL import ImageOps

    upright = random_image(1, 4, 7)
    for orientation, stored in STORED.items():
        image = Image.fromarray(np.ascontiguousarray(stored(upright)))
        image.getexif()[0x0112] = orientation
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), upright)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(orientation: object) -> None:
    pixels = random_image(2, 4, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(open_image(encoded(Image.fromarray(pixels), exif=exif), exact(4, 7, 3)), pixels)


@given(colour=st.integers(0, 255), alpha=st.integers(0, 255), matte=st.integers(0, 255))
def test_alpha_is_composited_exactly(colour: int, alpha: int, matte: int) -> None:
    image = Image.new("LA", (2, 2), (colour, alpha))
    expected = int(np.floor((colour * alpha + matte * (255 - alpha)) / 255 + 0.5))
    assert (open_image(encoded(image), exact(2, 2, 1, matte=matte)) == expected).all()
    image = Image.new("RGBA", (2, 2), (colour, 0, 255, alpha))
    assert (open_image(encoded(image), exact(2, 2, 3, matte=matte))[..., 0] == expected).all()


def test_transparent_colour_does_not_bleed_when_downsampling() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (255, 0, 0, 0)
    small = open_image(encoded(Image.fromarray(pixels)), ImagePolicy(height=2, width=2, channels=3, matte=9))
    assert set(np.unique(small)) == {9}


def test_a_palette_keeps_its_colours_and_its_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    image.putdata([0, 1, 2])
    plain = open_image(encoded(image), exact(1, 3, 3))
    assert plain.tolist() == [[[10, 20, 30], [200, 100, 50], [1, 2, 3]]]
    transparent = open_image(encoded(image, transparency=1), exact(1, 3, 3, matte=77))
    assert transparent.tolist() == [[[10, 20, 30], [77, 77, 77], [1, 2, 3]]]
    half = open_image(encoded(image, transparency=bytes([255, 255, 0])), exact(1, 3, 3, matte=5))
    assert half.tolist() == [[[10, 20, 30], [200, 100, 50], [5, 5, 5]]]


def test_16_bit_values_are_scaled_not_truncated() -> None:
    values = np.array([[0, 1, 128, 129, 257, 32896, 65407, 65535]], np.uint16)
    expected = [[0, 0, 0, 1, 1, 128, 255, 255]]  # 65407 = 254.5 * 257 rounded up
    expected[0][6] = int(65407 / 257 + 0.5)
    for kind in ("PNG", "TIFF"):
        assert open_image(encoded(Image.fromarray(values), kind), exact(1, 8, 1))[..., 0].tolist() == expected
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    assert open_image(encoded(wide, "TIFF"), exact(1, 8, 1))[..., 0].tolist() == expected


def test_integers_beyond_16_bits_and_floats_are_errors() -> None:
    big = Image.fromarray(np.full((4, 4), 70000, np.int32))
    assert "an image: " in error_of(encoded(big, "TIFF"))
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert "f.tif: " in error_of(encoded(floats, "TIFF"), name="f.tif")


def test_reduction_of_16_bit_colour_is_reported() -> None:
    rows = b"".join(b"\0" + np.full((4, 3), 32896, ">u2").tobytes() for _ in range(4))
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    pixels, notes = read_image(data, exact(4, 4, 3))
    assert (pixels == 128).all()
    assert notes == {"16-bit reduced to 8 bits"}


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_white_is_white_and_ink_is_dark(kind: str) -> None:
    white, black = Image.new("CMYK", (4, 4), (0, 0, 0, 0)), Image.new("CMYK", (4, 4), (0, 0, 0, 255))
    pixels, notes = read_image(encoded(white, kind), exact(4, 4, 3))
    assert (pixels >= 254).all()
    assert notes == {"CMYK converted to RGB"}
    assert (open_image(encoded(black, kind), exact(4, 4, 3)) <= 1).all()


def test_one_bit_grey_and_colour_images_agree() -> None:
    bits = (random_image(3, 5, 9, 1) > 127).squeeze()
    grey = np.where(bits, 255, 0).astype(np.uint8)
    as_grey = open_image(encoded(Image.fromarray(bits)), exact(5, 9, 1))
    assert np.array_equal(as_grey[..., 0], grey)
    as_rgb = open_image(encoded(Image.fromarray(grey)), exact(5, 9, 3))
    assert np.array_equal(as_rgb, np.repeat(as_grey, 3, axis=2))
    assert np.array_equal(open_image(encoded(Image.fromarray(as_rgb)), exact(5, 9, 1)), as_grey)


def test_a_path_bytes_and_an_open_file_give_the_same_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", random_image(4))
    with path.open("rb") as file:
        results = [open_image(s, exact(6, 6, 3)) for s in (path, str(path), path.read_bytes(), file)]
    assert all(np.array_equal(result, random_image(4)) for result in results)


def test_box_then_centre_crop() -> None:
    pixels = random_image(5, 10, 16)
    data = encoded(Image.fromarray(pixels))
    assert np.array_equal(open_image(data, exact(4, 5, 3, box=(2, 3, 7, 7))), pixels[3:7, 2:7])
    square = ImagePolicy(height=10, width=10, channels=3)
    assert np.array_equal(open_image(data, square), pixels[:, 3:13])
    tall = ImagePolicy(height=8, width=4, channels=3, box=(0, 1, 16, 9))
    assert np.array_equal(open_image(data, tall), pixels[1:9, 6:10])


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (7, 5)])
@pytest.mark.parametrize("resampling", ["lanczos", "bicubic", "box", "bilinear"])
def test_a_constant_image_stays_constant_at_every_size(fit: str, size: tuple[int, int], resampling: str) -> None:
    data = encoded(Image.new("RGB", (size[1], size[0]), (7, 99, 200)))
    policy = ImagePolicy(height=9, width=4, channels=3, fit=fit, filter=resampling)
    assert np.unique(open_image(data, policy).reshape(-1, 3), axis=0).tolist() == [[7, 99, 200]]


def test_downsampling_with_the_box_filter_is_the_mean() -> None:
    pixels = random_image(6, 8, 8, 1)
    policy = ImagePolicy(height=2, width=2, channels=1, filter="box")
    means = pixels.reshape(2, 4, 2, 4).mean(axis=(1, 3))
    assert np.abs(open_image(encoded(Image.fromarray(pixels.squeeze())), policy)[..., 0] - means).max() < 1


def test_an_image_that_does_not_fit_the_policy_is_an_error() -> None:
    data = encoded(Image.fromarray(random_image(7, 5, 8)))
    assert "d.png: " in error_of(data, name="d.png")
    assert "an image: " in error_of(data, exact(4, 4, 3, box=(6, 0, 10, 4)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 0},
        {"channels": 2},
        {"box": (5, 0, 5, 4)},
        {"box": (-1, 0, 5, 4)},
        {"matte": 256},
        {"fit": "pad"},
        {"colour": True},
    ],
)
def test_an_invalid_policy_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ImagePolicy(**{"height": 4, "width": 4, "channels": 3, **wrong})


def test_a_policy_survives_json() -> None:
    policy = ImagePolicy(height=4, width=5, channels=3, box=(10, 25, 80, 95), matte=3)
    assert ImagePolicy.model_validate_json(policy.model_dump_json()) == policy
    assert policy.shape == (4, 5, 3)


def test_files_that_are_not_images_are_errors(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    expected = {
        "x.png": "is a folder",
        "text.png": "is not an image of a supported format",
        "empty.png": "is empty (0 bytes)",
        "pipe.png": "is not a regular file",
        "gone.png": "no such file",
        "none.png": "no such file",
    }
    for name, problem in expected.items():
        assert error_of(tmp_path / name).startswith(f"{tmp_path / name}: {problem}")
    assert r"a\nb.png: " in error_of(tmp_path / "a\nb.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", random_image(1))
    path.chmod(0)
    assert "permission denied" in error_of(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_file_is_an_error_at_any_length(kind: str) -> None:
    data = encoded(Image.fromarray(random_image(8, 64, 64)), kind)
    policy = exact(64, 64, 3)
    open_image(data, policy)
    for part in (0.02, 0.3, 0.6, 0.9):
        error_of(data[: int(len(data) * part)], policy)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"])
def test_damaged_files_give_an_image_or_a_one_line_error(kind: str) -> None:
    random = np.random.default_rng(0)
    valid = np.frombuffer(encoded(Image.fromarray(random_image(9, 16, 16)), kind), np.uint8)
    lines = []
    for _ in range(60):
        data = valid.copy()
        data[random.integers(0, min(len(data), 200), 4)] = random.integers(0, 256, 4)
        try:
            assert open_image(data.tobytes(), ImagePolicy(height=8, width=8, channels=3)).shape == (8, 8, 3)
        except DdimError as error:
            lines.append(str(error))
    assert all(len(line.splitlines()) == 1 for line in lines)


def test_a_decompression_bomb_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "an image: " in error_of(data)


def test_postscript_is_not_run() -> None:
    assert "an image: " in error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")


def test_the_first_frame_of_an_animation_is_used_and_reported() -> None:
    frames = [Image.new("RGB", (4, 4), (0, 0, 255)), Image.new("RGB", (4, 4), (255, 0, 0))]
    assert ImageChops.difference(*frames).getbbox() is not None
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    pixels, notes = read_image(data, exact(4, 4, 3))
    assert (pixels == (0, 0, 255)).all()
    assert notes == {"animated or multi-page, first frame used"}


def test_list_images_is_sorted_recursive_and_skips_hidden_files(tmp_path: Path) -> None:
    names = ["b.png", "a/z.JPG", "a/b/c.webp", "a.png", "B.png"]
    for name in [*names, ".hidden.png", ".cache/x.png", "note.txt", "a/._b.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    listed = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert listed == sorted(names)


def test_listing_a_path_that_is_not_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DdimError, match="nowhere: "):
        list_images(tmp_path / "nowhere")
    with pytest.raises(DdimError, match=r"a\.png: "):
        list_images(save(tmp_path / "a.png", random_image(1)))


def test_an_image_beyond_the_limit_is_rejected_by_its_header(tmp_path: Path) -> None:
    """13,300 x 13,300 pixels in 20 KB: none of them are decoded."""
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(1 + 13_300 * 4)) for _ in range(50)) + rows.flush()
    head = struct.pack(">IIBBBBB", 13_300, 13_300, 8, 6, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    tracemalloc.start()
    message = error_of(tmp_path / "large.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "large.png: " in message
    assert peak < 20 << 20


def test_threads_decode_no_more_pixels_at_once_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 10_000
    seen = list[int]()
    budget = decode._PixelBudget()
    budget._free = limit
    monkeypatch.setattr(decode, "_BUDGET", budget)
    monkeypatch.setattr(limits, "PIXELS", limit)
    before = decode._load

    def loaded(image: Image.Image, name: str, matte: int, report: Any) -> Any:
        seen.append(limit - budget._free)
        return before(image, name, matte, report)

    monkeypatch.setattr(decode, "_load", loaded)
    data = [encoded(Image.new("L", (size, size), size)) for size in (10, 60, 99, 100, 70, 80) * 5]
    with ThreadPoolExecutor(6) as pool:
        images = [*pool.map(lambda item: read_image(item, ImagePolicy(height=2, width=2, channels=1))[0], data)]
    assert [int(image[0, 0, 0]) for image in images] == [10, 60, 99, 100, 70, 80] * 5
    assert len(seen) == 30
    assert max(seen) <= limit
    assert budget._free == limit
