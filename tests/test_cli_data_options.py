"""--fit and --label-column: what they do, and what is said without them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models import ddim, save_tiny


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Eight pictures of twice the width of a tiny model's."""
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
    + [pytest.param(name, marks=pytest.mark.heavy) for name in ("likelihood", "check")],
)
def test_what_is_cut_is_said_once_and_with_an_option_that_there_is(
    name: str, tmp_path: Path, wide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = commands(tmp_path, wide)[name]
    capsys.readouterr()
    assert ddim(name, *words) in (0, 1)
    [said] = [line for line in notes(capsys) if "cropped" in line]
    assert "50%" in said
    assert "--fit stretch" in said
    words = [str(word).replace("out", "again") if word == tmp_path / "out" else word for word in words]
    assert ddim(name, *words, "--fit", "stretch") in (0, 1)
    assert not [line for line in notes(capsys) if "cropped" in line]
    assert ddim(name, *words, "--fit", "exact") == 2


def test_pictures_of_several_sizes_without_a_size(
    tmp_path: Path, wide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(wide / "z.png")
    capsys.readouterr()
    assert ddim("statistics", wide, "--out", tmp_path / "s.safetensors") == 2
    assert "--size" in capsys.readouterr().err
    assert ddim("statistics", wide, "--fit", "stretch", "--out", tmp_path / "s.safetensors") == 2


def test_a_fit_is_no_setting_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a bad bean " * 200)
    given = ["--preset", "tinyshakespeare", "--fit", "crop", "--out", tmp_path / "r"]
    assert ddim("train", tmp_path / "a.txt", *given) == 2


def test_a_run_remembers_its_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    said = capsys.readouterr().err
    assert "--label-column" in said
    assert "c: " in said
    assert not (tmp_path / "r").exists()
    assert ddim("train", tmp_path / "c", "--label-column", "fine", *run) == 0
    about = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (about["label_column"], about["model"]["network"]["classes"]) == ("fine", 4)
    assert ddim("train", tmp_path / "c", "--label-column", "rough", *run) == 2
    assert ddim("train", tmp_path / "c", "--label-column", "fine", "--no-labels", *run) == 2
