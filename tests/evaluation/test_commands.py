"""The commands `evaluate`, `reproduce`, `distance` and `statistics`."""

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
from evaluation.kit import random_images, save_script
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
        for index, image in enumerate(random_images(count, seed=len(folder))):
            Image.fromarray(image[..., 0]).save(root / folder / f"{index:03d}.png")
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
    table = json.loads((tmp_path / "out/evaluate.json").read_bytes())
    assert [(c["row"], c["steps"], c["n"]) for c in table["cells"]] == [
        ("0", 2, 80), ("1", 2, 80), ("hat", 2, 80), ("0", 4, 80), ("hat", 4, 80)
    ]  # fmt: skip
    assert table["cells"][0]["tau"] == [30, 60]
    assert table["metric"] == "FD(small)"
    assert "FID" not in printed
    assert re.search(r"eta = 1 +\S+ \+- \S+ +-", printed)
    assert table["consistency"][0].items() >= {"row": "0", "a": 2, "b": 4, "n": 80}.items()
    rows = [*csv.DictReader((tmp_path / "out/evaluate.csv").open())]
    assert [float(row["fd"]) for row in rows] == [c["fd"] for c in table["cells"]]
    assert all((c["kid"] is None) != installed() for c in table["cells"])
    times = json.loads((tmp_path / "out/timing.json").read_bytes())["cells"]
    assert all(t["seconds_per_image"] > 0 for t in times)
    assert "seconds" not in json.dumps(table)
    assert Image.open(tmp_path / "out/evaluate.png").width > 800
    before = {name: (tmp_path / "out" / name).read_bytes() for name in NAMES}
    assert ddim(*evaluate(place, tmp_path / "out")) == 0
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in NAMES}
    assert not list((tmp_path / "out").rglob("0*.png"))


SAVE_ALWAYS = (
    "from ddim.evaluation import accumulate; accumulate.SAVE_EVERY = 0.0; from ddim.cli.main import main; main()"
)


