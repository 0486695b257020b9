"""Table 1 for a model: the cells asked for, sample i from one x_T in all of them, the same end however it is cut."""

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
from evaluation.kit import random_pictures, small
from models import contents, tiny_model

MODEL = tiny_model()
SPACE = small()
DATA = evaluation.measure(random_pictures(100), SPACE)


def run(
    folder: Path, some: list[fid_table.TableCell], stop: int = 0, images: Path | None = None
) -> list[fid_table.Measured]:
    """Fill a table, or stop after so many steps."""
    steps = fid_table.iter_fill(MODEL, some, DATA, SPACE, folder, images=images)
    for at in range(1, 10_000):
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        if at == stop:
            steps.close()
            return []
    raise AssertionError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("50", {(10, "0"): 50, (1000, "hat"): 50}),
        ("50,1000=5", {(10, "0"): 50, (1000, "0"): 5}),
        ("50,1000=5,1000:hat=0", {(1000, "0"): 5, (1000, "hat"): 0, (10, "hat"): 50}),
        ("1000=5,50", {(1000, "0"): 50}),
    ],
)
def test_the_grammar_of_counts(text: str, found: dict[tuple[int, str], int]) -> None:
    n = Counts(text)
    assert {key: n(*key) for key in found} == found


@pytest.mark.parametrize("text", ["9,1000=5", "9,2:0.2=5", "9,4:hat=5"])
def test_counts_that_fit_no_cell(text: str) -> None:
    with pytest.raises(DdimError, match=r"^-n"):
        fid_table.cells(MODEL, [2], ["0", "hat"], Counts(text), "linear")


@pytest.mark.parametrize("text", ["", "x", "5=x", "5:0=", "-3", "1", "10=1"])
def test_counts_that_cannot_be_read(text: str) -> None:
    with pytest.raises(DdimError, match="-n"):
        Counts(text)(20, "0")


def test_the_cells_are_the_plans_that_sampling_runs() -> None:
    some = fid_table.cells(MODEL, [4, 2], ["0", "0.5", "hat", "auto", "unipc3"], Counts("10,4:hat=0"), "linear")
    assert [(c.steps, c.row) for c in some] == [
        *[(2, row) for row in ("0", "0.5", "hat", "auto", "unipc3")],
        *[(4, row) for row in ("0", "0.5", "auto", "unipc3")],
    ]
    plans = {(c.steps, c.row): c.plan for c in some}
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
def test_tables_that_cannot_be_made(steps: list[int], rows: list[str], n: str, word: str) -> None:
    with pytest.raises(DdimError, match=word):
        fid_table.cells(MODEL, steps, rows, Counts(n), "linear")


def test_samples_are_those_of_bulk_sampling(tmp_path: Path) -> None:
    """The same pictures as `ddim sample` writes, and the same features from its folder."""
    some = fid_table.cells(MODEL, [3], ["1"], Counts("70"), "linear")
    [made] = run(tmp_path / "cells", some)
    blocks = MODEL.sample_blocks(some[0].plan, range(70), 0)
    pictures = to_uint8(torch.cat([*blocks]))
    assert np.array_equal(made.gathered.images, pictures)
    assert torch.equal(made.gathered.features, SPACE(pictures))
    [kept] = run(tmp_path / "others", some, images=tmp_path / "images")
    assert torch.equal(kept.gathered.features, made.gathered.features)
    assert (kept.figures, kept.gathered.timed, made.gathered.timed) == (made.figures, 0, 70)
    for _ in generate(MODEL, some[0].plan, tmp_path / "sampled", 70, name=""):
        pass
    pngs = [{k: v for k, v in contents(p).items() if k.endswith(".png")} for p in tmp_path.glob("*/S3-1")]
    assert pngs == [{k: v for k, v in contents(tmp_path / "sampled").items() if k.endswith(".png")}]
    [again] = run(tmp_path / "third", some, images=tmp_path / "images")  # taken from the folder
    assert torch.equal(again.gathered.features, made.gathered.features)
    assert not list((tmp_path / "cells").glob("*.png"))


def test_every_cell_starts_from_the_same_noise(tmp_path: Path) -> None:
    some = fid_table.cells(MODEL, [8, 16], ["0", "0.5"], Counts("20"), "linear")
    made = {(m.cell.steps, m.cell.row): m.gathered for m in run(tmp_path, some)}
    alike, unlike = consistency(made[8, "0"], made[16, "0"]), consistency(made[8, "0"], made[16, "0.5"])
    assert alike.correlation > 0.9 > alike.unrelated
    assert alike.correlation > unlike.correlation
    assert alike.ratio < unlike.ratio


@pytest.mark.parametrize("stop", range(1, 9))
def test_stopped_anywhere_the_table_comes_out_the_same(tmp_path: Path, stop: int) -> None:
    some = fid_table.cells(MODEL, [1, 2], ["0", "hat"], Counts("100,2:hat=70"), "linear")
    whole = run(tmp_path / "whole", some)
    run(tmp_path / "cut", some, stop)
    again = run(tmp_path / "cut", some)
    assert [m.figures for m in again] == [m.figures for m in whole]
    for a, b in zip(again, whole, strict=True):
        assert torch.equal(a.gathered.features, b.gathered.features)
        assert np.array_equal(a.gathered.images, b.gathered.images)


def test_cells_are_found_by_what_they_depend_on(tmp_path: Path) -> None:
    names = []
    for seed, rows in ((0, ["0"]), (1, ["0"]), (0, ["0", "0.2"])):
        some = fid_table.cells(MODEL, [2], rows, Counts("10"), "linear")
        steps = fid_table.iter_fill(MODEL, some, DATA, SPACE, tmp_path, seed)
        standings = [*steps]
        names.append(sorted(path.name for path in tmp_path.glob("*.safetensors")))
    assert [len(found) for found in names] == [1, 2, 3]
    assert standings[0].found == 20  # ten samples of two calls were there
    assert standings[-1].nfe == 40


