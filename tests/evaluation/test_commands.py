"""`evaluate`, `reproduce`, `distance` and `statistics` as a user meets them."""

from __future__ import annotations

import contextlib
import csv
import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim.evaluation.fidelity import installed
from ddim.evaluation.report import budget
from ddim.evaluation.report import paper as published
from ddim.evaluation.report.page import table_1
from ddim.model.config import ScheduleConfig
from evaluation.kit import random_pictures, save_script
from models import contents, ddim, process, save_tiny, tiny_model

NAMES = ("evaluate.json", "evaluate.csv")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    short = tiny_model()
    short.config = short.config.model_copy(update={"schedule": ScheduleConfig(T=60, beta_end=0.3)})
    short.save(root / "model")
    save_tiny(root / "labelled", classes=3)
    save_script(root / "small.pt")
    save_script(root / "wide.pt", features=9)
    for folder, count in (("data/train", 90), ("data/test", 40), ("one", 1)):
        (root / folder).mkdir(parents=True)
        for index, picture in enumerate(random_pictures(count, seed=len(folder))):
            Image.fromarray(picture[..., 0]).save(root / folder / f"{index:03d}.png")
    for folder in ("empty", "stuff", "mixed"):
        (root / folder).mkdir()
    (root / "stuff/notes.txt").write_text("mine")
    Image.new("L", (8, 8)).save(root / "mixed/a.png")
    Image.new("L", (9, 8)).save(root / "mixed/b.png")
    words = ("--extractor", root / "small.pt")
    assert ddim("statistics", root / "data", "--out", root / "train.safetensors", *words) == 0
    assert ddim("statistics", root / "data", "--split", "test", "--out", root / "test.safetensors", *words) == 0
    wide = ("--extractor", root / "wide.pt")
    assert ddim("statistics", root / "data", "--out", root / "wide.safetensors", *wide) == 0
    return root


def evaluate(place: Path, out: Path, *words: object) -> tuple[object, ...]:
    plain = ("evaluate", place / "model", place / "data", "--extractor", place / "small.pt", "--out", out)
    return (*plain, *(words or ("--steps", "2,4", "--eta", "0,1,hat", "-n", "80,4:1=0")))


