"""The options --fit and --label-column, and the warnings without them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models import ddim, save_tiny


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Eight images of twice the width of a tiny model's images."""
    (tmp_path / "wide").mkdir()
    for index in range(8):
        values = np.random.default_rng(index).integers(0, 256, (8, 16), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "wide" / f"{index}.png")
    return tmp_path / "wide"


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def commands(folder: Path, wide: Path) -> dict[str, list[object]]:
    model = save_tiny(folder / "model")
    out = folder / "out"
    return {
        "train": [wide, "--preset", "digits", "--steps", 1, "--preview-every", 0, "--out", out],
        "encode": [model, wide, "--steps", 2, "--out", folder / "latents.safetensors"],
        "reconstruct": [model, wide, "--steps", 2, "--out", out],
        "likelihood": [model, wide, "--steps", 2, "--out", out],
        "calibrate": [model, wide, "--times", 24, "--out", out],
        "interpolate": [
            model,
            "--images",
            f"{wide / '0.png'},{wide / '1.png'}",
            "--steps",
            2,
            "--out",
            folder / "a.png",
        ],
        "check": [model, "--data", wide, "--quick"],
        "statistics": [wide, "--size", "28x28x1", "--out", folder / "s.safetensors"],
    }


@pytest.mark.parametrize(
    "name",
    ["train", "encode", "reconstruct", "calibrate", "interpolate", "statistics"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("likelihood", "check")],
)
def test_cropping_warns_once_and_names_the_option_fit(
    name: str, tmp_path: Path, wide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = commands(tmp_path, wide)[name]
    capsys.readouterr()
    assert ddim(name, *arguments) in (0, 1)
    [warning] = [line for line in notes(capsys) if "cropped" in line]
    assert "50%" in warning
    assert "--fit stretch" in warning
    arguments = [tmp_path / "again" if argument == tmp_path / "out" else argument for argument in arguments]
    assert ddim(name, *arguments, "--fit", "stretch") in (0, 1)
    assert not [line for line in notes(capsys) if "cropped" in line]
    assert ddim(name, *arguments, "--fit", "exact") == 2


def test_images_of_several_sizes_need_the_option_size(
    tmp_path: Path, wide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(wide / "z.png")
    capsys.readouterr()
    assert ddim("statistics", wide, "--out", tmp_path / "s.safetensors") == 2
    assert "--size" in capsys.readouterr().err
    assert ddim("statistics", wide, "--fit", "stretch", "--out", tmp_path / "s.safetensors") == 2


def test_fit_does_not_apply_to_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a bad bean " * 200)
    options = ["--preset", "tinyshakespeare", "--fit", "crop", "--out", tmp_path / "r"]
    assert ddim("train", tmp_path / "a.txt", *options) == 2


def test_a_run_records_its_label_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    cells = []
    for index in range(8):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
        cells.append({"bytes": (tmp_path / "a.png").read_bytes(), "path": None})
    (tmp_path / "c").mkdir()
    columns = {"img": cells, "fine": [i % 4 for i in range(8)], "rough": [i % 2 for i in range(8)]}
    parquet.write_table(arrow.table(columns), tmp_path / "c" / "train-0.parquet")
    run = ["--preset", "digits", "--steps", 1, "--preview-every", 0, "--out", tmp_path / "r"]
    assert ddim("train", tmp_path / "c", "--labels", *run) == 2
    error = capsys.readouterr().err
    assert "--label-column" in error
    assert "c: " in error
    assert not (tmp_path / "r").exists()
    assert ddim("train", tmp_path / "c", "--label-column", "fine", *run) == 0
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (record["label_column"], record["model"]["network"]["classes"]) == ("fine", 4)
    assert ddim("train", tmp_path / "c", "--label-column", "rough", *run) == 2
    assert ddim("train", tmp_path / "c", "--label-column", "fine", "--no-labels", *run) == 2