def test_the_time_of_a_sample_is_measured(tmp_path: Path) -> None:
    some = fid_table.cells(MODEL, [2], ["0"], Counts("10"), "linear")
    [made] = run(tmp_path, some)
    value, timed = fid_table.seconds(MODEL, made.cell, made.gathered)
    assert value > 0
    assert timed == 10
    untimed = FeatureStats(made.gathered.moments, made.gathered.features, made.gathered.images)
    value, timed = fid_table.seconds(MODEL, made.cell, untimed)
    assert value > 0
    assert timed == MODEL.micro_batch


def test_samples_are_written_for_cells_whose_figures_are_known(tmp_path: Path) -> None:
    some = fid_table.cells(MODEL, [2], ["0"], Counts("10"), "linear")
    run(tmp_path / "cells", some)
    run(tmp_path / "cells", some, images=tmp_path / "images")
    assert len(list((tmp_path / "images/S2-0").glob("*.png"))) == 10


def test_folders_of_other_samples_are_refused_before_any_is_made(tmp_path: Path) -> None:
    some = fid_table.cells(MODEL, [2, 4], ["0"], Counts("10"), "linear")
    fid_table.check(MODEL, some, 0, images=tmp_path)
    with pytest.raises(DdimError, match=r"S2-0: .*\bseed\b"):
        fid_table.check(MODEL, some, 1, images=tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_figures_are_made_again_when_more_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = fid_table.cells(MODEL, [2], ["0"], Counts("10"), "linear")
    whole = run(tmp_path, some)[0].figures
    with monkeypatch.context() as patched:
        patched.setattr(fid_table.fidelity, "installed", lambda: False)
        assert run(tmp_path, some)[0].figures == whole | dict.fromkeys(("kid", "kid_std", "precision", "recall"))
    assert run(tmp_path, some)[0].figures == whole
    assert whole["kid"] is not None


def gathered(pictures: np.ndarray) -> FeatureStats:
    return FeatureStats(Moments(6), SPACE(pictures), pictures)


def test_consistency_of_the_same_and_of_unrelated_pictures() -> None:
    pictures = random_pictures(200)
    same = consistency(gathered(pictures), gathered(pictures))
    assert (same.correlation, same.ratio) == (pytest.approx(1), 0)
    other = consistency(gathered(pictures), gathered(random_pictures(200, seed=9)))
    assert abs(other.correlation - other.unrelated) < 0.15
    assert other.ratio == pytest.approx(1, abs=0.15)
    turned = consistency(gathered(pictures), gathered(255 - pictures))
    assert turned.correlation == pytest.approx(-1)
    assert consistency(gathered(np.zeros_like(pictures)), gathered(pictures)).correlation == 0
    flat = consistency(gathered(np.zeros_like(pictures)), gathered(np.zeros_like(pictures)))
    assert (flat.correlation, flat.ratio) == (0, None)
    with pytest.raises(DdimError, match=r"^consistency: "):
        consistency(gathered(pictures[:1]), gathered(pictures))


def test_pictures_from_anywhere_give_the_same_statistics() -> None:
    pictures = random_pictures(100)
    floats = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    ways: list[Any] = [pictures, torch.from_numpy(pictures), floats, iter([pictures[:30], floats[30:]])]
    for way in ways:
        made = evaluation.measure(way, SPACE)
        assert torch.equal(made.features, DATA.features)
        assert made.protocol.model_copy(update={"data": DATA.protocol.data}) == DATA.protocol


@pytest.mark.parametrize(
    ("pictures", "word"),
    [
        ([], r"^pictures: "),
        (np.zeros((0, 8, 8, 1), np.uint8), r"^pictures: "),
        ([random_pictures(2), random_pictures(2, 9)], r"^pictures: "),
        (np.zeros((2, 8, 8)), r"^pictures: "),
        (torch.full((2, 1, 8, 8), torch.nan), r"^pictures: "),
        (np.zeros((2, 8, 8, 1), np.int64), "int64"),
        (torch.full((2, 1, 8, 8), 255.0), r"^pictures: .*\b255\b"),
    ],
)
def test_what_are_no_pictures(pictures: Any, word: str) -> None:
    with pytest.raises(DdimError, match=word):
        evaluation.measure(pictures, SPACE)


def test_a_statistics_file_is_what_was_written(tmp_path: Path) -> None:
    DATA.save(tmp_path / "s.safetensors")
    again = read(tmp_path / "s.safetensors")
    assert again.protocol == DATA.protocol
    assert torch.equal(again.features, DATA.features)
    assert evaluation.frechet(again.moments, DATA.moments) == pytest.approx(0, abs=1e-12)


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
def test_a_damaged_statistics_file_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    path = tmp_path / "s.safetensors"
    Statistics(DATA.moments, DATA.features, DATA.protocol).save(path)
    damage(path, **changes)
    with pytest.raises(DdimError, match=word):
        read(path)


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
def test_figures_of_an_older_form_are_made_again(tmp_path: Path) -> None:
    some = fid_table.cells(MODEL, [2], ["0"], Counts("10"), "linear")
    [made] = run(tmp_path, some)
    [kept] = tmp_path.glob("*.json")
    for text in ("{", json.dumps({"asked": 1, "figures": {}})):
        kept.write_text(text)
        assert run(tmp_path, some)[0].figures == made.figures