def test_evaluate_writes_the_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ddim(*evaluate(place, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out/evaluate.json").read_bytes())
    assert [(c["row"], c["steps"], c["n"]) for c in found["cells"]] == [
        ("0", 2, 80), ("1", 2, 80), ("hat", 2, 80), ("0", 4, 80), ("hat", 4, 80)
    ]  # fmt: skip
    assert found["cells"][0]["tau"] == [30, 60]
    assert found["metric"] == "FD(small)"
    assert "FID" not in printed
    assert re.search(r"eta = 1 +\S+ \+- \S+ +-", printed)
    assert found["consistency"][0].items() >= {"row": "0", "a": 2, "b": 4, "n": 80}.items()
    rows = [*csv.DictReader((tmp_path / "out/evaluate.csv").open())]
    assert [float(row["fd"]) for row in rows] == [c["fd"] for c in found["cells"]]
    assert all((c["kid"] is None) != installed() for c in found["cells"])
    times = json.loads((tmp_path / "out/timing.json").read_bytes())["cells"]
    assert all(t["seconds_per_image"] > 0 for t in times)
    assert "seconds" not in json.dumps(found)
    assert Image.open(tmp_path / "out/evaluate.png").width > 800
    before = {name: (tmp_path / "out" / name).read_bytes() for name in NAMES}
    assert ddim(*evaluate(place, tmp_path / "out")) == 0
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in NAMES}
    assert not list((tmp_path / "out").rglob("0*.png"))


RESTLESS = "from ddim.evaluation import accumulate; accumulate.SAVE_EVERY = 0.0; from ddim.cli.main import main; main()"


def killed(words: tuple[object, ...], out: Path, seconds: float) -> bool:
    """Start a command that writes after every chunk, kill it so long after its first cell; whether it was at work."""
    (python, *_), env = process(*words)
    command = [python, "-c", RESTLESS, *(str(word) for word in words)]
    running = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not list((out / "cells").glob("*.safetensors")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(seconds)
    running.kill()
    return running.wait() == -signal.SIGKILL


def check_kills(place: Path, tmp_path: Path, times: int, n: int) -> None:
    """Kill the command at random moments of its work; then let it end, and hold it against one left alone."""
    words, draw = ("--steps", "10,20", "--eta", "0,hat", "-n", n), random.Random(n)
    begun = time.monotonic()
    assert ddim(*evaluate(place, tmp_path / "whole", *words)) == 0
    lasts, hits = time.monotonic() - begun, 0
    for _ in range(times):
        wait = draw.uniform(0.0, lasts / times / 2)
        hits += killed(evaluate(place, tmp_path / "cut", *words), tmp_path / "cut", wait)
    assert hits >= max(1, times // 2)
    assert ddim(*evaluate(place, tmp_path / "cut", *words)) == 0
    for name in NAMES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_once_the_table_comes_out_the_same(place: Path, tmp_path: Path) -> None:
    check_kills(place, tmp_path, 1, 200)


@pytest.mark.heavy
@pytest.mark.timeout(1500)
def test_killed_ten_times_the_table_comes_out_the_same(place: Path, tmp_path: Path) -> None:
    check_kills(place, tmp_path, 10, 600)


def test_distance_of_folders_and_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = ("--extractor", place / "small.pt")
    assert (
        ddim("distance", place / "data", place / "data", "--against-split", "test", *space, "--out", tmp_path / "a")
        == 0
    )
    assert ddim("distance", place / "train.safetensors", place / "test.safetensors", "--out", tmp_path / "b") == 0
    a, b = (json.loads((tmp_path / name).read_bytes()) for name in "ab")
    assert a == b
    assert a["fd"] > 0
    assert ddim("distance", place / "data", place / "train.safetensors", *space, "--out", tmp_path / "c") == 0
    assert abs(json.loads((tmp_path / "c").read_bytes())["fd"]) < 1e-3
    assert "FD(small)" in capsys.readouterr().out


REPRODUCE = "reproduce {0}/model {0}/data --steps 2,4 --eta 0,0.5,hat -n 20 --pictures 5 --extractor {0}/small.pt"


def test_reproduce_makes_a_page_that_needs_nothing(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    words = REPRODUCE.format(place).split()
    assert ddim(*words, "--budget", "10min", "--out", out) == 0
    page = (out / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert not re.search(r"https?://|@import|url\(|<script|<link", re.sub(r"data:[^\"']+", "", page))
    for part in ("Table 1", "Table 2", "Figure 3", "Figure 4", "Figure 5", "Figure 6", "Every choice"):
        assert part in page
    assert page.count("10min") >= 6
    bare = re.sub(r"data:[^\"']+", "", page)
    assert not {"NaN", "None", "nan", "inf"} & set(re.findall(r"\w+", bare))
    report = json.loads((out / "report.json").read_bytes())
    assert [row["pictures"] for row in report["table_2"]] == [5] * len(report["table_2"])
    assert report["table_1"]["cells"] == json.loads((out / "evaluate.json").read_bytes())["cells"]
    assert '"S = 4": "15, 30, 45, 60"' in page.replace("&#34;", '"')
    before = contents(out)
    assert ddim(*words, "--budget", "10min", "--out", out) == 0
    after = contents(out)
    same = {name for name in before if before[name] == after[name]}
    assert before.keys() - same <= {"timing.json", "evaluate.png", "pictures/quality.svg", "report.html"}
    assert ddim(*words, "--budget", "1h", "--out", out) == 2


def test_reproduce_goes_on_after_kills(place: Path, tmp_path: Path) -> None:
    words = (*REPRODUCE.format(place).split(), "--budget", "full")
    assert ddim(*words, "--out", tmp_path / "whole") == 0
    assert killed((*words, "--out", tmp_path / "cut"), tmp_path / "cut", 0.0)
    lines = (tmp_path / "whole/round-trips.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut/round-trips.jsonl").write_bytes(lines[0] + lines[1][:40])  # as a kill leaves it
    assert ddim(*words, "--out", tmp_path / "cut") == 0
    for name in (*NAMES, "report.json", "pictures/trips.png", "pictures/walks.png", "round-trips.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for other in (("--test-split", "train"), ("--grid", "quadratic"), ("--seed", "1"), ("--pictures", "6")):
        assert ddim(*words, *other, "--out", tmp_path / "whole") == 2


def test_samples_may_be_kept_inside_the_folder(place: Path, tmp_path: Path) -> None:
    plain = evaluate(place, tmp_path / "out", "--steps", "2", "--eta", "1.0", "-n", "9")
    words = (*plain, "--images", tmp_path / "out/images")
    assert [ddim(*words), ddim(*words)] == [0, 0]
    assert len(list((tmp_path / "out/images/S2-1").glob("*.png"))) == 9


EVALUATE = "evaluate {0}/model {0}/data --steps 2 -n 9 --extractor {0}/small.pt --out {0}/out"
BAD: dict[str, tuple[str, str]] = {
    "empty folder": ("distance {0}/empty {0}/data --extractor {0}/small.pt", "empty"),
    "no folder": ("distance {0}/nowhere {0}/data --extractor {0}/small.pt", "nowhere"),
    "one picture": ("distance {0}/one {0}/data --extractor {0}/small.pt", "one"),
    "statistics of one picture": (
        "statistics {0}/one --out {0}/out.safetensors --extractor {0}/small.pt",
        "statistics",
    ),
    "mixed sizes": ("distance {0}/mixed {0}/data --extractor {0}/small.pt", "mixed"),
    "size x": ("statistics {0}/data --size 8x --out {0}/out.safetensors --extractor {0}/small.pt", "--size 8x"),
    "size of two channels": ("statistics {0}/data --size 8x8x2 --out {0}/out.safetensors", "--size 8x8x2"),
    "no extractor fits": ("statistics {0}/data --out {0}/out.safetensors", "extractor"),
    "unknown extractor": ("statistics {0}/data --extractor x --out {0}/out.safetensors", "extractor x"),
    "extractor of another size": ("statistics {0}/data --extractor digits28 --out {0}/out.safetensors", "28x28x1"),
    "weights for another extractor": (
        "statistics {0}/data --extractor {0}/small.pt --inception-weights x --out {0}/out.safetensors",
        "inception weights",
    ),
    "missing weights": ("statistics {0}/data --inception-weights {0}/no.pth --out {0}/out.safetensors", "no.pth"),
    "wrong weights": ("statistics {0}/data --inception-weights {0}/small.pt --out {0}/out.safetensors", "SHA-256"),
    "other dimension": ("distance {0}/train.safetensors {0}/wide.safetensors", "statistics"),
    "other dimension, any": ("distance {0}/train.safetensors {0}/wide.safetensors --any-protocol", "statistics"),
    "no statistics file": ("distance {0}/no.safetensors {0}/data", "no.safetensors"),
    "a model as statistics": ("distance {0}/model/model.safetensors {0}/test.safetensors", "model/model.safetensors"),
    "split of a statistics file": ("distance {0}/train.safetensors {0}/data --split test", "train.safetensors"),
    "no such split": (EVALUATE + " --split validation", "split"),
    "n x": (EVALUATE + " -n x", "-n x"),
    "n 1": (EVALUATE + " -n 1", "-n 1"),
    "steps x": (EVALUATE + " --steps x", "--steps"),
    "steps 0": (EVALUATE + " --steps 0", "steps 0"),
    "eta x": (EVALUATE + " --eta x", "sampler 'x'"),
    "eta -1": (EVALUATE + " --eta -1", "sampler '-1'"),
    "unknown sampler": (EVALUATE + " --sampler x", "sampler 'x'"),
    "unknown grid": (EVALUATE + " --grid x", "--grid"),
    "seed -1": (EVALUATE + " --seed -1", "seed -1"),
    "a folder of something else": (
        "evaluate {0}/model {0}/data --steps 2 --extractor {0}/small.pt --out {0}/stuff",
        "stuff",
    ),
    "report in a folder of something else": (
        "reproduce {0}/model {0}/data --extractor {0}/small.pt --out {0}/stuff",
        "stuff",
    ),
    "report of an eta that is none": (REPRODUCE + " --eta x --out {0}/out", "sampler 'x'"),
    "more round trips than pictures": (REPRODUCE + " --pictures 41 --out {0}/out", "--pictures 41"),
    "n of no cell": (EVALUATE + " -n 9,1000=5", "1000=5"),
    "times for a table": (EVALUATE + " --grid 1,2", "--grid"),
    "no such device": (
        "statistics {0}/data --extractor {0}/small.pt --device x --out {0}/out.safetensors",
        "--device x",
    ),
    "extractor of two statistics files": (
        "distance {0}/train.safetensors {0}/test.safetensors --extractor {0}/small.pt",
        "--extractor",
    ),
    "label without labels": (EVALUATE + " --label 1", "labels"),
    "each label without labels": (EVALUATE + " --label each", "label each"),
    "no label": (EVALUATE + " --label cat", "--label cat"),
    "micro-batch 0": (EVALUATE + " --micro-batch 0", "micro-batch 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, word = BAD[name]
    before = contents(place)
    assert ddim(*line.format(place).split()) == 2
    shown = capsys.readouterr()
    complaint = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(complaint) == 1
    assert word in complaint[0]
    assert ";" in complaint[0]
    assert "Traceback" not in shown.err
    assert contents(place).keys() == before.keys()
    assert not (place / "out").exists()


def test_a_budget_gives_every_cell_of_a_column_the_same_number() -> None:
    for per_second, seconds in ((50, 600), (300, 600), (300, 3600), (20000, 3600), (1e9, 3600)):
        made = budget.fit(per_second, seconds, [10, 20, 50, 100, 1000], 5, 10000, 1000)
        calls = 5 * int(made.samples) * sum(made.steps)
        assert calls <= per_second * seconds
        assert 2 <= int(made.samples) <= 50000
        assert made.images <= 10000
        if len(made.steps) < 5:
            assert "of Table 1" in made.left_out
    assert made.steps == (10, 20, 50, 100, 1000)
    assert (int(made.samples), made.images, made.left_out) == (50000, 10000, "")


def test_the_papers_figures_are_shown_beside_the_same_data_only() -> None:
    names = {"cifar10": "CIFAR-10", "uoft-cs/cifar10": "CIFAR-10", "CIFAR-10": "CIFAR-10", "celeba_10k": "CelebA"}
    names |= {"mnist": None, "cifar100": None, "celebahq": None}
    assert {name: published.data_set(name) for name in names} == names
    cell = {"row": "0", "steps": 10, "n": 5, "fd": 3.0, "fd_error": None}
    for paper, shown in (("CIFAR-10", 13.36), ("CelebA", 17.33), (None, None)):
        assert table_1({"cells": [cell]}, paper)["rows"][0]["cells"][0]["paper"] == shown


def test_numbers_in_the_json_are_numbers(place: Path, tmp_path: Path) -> None:
    """Two samples have no jackknife error and no limit: null, not NaN."""
    assert ddim(*evaluate(place, tmp_path / "out", "--steps", "2", "--eta", "0", "-n", "2")) == 0
    text = (tmp_path / "out/evaluate.json").read_text()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    assert json.loads(text)["cells"][0]["fd_error"] is None
    assert np.isfinite(json.loads(text)["cells"][0]["fd"])
