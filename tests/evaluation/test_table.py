"""Table 1 for a model: its cells, sample i from the same x_T in all of them, and bit-exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddim import evaluation
from ddim._io.safetensors import read_tensors, write_tensors
from ddim.data.pixels import to_uint8
from ddim.errors import DdimError
from ddim.evaluation import Statistics, fid_table
from ddim.evaluation.accumulate import FeatureStats
from ddim.evaluation.consistency import consistency
from ddim.evaluation.counts import Counts
from ddim.evaluation.moments import Moments
from ddim.evaluation.sample_folder import generate
from ddim.evaluation.statistics import read
from evaluation.kit import random_images, small
from models import contents, tiny_model

MODEL = tiny_model()
EXTRACTOR = small()
DATA = evaluation.measure(random_images(100), EXTRACTOR)


def run(
    folder: Path, table: list[fid_table.TableCell], stop: int = 0, images: Path | None = None
) -> list[fid_table.Measured]:
    """Fill a table, or stop after `stop` steps."""
    steps = fid_table.iter_fill(MODEL, table, DATA, EXTRACTOR, folder, images=images)
    for step in range(1, 10_000):
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        if step == stop:
            steps.close()
            return []
    raise AssertionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50", {(10, "0"): 50, (1000, "hat"): 50}),
        ("50,1000=5", {(10, "0"): 50, (1000, "0"): 5}),
        ("50,1000=5,1000:hat=0", {(1000, "0"): 5, (1000, "hat"): 0, (10, "hat"): 50}),
        ("1000=5,50", {(1000, "0"): 50}),
    ],
)
def test_the_syntax_of_counts(text: str, expected: dict[tuple[int, str], int]) -> None:
    n = Counts(text)
    assert {key: n(*key) for key in expected} == expected


@pytest.mark.parametrize("text", ["9,1000=5", "9,2:0.2=5", "9,4:hat=5"])
def test_counts_for_no_cell_are_errors(text: str) -> None:
    with pytest.raises(DdimError, match=r"^-n"):
        fid_table.cells(MODEL, [2], ["0", "hat"], Counts(text), "linear")


@pytest.mark.parametrize("text", ["", "x", "5=x", "5:0=", "-3", "1", "10=1"])
def test_invalid_counts_are_errors(text: str) -> None:
    with pytest.raises(DdimError, match="-n"):
        Counts(text)(20, "0")


def test_cells_have_the_plans_of_sampling() -> None:
    table = fid_table.cells(MODEL, [4, 2], ["0", "0.5", "hat", "auto", "unipc3"], Counts("10,4:hat=0"), "linear")
    assert [(c.steps, c.row) for c in table] == [
        *[(2, row) for row in ("0", "0.5", "hat", "auto", "unipc3")],
        *[(4, row) for row in ("0", "0.5", "auto", "unipc3")],
    ]
    plans = {(c.steps, c.row): c.plan for c in table}
    assert plans[2, "0.5"] == MODEL.plan(2, "linear", eta=0.5)
    assert plans[2, "hat"] == MODEL.plan(2, "linear", sigma="hat")
    assert plans[2, "hat"].clip_x0
    assert plans[4, "auto"] == MODEL.plan(4, sampler="auto")
    assert plans[4, "unipc3"] == MODEL.plan(4, "linear", sampler="unipc3")


@pytest.mark.parametrize(
    ("steps", "rows", "n", "word"),
    [
        ([2, 2], ["0"], "9", r"^--steps 2,2: "),
        ([2], ["0", "0"], "9", r"^--eta 0,0: "),
        ([2], [], "9", r"^--eta : "),
        ([2], ["0", "0.0"], "9", r"^--eta 0,0: "),
        ([2], ["0"], "0", r"^the table: "),
        ([2], ["0x"], "9", "--eta 0x"),
        ([2], ["nonsense"], "9", "sampler 'nonsense'"),
        ([0], ["0"], "9", "steps 0"),
        ([2], ["9"], "9", "sigma"),
    ],
)
def test_invalid_tables_are_errors(steps: list[int], rows: list[str], n: str, word: str) -> None:
    with pytest.raises(DdimError, match=word):
        fid_table.cells(MODEL, steps, rows, Counts(n), "linear")


def test_samples_equal_those_of_bulk_sampling(tmp_path: Path) -> None:
    """The same images as from `ddim sample`, and the same features from its folder."""
    table = fid_table.cells(MODEL, [3], ["1"], Counts("70"), "linear")
    [measured] = run(tmp_path / "cells", table)
    blocks = MODEL.sample_blocks(table[0].plan, range(70), 0)
    images = to_uint8(torch.cat([*blocks]))
    assert np.array_equal(measured.gathered.images, images)
    assert torch.equal(measured.gathered.features, EXTRACTOR(images))
    [stored] = run(tmp_path / "others", table, images=tmp_path / "images")
    assert torch.equal(stored.gathered.features, measured.gathered.features)
    assert (stored.figures, stored.gathered.timed, measured.gathered.timed) == (measured.figures, 0, 70)
    for _ in generate(MODEL, table[0].plan, tmp_path / "sampled", 70, name=""):
        pass
    pngs = [{k: v for k, v in contents(p).items() if k.endswith(".png")} for p in tmp_path.glob("*/S3-1")]
    assert pngs == [{k: v for k, v in contents(tmp_path / "sampled").items() if k.endswith(".png")}]
    [repeated] = run(tmp_path / "third", table, images=tmp_path / "images")  # read from the folder
    assert torch.equal(repeated.gathered.features, measured.gathered.features)
    assert not list((tmp_path / "cells").glob("*.png"))


def test_all_cells_start_from_the_same_noise(tmp_path: Path) -> None:
    table = fid_table.cells(MODEL, [8, 16], ["0", "0.5"], Counts("20"), "linear")
    gathered = {(m.cell.steps, m.cell.row): m.gathered for m in run(tmp_path, table)}
    deterministic, noisy = (
        consistency(gathered[8, "0"], gathered[16, "0"]),
        consistency(gathered[8, "0"], gathered[16, "0.5"]),
    )
    assert deterministic.correlation > 0.9 > deterministic.unrelated
    assert deterministic.correlation > noisy.correlation
    assert deterministic.ratio < noisy.ratio


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_table_resumed_after_a_stop_is_bit_exact(tmp_path: Path, stop: int) -> None:
    table = fid_table.cells(MODEL, [1, 2], ["0", "hat"], Counts("100,2:hat=70"), "linear")
    whole = run(tmp_path / "whole", table)
    run(tmp_path / "cut", table, stop)
    again = run(tmp_path / "cut", table)
    assert [m.figures for m in again] == [m.figures for m in whole]
    for a, b in zip(again, whole, strict=True):
        assert torch.equal(a.gathered.features, b.gathered.features)
        assert np.array_equal(a.gathered.images, b.gathered.images)


def test_cell_files_are_named_by_their_settings(tmp_path: Path) -> None:
    names = []
    for seed, rows in ((0, ["0"]), (1, ["0"]), (0, ["0", "0.2"])):
        table = fid_table.cells(MODEL, [2], rows, Counts("10"), "linear")
        steps = fid_table.iter_fill(MODEL, table, DATA, EXTRACTOR, tmp_path, seed)
        progress = [*steps]
        names.append(sorted(path.name for path in tmp_path.glob("*.safetensors")))
    assert [len(files) for files in names] == [1, 2, 3]
    assert progress[0].resumed == 20  # ten samples of two evaluations each existed
    assert progress[-1].nfe == 40


def test_the_time_per_sample_is_measured(tmp_path: Path) -> None:
    table = fid_table.cells(MODEL, [2], ["0"], Counts("10"), "linear")
    [measured] = run(tmp_path, table)
    value, timed = fid_table.seconds(MODEL, measured.cell, measured.gathered)
    assert value > 0
    assert timed == 10
    untimed = FeatureStats(measured.gathered.moments, measured.gathered.features, measured.gathered.images)
    value, timed = fid_table.seconds(MODEL, measured.cell, untimed)
    assert value > 0
    assert timed == MODEL.micro_batch


def test_samples_are_written_for_cells_that_were_already_measured(tmp_path: Path) -> None:
    table = fid_table.cells(MODEL, [2], ["0"], Counts("10"), "linear")
    run(tmp_path / "cells", table)
    run(tmp_path / "cells", table, images=tmp_path / "images")
    assert len(list((tmp_path / "images/S2-0").glob("*.png"))) == 10


def test_a_folder_of_other_samples_is_an_error_before_sampling(tmp_path: Path) -> None:
    table = fid_table.cells(MODEL, [2, 4], ["0"], Counts("10"), "linear")
    fid_table.check(MODEL, table, 0, images=tmp_path)
    with pytest.raises(DdimError, match=r"S2-0: .*\bseed\b"):
        fid_table.check(MODEL, table, 1, images=tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_metrics_are_recomputed_when_torch_fidelity_becomes_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = fid_table.cells(MODEL, [2], ["0"], Counts("10"), "linear")
    whole = run(tmp_path, table)[0].figures
    with monkeypatch.context() as patched:
        patched.setattr(fid_table.fidelity, "installed", lambda: False)
        assert run(tmp_path, table)[0].figures == whole | dict.fromkeys(("kid", "kid_std", "precision", "recall"))
    assert run(tmp_path, table)[0].figures == whole
    assert whole["kid"] is not None


def statistics(images: np.ndarray) -> FeatureStats:
    return FeatureStats(Moments(6), EXTRACTOR(images), images)


def test_consistency_of_identical_and_unrelated_images() -> None:
    images = random_images(200)
    same = consistency(statistics(images), statistics(images))
    assert (same.correlation, same.ratio) == (pytest.approx(1), 0)
    other = consistency(statistics(images), statistics(random_images(200, seed=9)))
    assert abs(other.correlation - other.unrelated) < 0.15
    assert other.ratio == pytest.approx(1, abs=0.15)
    inverted = consistency(statistics(images), statistics(255 - images))
    assert inverted.correlation == pytest.approx(-1)
    assert consistency(statistics(np.zeros_like(images)), statistics(images)).correlation == 0
    flat = consistency(statistics(np.zeros_like(images)), statistics(np.zeros_like(images)))
    assert (flat.correlation, flat.ratio) == (0, None)
    with pytest.raises(DdimError, match=r"^consistency: "):
        consistency(statistics(images[:1]), statistics(images))


def test_statistics_do_not_depend_on_the_image_source() -> None:
    images = random_images(100)
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    sources: list[Any] = [images, torch.from_numpy(images), floats, iter([images[:30], floats[30:]])]
    for source in sources:
        stats = evaluation.measure(source, EXTRACTOR)
        assert torch.equal(stats.features, DATA.features)
        assert stats.protocol.model_copy(update={"data": DATA.protocol.data}) == DATA.protocol


@pytest.mark.parametrize(
    ("images", "word"),
    [
        ([], r"^images: "),
        (np.zeros((0, 8, 8, 1), np.uint8), r"^images: "),
        ([random_images(2), random_images(2, 9)], r"^images: "),
        (np.zeros((2, 8, 8)), r"^images: "),
        (torch.full((2, 1, 8, 8), torch.nan), r"^images: "),
        (np.zeros((2, 8, 8, 1), np.int64), "int64"),
        (torch.full((2, 1, 8, 8), 255.0), r"^images: .*\b255\b"),
    ],
)
def test_invalid_images_are_errors(images: Any, word: str) -> None:
    with pytest.raises(DdimError, match=word):
        evaluation.measure(images, EXTRACTOR)


def test_statistics_files_round_trip(tmp_path: Path) -> None:
    DATA.save(tmp_path / "s.safetensors")
    loaded = read(tmp_path / "s.safetensors")
    assert loaded.protocol == DATA.protocol
    assert torch.equal(loaded.features, DATA.features)
    assert evaluation.frechet(loaded.moments, DATA.moments) == pytest.approx(0, abs=1e-12)


def damage(path: Path, **changes: Any) -> None:
    tensors, meta = read_tensors(path)
    meta |= changes.pop("meta", {})
    write_tensors(path, {k: v for k, v in (tensors | changes).items() if v is not None}, meta)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mean": torch.full((6,), torch.nan, dtype=torch.float64)}, r"s\.safetensors: "),
        ({"scatter": torch.zeros(5, 5, dtype=torch.float64)}, r"s\.safetensors: "),
        ({"features": torch.zeros(3, 5)}, r"s\.safetensors: "),
        ({"mean": torch.zeros(6)}, r"s\.safetensors: .*\bfloat64\b"),
        ({"mean": None}, r"s\.safetensors: "),
        ({"meta": {"format": "x"}}, r"s\.safetensors: "),
        ({"meta": {"protocol": {"data": "x"}}}, r"s\.safetensors: "),
        ({"meta": {"protocol": None}}, r"s\.safetensors: "),
    ],
)
def test_a_damaged_statistics_file_is_an_error(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    path = tmp_path / "s.safetensors"
    Statistics(DATA.moments, DATA.features, DATA.protocol).save(path)
    damage(path, **changes)
    with pytest.raises(DdimError, match=word):
        read(path)


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
def test_metrics_of_an_older_format_are_recomputed(tmp_path: Path) -> None:
    table = fid_table.cells(MODEL, [2], ["0"], Counts("10"), "linear")
    [measured] = run(tmp_path, table)
    [stored] = tmp_path.glob("*.json")
    for text in ("{", json.dumps({"asked": 1, "figures": {}})):
        stored.write_text(text)
        assert run(tmp_path, table)[0].figures == measured.figures
