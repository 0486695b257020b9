"""Options that all commands share, recipes as files, resuming a run by its folder, and the list of runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ddim.cli._recipe_file import as_values, changed, settings_of
from ddim.cli.main import COMMANDS, cli
from ddim.errors import DdimError
from ddim.train.presets import PRESETS
from models import contents, ddim, save_tiny, write_pictures

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return save_tiny(tmp_path_factory.mktemp("options") / "model")


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options_once(name: str) -> None:
    found = command(name)
    for each in found.commands.values() if isinstance(found, click.Group) else [found]:
        options = [option for parameter in each.params for option in parameter.opts]
        assert len(options) == len(set(options))
        assert {"-q", "--quiet", "-v", "--verbose", "--json"} <= set(options)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option(name: str, capsys: Capture) -> None:
    assert ddim(name, "--help") == 0
    text = capsys.readouterr().out
    starts = [line.split()[0].strip(",") for line in text.splitlines() if line.startswith("  -")]
    expected = [p.opts[0] for p in command(name).params if isinstance(p, click.Option)]
    assert {*expected, "-h"} <= {*starts}


def test_json_prints_one_object_and_quiet_nothing_else(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert ddim("sample", model, "-n", 2, "--steps", 2, "--out", tmp_path / "a", "--json", "-q") == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert captured.err == ""
    assert results["command"] == "sample"
    assert (results["n"], results["nfe"], results["out"]) == (2, 2, str(tmp_path / "a"))
    assert (tmp_path / "a").is_dir()


def test_quiet_keeps_results_and_errors(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert ddim("sample", model, "-n", 2, "--steps", 2, "--out", tmp_path / "a", "-q") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("2 images")
    assert captured.err == ""
    assert ddim("sample", tmp_path / "nowhere", "--out", tmp_path / "b", "-q") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_verbose_adds_details_on_stderr_only(model: Path, tmp_path: Path, capsys: Capture) -> None:
    import torch

    [image] = write_pictures(tmp_path / "images", 1)
    printed = []
    for number, words in enumerate(((), ("-v",))):
        assert ddim("encode", model, image, "--steps", 2, "--out", tmp_path / f"{number}.s", *words) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out.replace("0.s", "1.s") == printed[1].out
    assert torch.__version__ in printed[1].err
    assert torch.__version__ not in printed[0].err
    assert ddim("info", model, "-q", "-v") == 2


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("smaple",), "sample"),
        (("sample", "mnist", "--stesp", "3"), "--steps"),
        (("train", "digits", "--presset", "digits"), "--preset"),
        (("train", "digits", "--out", "x", "--set", "train.lrr=1"), "train.lr"),
        (("train", "digits", "--out", "x", "--set", "warmpu=1"), "train.warmup"),
        (("train", "digits", "--out", "x", "--set", "netwrok.channels=32"), "network.channels"),
    ],
)
def test_unknown_names_get_the_nearest(words: tuple[str, ...], near: str, capsys: Capture) -> None:
    assert ddim(*words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"did you mean {near}?" in line


RANGES = """
import sys
from ddim.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(end.code, sorted({"torch", "pydantic"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (("sample", "mnist", "--out", "x", "--steps", "0"), "--steps 0"),
        (("sample", "mnist", "--out", "x", "-n", "-1"), "-n -1"),
        (("sample", "mnist", "--out", "x.png"), "--out x.png"),
        (("train", "digits", "--out", "x", "--seed", str(2**64)), "--seed"),
        (("encode", "mnist", "digits", "--out", "x", "--limit", "0"), "--limit 0"),
    ],
)
def test_ranges_are_checked_before_torch_is_imported(words: tuple[str, ...], subject: str, tmp_path: Path) -> None:
    call = [sys.executable, "-c", RANGES, *words]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split(maxsplit=1) == ["2", "[]\n"]
    assert done.stderr.startswith(f"error: {subject}")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "runs/nowhere/model"])
def test_a_path_that_does_not_exist_is_no_folder(name: str, capsys: Capture) -> None:
    """Not a name of a repository, so nothing is asked of the network."""
    assert ddim("info", name) == 2
    assert "no such folder" in capsys.readouterr().err


def recipe_of(capsys: Capture, *words: Any) -> dict[str, Any]:
    assert ddim("train", *words, "--show") == 0
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_read_back_is_the_same(name: str) -> None:
    recipe = changed(PRESETS[name], {}, None, None)
    values = as_values(name, recipe)
    assert recipe.model_dump() == PRESETS[name].model_dump()
    assert as_values(name, changed(PRESETS[name], values, values["predicts"], values["labels"])) == values
    settings = [setting["key"] for setting in settings_of(PRESETS[name])]
    assert settings == [f"{part}.{key}" for part in values if isinstance(values[part], dict) for key in values[part]]


