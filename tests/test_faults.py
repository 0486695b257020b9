"""After any file system error or kill, the same command completes with the same bytes.

As in SQLite's tests, each change of the file system in turn fails, or is the last one of the process.
"""

from __future__ import annotations

import contextlib
import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim._io.checksum import unseal
from ddim._io.safetensors import read_tensors
from ddim.errors import DdimError
from ddim.train import run as runs
from ddim.train import run_config
from evaluation.kit import save_script
from faults import BROKEN, FULL, Killed, faulty
from models import contents, ddim, recipe, save_tiny, tiny_config, tiny_set, write_pictures

Command = Callable[[Path], int]
SLOW = ("calibrate", "evaluate", "evaluate, stored images", "reconstruct")  # a second each
ERRORS = pytest.mark.parametrize("error", [None, FULL, BROKEN], ids=["killed", "full disk", "broken disk"])
TIMES = ("seconds", "seconds_per_image", "used", "took", "checksum")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Input files of the commands."""
    place = tmp_path_factory.mktemp("inputs")
    save_tiny(place / "model")
    save_tiny(place / "other", seed=1)
    save_script(place / "small.pt")
    write_pictures(place / "images", 6)
    assert ddim("encode", place / "model", place / "images/0.png", "--steps", 2, "--out", place / "z.safetensors") == 0
    return place


CPU = ("--device", "cpu")
SMALL = ("--steps", 2, *CPU)
SPACE = ("--extractor", "{0}/small.pt")
STORE = ("--images", "{1}/out/images", "--out", "{1}/out")
COMMANDS: dict[str, tuple[object, ...]] = {
    "sample": ("sample", "{0}/model", "-n", 3, *SMALL, "--out", "{1}/deep/out"),
    "edit": ("edit", "{0}/model", "{0}/images/1.png", "--start-at", 500, "-n", 2, *SMALL, "--out", "{1}/out"),
    "encode": ("encode", "{0}/model", "{0}/images", *SMALL, "--out", "{1}/z.safetensors"),
    "decode": ("decode", "{0}/model", "{0}/z.safetensors", *CPU, "--out", "{1}/out", "--sheet", "{1}/sheet.png"),
    "interpolate": ("interpolate", "{0}/model", "--seeds", "1,2", "--frames", 2, *SMALL, "--out", "{1}/strip.png"),
    "convert": ("convert", "{0}/other", "--out", "{1}/model"),
    "convert to diffusers": ("convert", "{0}/other", "--to", "diffusers", "--out", "{1}/pipeline"),
    "calibrate": ("calibrate", "{0}/other", "{0}/images", "--limit", 1, "--times", 24, *CPU, "--out", "{1}/model"),
    "statistics": ("statistics", "{0}/images", "--extractor", "{0}/small.pt", *CPU, "--out", "{1}/s.safetensors"),
    "distance": ("distance", "{0}/images", "{0}/images", "--extractor", "{0}/small.pt", *CPU, "--out", "{1}/d.json"),
    "evaluate": ("evaluate", "{0}/model", "{0}/images", "--eta", "0", "-n", 3, *SMALL, *SPACE, "--out", "{1}/out"),
    "evaluate, stored images": ("evaluate", "{0}/model", "{0}/images", "--eta", "0", "-n", 3, *SMALL, *SPACE, *STORE),
    "reconstruct": ("reconstruct", "{0}/model", "{0}/images", "--limit", 2, *SMALL, "--out", "{1}/out"),
    "likelihood": ("likelihood", "{0}/model", "{0}/images", *SMALL, "--out", "{1}/out"),
    "tune": ("tune", "{0}/model", "--nfe", 2, "--calibration-samples", 4, *CPU, "--out", "{1}/plan.json"),
}
REPLACED = ("convert", "convert to diffusers", "calibrate")
"""Commands that replace an existing folder, of another or an older model."""


def run(words: tuple[object, ...], inputs: Path, out: Path) -> int:
    return ddim(*(str(word).format(inputs, out) for word in words))


def prepare(name: str, inputs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the output folder, with an old version in it for commands that replace one."""
    out.mkdir()
    if name == "tune":
        monkeypatch.setenv("XDG_CACHE_HOME", str(out / "cache"))
    if name in REPLACED:
        words = tuple(str(word).replace("other", "model") if name != "calibrate" else word for word in COMMANDS[name])
        assert run(words, inputs, out) == 0
    return out


def bare(value: Any) -> Any:
    """JSON without measured times and checksums."""
    if isinstance(value, dict):
        return {key: bare(each) for key, each in value.items() if key not in TIMES}
    return [bare(each) for each in value] if isinstance(value, list) else value