def kill_after(words: tuple[object, ...], out: Path, seconds: float) -> bool:
    """Start a command that writes after every chunk, and kill it after its first cell; whether it was still running."""
    (python, *_), env = process(*words)
    command = [python, "-c", SAVE_ALWAYS, *(str(word) for word in words)]
    running = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not list((out / "cells").glob("*.safetensors")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(seconds)
    running.kill()
    return running.wait() == -signal.SIGKILL


def check_kills(place: Path, tmp_path: Path, times: int, n: int) -> None:
    """Kill the command at random times, complete it, and compare its files with those of an uninterrupted run."""
    words, draw = ("--steps", "10,20", "--eta", "0,hat", "-n", n), random.Random(n)
    started = time.monotonic()
    assert ddim(*evaluate(place, tmp_path / "whole", *words)) == 0
    duration, hits = time.monotonic() - started, 0
    for _ in range(times):
        wait = draw.uniform(0.0, duration / times / 2)
        hits += kill_after(evaluate(place, tmp_path / "cut", *words), tmp_path / "cut", wait)
    assert hits >= max(1, times // 2)
    assert ddim(*evaluate(place, tmp_path / "cut", *words)) == 0
    for name in NAMES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_table_resumed_after_a_kill_is_bit_exact(place: Path, tmp_path: Path) -> None:
    check_kills(place, tmp_path, 1, 200)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_table_resumed_after_ten_kills_is_bit_exact(place: Path, tmp_path: Path) -> None:
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


def test_reproduce_writes_a_self_contained_page(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    words = REPRODUCE.format(place).split()
    assert ddim(*words, "--budget", "10min", "--out", out) == 0
    page = (out / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert not re.search(r"https?://|@import|url\(|<script|<link", re.sub(r"data:[^\"']+", "", page))
    for part in ("Table 1", "Table 2", "Figure 3", "Figure 4", "Figure 5", "Figure 6", "All settings"):
        assert part in page
    assert page.count("10min") >= 6
    text = re.sub(r"data:[^\"']+", "", page)
    assert not {"NaN", "None", "nan", "inf"} & set(re.findall(r"\w+", text))
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


@pytest.mark.slow
def test_reproduce_resumes_after_a_kill(place: Path, tmp_path: Path) -> None:
    words = (*REPRODUCE.format(place).split(), "--budget", "full")
    assert ddim(*words, "--out", tmp_path / "whole") == 0
    assert kill_after((*words, "--out", tmp_path / "cut"), tmp_path / "cut", 0.0)
    lines = (tmp_path / "whole/round-trips.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut/round-trips.jsonl").write_bytes(lines[0] + lines[1][:40])  # as after a kill
    assert ddim(*words, "--out", tmp_path / "cut") == 0
    for name in (*NAMES, "report.json", "pictures/trips.png", "pictures/walks.png", "round-trips.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for other in (("--test-split", "train"), ("--grid", "quadratic"), ("--seed", "1"), ("--pictures", "6")):
        assert ddim(*words, *other, "--out", tmp_path / "whole") == 2


def test_samples_can_be_written_inside_the_output_folder(place: Path, tmp_path: Path) -> None:
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
    "unknown split": (EVALUATE + " --split validation", "split"),
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
    "report with an unknown eta": (REPRODUCE + " --eta x --out {0}/out", "sampler 'x'"),
    "more round trips than images": (REPRODUCE + " --pictures 41 --out {0}/out", "--pictures 41"),
    "n for no cell": (EVALUATE + " -n 9,1000=5", "1000=5"),
    "explicit timesteps for a table": (EVALUATE + " --grid 1,2", "--grid"),
    "unknown device": (
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
def test_errors_are_one_line(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, word = BAD[name]
    before = contents(place)
    assert ddim(*line.format(place).split()) == 2
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert word in errors[0]
    assert ";" in errors[0]
    assert "Traceback" not in output.err
    assert contents(place).keys() == before.keys()
    assert not (place / "out").exists()


def test_a_budget_is_kept_and_limits_samples_and_images() -> None:
    for per_second, seconds in ((50, 600), (300, 600), (300, 3600), (20000, 3600), (1e9, 3600)):
        amounts = budget.fit(per_second, seconds, [10, 20, 50, 100, 1000], 5, 10000, 1000)
        nfe = 5 * int(amounts.samples) * sum(amounts.steps)
        assert nfe <= per_second * seconds
        assert 2 <= int(amounts.samples) <= 50000
        assert amounts.images <= 10000
        if len(amounts.steps) < 5:
            assert "of Table 1" in amounts.left_out
    assert amounts.steps == (10, 20, 50, 100, 1000)
    assert (int(amounts.samples), amounts.images, amounts.left_out) == (50000, 10000, "")


def test_published_values_are_shown_for_the_same_dataset_only() -> None:
    names = {"cifar10": "CIFAR-10", "uoft-cs/cifar10": "CIFAR-10", "CIFAR-10": "CIFAR-10", "celeba_10k": "CelebA"}
    names |= {"mnist": None, "cifar100": None, "celebahq": None}
    assert {name: published.data_set(name) for name in names} == names
    cell = {"row": "0", "steps": 10, "n": 5, "fd": 3.0, "fd_error": None}
    for paper, expected in (("CIFAR-10", 13.36), ("CelebA", 17.33), (None, None)):
        assert table_1({"cells": [cell]}, paper)["rows"][0]["cells"][0]["paper"] == expected


def test_undefined_values_are_null_in_the_json(place: Path, tmp_path: Path) -> None:
    """Two samples have no jackknife error and no extrapolation: null, not NaN."""
    assert ddim(*evaluate(place, tmp_path / "out", "--steps", "2", "--eta", "0", "-n", "2")) == 0
    text = (tmp_path / "out/evaluate.json").read_text()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    assert json.loads(text)["cells"][0]["fd_error"] is None
    assert np.isfinite(json.loads(text)["cells"][0]["fd"])