def test_a_recipe_shows_all_options_and_a_file_takes_them(tmp_path: Path, capsys: Capture) -> None:
    words = ("--batch", 6, "--set", "network.dropout=0.25", "--size", "12x20", "--predicts", "eps", "--labels")
    shown = recipe_of(capsys, "--preset", "digits", *words, "--save-config", tmp_path / "r.yaml")
    assert yaml.safe_load((tmp_path / "r.yaml").read_text()) == shown
    assert (shown["train"]["batch"], shown["network"]["dropout"], shown["predicts"]) == (6, 0.25, "eps")
    assert (shown["data"]["height"], shown["data"]["width"], shown["labels"]) == (12, 20, True)
    assert recipe_of(capsys, "--config", tmp_path / "r.yaml") == shown
    again = recipe_of(capsys, "--config", tmp_path / "r.yaml", "--batch", 8, "--set", "network.dropout=0")
    assert again["train"] == shown["train"] | {"batch": 8}
    assert again["network"] == shown["network"] | {"dropout": 0.0}


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("train: {lrr: 1}", "train.lr"),
        ("trian: {lr: 1}", "train"),
        ("train: 3", "train"),
        ("labels: maybe", "labels"),
        ("train: {lr: [", "line 1"),
        ("- a\n- b", "recipe"),
        ("data: &a {height: 8}\nnetwork: *a", "reference"),
        ("train: {lr: fast}", "lr"),
        ("!!python/object/apply:os.getcwd []", "YAML"),
    ],
)
def test_a_bad_recipe_file_is_refused(text: str, data: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert ddim("train", "digits", "--config", tmp_path / "r.yaml", "--out", tmp_path / "run") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert data in line
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


TINY = ("--batch", 2, "--set", "network.channels=16", "--set", "network.groups=8", "--set", "network.attention=[]")


@pytest.mark.slow
def test_a_run_resumes_by_its_folder(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "data", 8)
    words = ("train", "data", "--preset", "digits", *TINY, "--checkpoint-every", 2, "--preview-every", 0, "-q")
    assert ddim(*words, "--decay", "none", "--steps", 4, "--out", "whole") == 0
    assert ddim(*words, "--decay", "none", "--steps", 2, "--out", "run") == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    capsys.readouterr()
    assert ddim("train", "--resume", "moved", "--steps", 4, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["out"], results["step"]) == ("moved", 4)
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "moved")]
    assert weights[0] == weights[1]
    assert ddim("train", "--resume", "moved") == 0  # to the steps that were added
    assert contents(tmp_path)["moved/model/model.safetensors"] == weights[1]
    for bad in (("--lr", "1"), ("--out", "other"), ("--set", "train.lr=1")):
        assert ddim("train", "--resume", "moved", *bad) == 2
    capsys.readouterr()
    assert ddim("runs", "--json") == 0
    listed = {entry["where"]: entry for entry in json.loads(capsys.readouterr().out)["runs"]}
    assert {name: (entry["what"], entry["steps"], entry["of"]) for name, entry in listed.items()} == {
        "whole": ("run", 4, 4),
        "moved": ("run", 4, 4),
    }


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (("--resume", "nowhere"), "nowhere"),
        (("--resume", "folder"), "folder"),
        (("--resume", "run"), "run"),
        (("digits", "--resume", "run"), "--resume and DATA"),
        (("--resume", "run", "--lr", "1"), "--resume and --lr"),
    ],
)
def test_what_cannot_be_resumed_is_refused(
    words: tuple[str, ...], subject: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")  # stopped before its first checkpoint
    assert ddim("train", *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {subject}: ")


def test_runs_lists_models_and_skips_what_it_cannot_read(model: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model": "of another program"}')
    assert ddim("runs", model.parent, tmp_path) == 0
    captured = capsys.readouterr()
    assert [line.split()[-1] for line in captured.out.splitlines()] == ["where", str(model)]
    [line] = captured.err.splitlines()
    assert "broken" in line
    assert ddim("runs", tmp_path / "nowhere") == 2


def test_a_setting_of_the_recipe_is_checked() -> None:
    with pytest.raises(DdimError, match="lr"):
        changed(PRESETS["digits"], {"train": {"lr": -1}}, None, None)
