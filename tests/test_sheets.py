"""Sheets, animations and figures: what is in the files, by suffix."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim._io import animation
from ddim._io.png import sheet
from ddim._io.sheets import TARGET, save_sheet, zoom
from ddim.data.pixels import to_uint8
from ddim.errors import DdimError
from ddim.evaluation.report import figures
from ddim.model.load import load
from models import ddim, save_tiny, stripes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sheets") / "tiny")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".PNG"])
def test_a_sheet_has_every_pixel_enlarged(suffix: str, channels: int, tmp_path: Path) -> None:
    images = stripes(6, channels=channels)
    path = tmp_path / f"sheet{suffix}"
    save_sheet(path, images, columns=3)
    factor = zoom(20, 30)
    expected = np.broadcast_to(sheet(images, 3, zoom=factor), (*sheet(images, 3, zoom=factor).shape[:2], 3))
    with Image.open(path) as image:
        assert image.format == suffix[1:].upper()
        actual = np.asarray(image.convert("RGB")).astype(int)
    assert TARGET * 2 / 3 < max(actual.shape) < TARGET * 4 / 3
    assert np.abs(actual - expected).max() <= (12 if suffix == ".gif" and channels == 3 else 0)


def test_large_images_are_not_enlarged() -> None:
    assert zoom(400, 900) == zoom(256, 512) == 1
    assert zoom(28, 28) > 10


@pytest.mark.parametrize("option", ["--sheet", "--animate"])
def test_another_suffix_is_refused_before_sampling(
    option: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.bmp"
    assert ddim("sample", tiny, "-n", 2, "--out", tmp_path / "out", option, path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {path}: ")
    assert ".png" in lines[0] or ".gif" in lines[0]
    assert not (tmp_path / "out").exists()


def test_samples_are_not_written_to_a_folder_named_like_an_image(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ddim("sample", tiny, "-n", 2, "--out", tmp_path / "out.png") == 2
    assert f"error: --out {tmp_path / 'out.png'}: " in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_has_a_frame_for_each_step_and_ends_with_the_samples(
    suffix: str, tiny: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / f"steps{suffix}", tmp_path / "out"
    options = ("-n", 3, "--start", 1, "--seed", 5, "--steps", 4, "--eta", 1, "--dtype", "float32")
    assert ddim("sample", tiny, *options, "--out", out, "--animate", path) == 0
    model = load(tiny, dtype="float32")
    samples = to_uint8(model.sample(3, steps=4, eta=1.0, seed=5, start=1))
    with Image.open(path) as image:
        assert image.n_frames == 5  # type: ignore[attr-defined]
        image.seek(4)
        last = np.asarray(image.convert("L")).astype(int)
    side = (last.shape[1] - 12) // 4 - 3  # two halves of two columns, with their gaps
    factor = side // 8
    for half in (2, last.shape[1] // 2 + 8):
        shown = last[22 : 22 + 8 * factor : factor, half : half + 8 * factor : factor]
        assert np.abs(shown - samples[0, :, :, 0]).max() <= 1


def test_mp4_without_ffmpeg_names_the_other_formats(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(animation, "_ffmpeg", lambda: None)
    assert ddim("sample", tiny, "-n", 1, "--out", tmp_path / "out", "--animate", tmp_path / "a.mp4") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "ffmpeg" in line
    assert "a.gif" in line
    assert "a.webp" in line


def test_ffmpeg_gets_all_frames_with_even_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nfor last; do :; done\ncat > "$last"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(animation, "_ffmpeg", lambda: str(program))
    frames = [np.full((5, 7, 3), value, np.uint8) for value in (1, 2)]
    animation.save_animation(tmp_path / "a.mp4", frames)
    data = np.frombuffer((tmp_path / "a.mp4").read_bytes(), np.uint8).reshape(-1, 6, 8, 3)
    assert [*data[:, 5, 7, 0]] == [1, *[2] * animation.LAST]
    program.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(DdimError, match=r"^.*b\.mp4: "):
        animation.save_animation(tmp_path / "b.mp4", frames)


def test_figures_by_suffix(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, png, svg = tmp_path / "plan.json", tmp_path / "plan.png", tmp_path / "plan.svg"
    assert ddim("plan", tiny, "--steps", 4, "--sampler", "ddim", "--json") == 0
    plan.write_text(capsys.readouterr().out)
    assert ddim("plan", tiny, "--steps", 3, "--eta", 1, "--plot", png, "--overlay", plan) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ddim("plan", tiny, "--like", "diffusers", "--steps", 4, "--diff", "--plot", svg) == 0
    assert b"<svg" in svg.read_bytes()
    assert ddim("show", "schedule", "linear", tiny, "--out", png) == 0
    assert ddim("show", "trajectories", "--steps", 3, "-n", 3, "--sampler", "ddim,ddim:0.5,heun", "--out", png) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_figures_without_matplotlib(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "installed", lambda: False)
    for words in (("plan", tiny, "--plot"), ("show", "schedule", "--out"), ("show", "trajectories", "--out")):
        assert ddim(*words, tmp_path / "x.png") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "ddim[plot]" in line
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("words", [("--sampler", "ddim:x"), ("--sampler", "none"), ("-n", 0), ("--schedule", "none")])
def test_wrong_trajectories(words: tuple[object, ...], tmp_path: Path) -> None:
    assert ddim("show", "trajectories", *words, "--out", tmp_path / "x.png") == 2