def comparable(folder: Path) -> dict[str, Any]:
    """All files without measured times; lists of checksums as sets."""
    files: dict[str, Any] = {}
    for name, data in contents(folder).items():
        if name.endswith(".json"):
            files[name] = bare(json.loads(data))
        elif name.endswith("SHA256SUMS"):
            files[name] = {*data.splitlines()}
        elif name.endswith(".safetensors") and "model" not in name:
            tensors, meta = read_tensors(folder / name)
            files[name] = bare(meta), {key: value.tolist() for key, value in tensors.items()}
        elif not name.endswith(("evaluate.png", "timing.json")):
            files[name] = data
    return {name: what for name, what in files.items() if name.rpartition("/")[2] != "timing.json"}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name not in (".lock",)]


def disturbed(command: Callable[[], int], at: int, error: int | None, capsys: pytest.CaptureFixture[str]) -> bool:
    """Run with one change that fails or is the last; returns whether it occurred."""
    capsys.readouterr()
    with faulty(at, error) as system:
        try:
            code = command()
        except Killed:
            return True
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) in ((0, 0), (2, 1)), errors
    return system.count >= at


def chosen(count: int, request: pytest.FixtureRequest, few: int = 1) -> list[int]:
    """All changes in a heavy test; `few` evenly spread ones in the default suite."""
    if request.node.get_closest_marker("slow"):
        return [*range(1, count + 1)]
    first = zlib.crc32(request.node.name.encode()) % count
    return [1 + (first + part * count // few) % count for part in range(few)]


def check_command(
    name: str, error: int | None, inputs: Path, tmp_path: Path, request: Any, capsys: Any, patch: pytest.MonkeyPatch
) -> None:
    words = COMMANDS[name]
    whole = prepare(name, inputs, tmp_path / "whole", patch)
    with faulty() as system:
        assert run(words, inputs, whole) == 0
    expected = comparable(whole)
    for at in chosen(system.count, request):
        place = prepare(name, inputs, tmp_path / f"at {at}", patch)
        assert disturbed(lambda place=place: run(words, inputs, place), at, error, capsys)
        assert run(words, inputs, place) == 0
        assert comparable(place) == expected, at
        assert leftovers(place) == [], at


@pytest.mark.parametrize(
    ("name", "error"), [*((name, None) for name in COMMANDS if name not in SLOW), ("sample", FULL), ("convert", FULL)]
)
def test_commands_complete_after_one_fault(
    name: str,
    error: int | None,
    inputs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_command(name, error, inputs, tmp_path, request, capsys, monkeypatch)


@pytest.mark.slow
@ERRORS
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_complete_after_any_fault(
    name: str,
    error: int | None,
    inputs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_command(name, error, inputs, tmp_path, request, capsys, monkeypatch)


STEPS = 8


def train(folder: Path) -> None:
    """A run that saves after every step."""
    config = tiny_config()
    data = tiny_set()
    train = recipe(steps=STEPS, checkpoint_every=1, keep=2, log_every=1, preview_every=4, batch=2)
    run = run_config.RunConfig(data=data.name, data_fingerprint=data.fingerprint(), model=config, train=train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in runs.train(folder, run, data, "cpu", "ddim train"):
            pass


def trained(folder: Path) -> dict[str, Any]:
    """The files of a run without times."""
    files: dict[str, Any] = {}
    for name, data in contents(folder).items():
        if name.endswith("config.json"):
            files[name] = bare(json.loads(unseal(data, name)))
        elif name.startswith("metrics"):
            files[name] = [bare(json.loads(line)) for line in data.splitlines()]
        elif name.startswith("state"):
            tensors, meta = read_tensors(folder / name)
            files[name] = bare(meta), tensors.keys(), torch.cat([each.double().flatten() for each in tensors.values()])
            files[name] = (*files[name][:2], files[name][2].numpy().tobytes())
        else:
            files[name] = data
    return files


def check_training(error: int | None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with faulty() as system:
        train(tmp_path / "whole")
    expected = trained(tmp_path / "whole")
    assert system.count >= 200
    for at in chosen(system.count, request, 4):
        folder = tmp_path / f"at {at}"
        with faulty(at, error), contextlib.suppress(Killed, DdimError, OSError):  # printed in one line by the commands
            train(folder)
        train(folder)
        assert trained(folder) == expected, at
        assert leftovers(folder) == [], at


@pytest.fixture
def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off TensorBoard, which writes its own files and takes most of the time."""
    monkeypatch.setattr("ddim.train.logger.logger_of", lambda *_: None)


@pytest.mark.usefixtures("no_events")
@pytest.mark.parametrize("error", [None, FULL])
def test_training_completes_after_a_fault(error: int | None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check_training(error, tmp_path, request)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # every change of a run's folder, one after the other
@pytest.mark.usefixtures("no_events")
@ERRORS
def test_training_completes_after_any_fault(error: int | None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """More than 200 changes, at least 25 per checkpoint."""
    check_training(error, tmp_path, request)
