"""A training run that is interrupted in any way and resumed ends with the same bits."""

from __future__ import annotations

import json
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddim._io.atomic import lock
from ddim._io.checksum import unseal
from ddim._io.safetensors import read_tensors, write_tensors
from ddim.errors import DdimError, DdimWarning
from ddim.model.load import load
from ddim.train import run as runs
from ddim.train.run_config import RunConfig
from ddim.train.trainer import Trainer
from models import KINDS, LENGTH, LETTERS, contents, ddim, process, recipe, tiny_config, tiny_set, write_pictures

OPTIONS = ("--preset", "digits", "--steps", 60, "--batch", 16, "--checkpoint-every", 7, "--preview-every", 0)
OPTIONS += ("--log-every", 5, "--device", "cpu")


def config(classes: int = 0, T: int = 1000, kind: str = "pictures", **changes: Any) -> RunConfig:
    schedule = {"T": T, **({"beta_end": 0.2} if T < 100 and kind == "pictures" else {})}
    model = tiny_config(kind, classes=classes, schedule=schedule)
    data = tiny_set(kind, classes > 0)
    train = recipe(**(({"gamma": "simple"} if model.categorical else {}) | changes))
    return RunConfig(data=data.name, data_fingerprint=data.fingerprint(), model=model, train=train)


def go(folder: Path, stop: int = 0, classes: int = 0, kind: str = "pictures", **changes: Any) -> list[runs.Report]:
    """Train to the end, or until step `stop` is done."""
    updates = [0]

    def stop_requested() -> bool:
        updates[0] += 1
        return stop > 0 and first + updates[0] == stop

    reports, first = [], 0
    run, data = config(classes, kind=kind, **changes), tiny_set(kind, classes > 0)
    for report in runs.train(folder, run, data, "cpu", "ddim train", stop_requested):
        if not reports:
            first = report.step
        reports.append(report)
    return reports


def newest(folder: Path) -> Path:
    return sorted((folder / "state").glob("*.safetensors"))[-1]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without the values that differ between runs."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "checksum")} for line in records]


def assert_same_run(run: Path, other: Path) -> None:
    assert newest(run).name == newest(other).name
    first, second = read_tensors(newest(run))[0], read_tensors(newest(other))[0]
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert {key.split(".")[0] for key in first} == {"network", "ema", "optimizer", "step", "errors"}
    assert lines(run) == lines(other)
    assert load(run, "cpu").config.error == load(other, "cpu").config.error
    for key, value in load(run, "cpu").network.state_dict().items():
        assert torch.equal(load(other, "cpu").network.state_dict()[key], value), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Uninterrupted runs, each trained once."""
    folders: dict[str, Path] = {}

    def train_once(**changes: Any) -> Path:
        key = repr(changes)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole")
            go(folders[key], **changes)
        return folders[key]

    return train_once


@pytest.mark.parametrize("kind", ["pictures", "levels", "text"])
def test_a_run_writes_all_documented_files(kind: str, tmp_path: Path) -> None:
    reports = go(tmp_path / "run", kind=kind, preview_every=6)
    assert [report.step for report in reports] == list(range(13))
    assert reports[0].event == "started"
    assert reports[-1].images_seen == 96
    files = contents(tmp_path / "run")
    names = {"run.json", "metrics.jsonl", "model/config.json", "model/model.safetensors"}
    names |= {f"state/{step:08d}.safetensors" for step in (4, 8, 12)}
    names |= {f"previews/{step:08d}.{'txt' if kind == 'text' else 'png'}" for step in (6, 12)}
    events = {name for name in files if name.startswith("tensorboard/events.out.tfevents")}
    assert events
    assert set(files) == names | events
    if kind == "text":
        texts = files["previews/00000012.txt"].decode().split("\n" + "-" * 80 + "\n")
        assert [len(text) for text in texts] == [LENGTH] * 36
        assert {*"".join(texts)} == {*LETTERS}
    else:
        with Image.open(tmp_path / "run/previews/00000012.png") as preview:
            side = preview.size[0]
            assert preview.size == (side, side)
            assert side >= 6 * 8
    assert [line["step"] for line in lines(tmp_path / "run")] == [3, 6, 9, 12]
    assert RunConfig.model_validate_json(unseal(files["run.json"], "run.json")) == config(kind=kind, preview_every=6)


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    go(tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in lines(tmp_path)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_ema_network_with_provenance(kind: str, tmp_path: Path) -> None:
    go(tmp_path, kind=kind)
    model = load(tmp_path, "cpu")
    state, _ = read_tensors(newest(tmp_path))
    for key, value in model.network.state_dict().items():
        assert torch.equal(state[f"ema.{key}"], value)
    origin = model.config.provenance
    name = tiny_set(kind).name
    assert (origin.data, origin.steps, origin.images_seen, origin.images) == (name, 12, 96, 20)
    assert origin.training == config(kind=kind).train
    assert origin.command == "ddim train"


@pytest.mark.parametrize("kind", ["pictures", "masked text"])
def test_the_model_contains_the_error_table_of_its_training(kind: str, tmp_path: Path) -> None:
    """The mean in the state at every timestep that was drawn, and linear interpolation between them."""
    go(tmp_path, kind=kind, T=40, ema=0.5)
    config = load(tmp_path, "cpu").config
    state, _ = read_tensors(newest(tmp_path))
    drawn = state["errors.counts"] > 1e-12
    assert 4 < drawn.sum() < 40
    means = (state["errors.sums"] / state["errors.counts"])[drawn]
    expected = np.interp(range(40), drawn.nonzero()[:, 0], means)
    assert config.error is not None
    assert len(config.error) == 40
    np.testing.assert_allclose(config.error, expected, rtol=1e-4)
    assert config.provenance.error_from == "training"


def test_an_error_table_with_too_few_timesteps_is_not_written(tmp_path: Path) -> None:
    go(tmp_path)
    state, _ = read_tensors(newest(tmp_path))
    assert 0 < (state["errors.counts"] > 0).sum() < 100
    config = load(tmp_path, "cpu").config
    assert (config.error, config.provenance.error_from) == (None, "")


def test_a_run_of_an_older_version_without_error_table_is_resumed_with_a_warning(tmp_path: Path) -> None:
    go(tmp_path, stop=6)
    tensors, meta = read_tensors(newest(tmp_path))
    write_tensors(newest(tmp_path), {k: v for k, v in tensors.items() if not k.startswith("errors.")}, meta)
    with pytest.warns(DdimWarning):
        assert go(tmp_path)[-1].step == 12


def test_metrics_are_means_over_the_logging_interval(tmp_path: Path) -> None:
    go(tmp_path / "fine", log_every=1)
    go(tmp_path / "coarse", log_every=6)
    fine = [line["loss"] for line in lines(tmp_path / "fine")]
    coarse = [line["loss"] for line in lines(tmp_path / "coarse")]
    assert coarse == pytest.approx([np.mean(fine[:6]), np.mean(fine[6:])])


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    go(tmp_path, checkpoint_every=2, keep=2)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "00000010.safetensors",
        "00000012.safetensors",
    ]


ALL: dict[str, Any] = {"classes": 3, "flip": True, "decay": "cosine", "accumulate": 2, "keep": 1}


@pytest.mark.parametrize(
    ("stops", "changes"),
    [
        ((1,), {}),
        ((4,), {}),
        ((5, 6, 11), {"T": 40}),
        ((3, 4, 7, 8), ALL),
        ((5,), {"kind": "levels", "flip": True}),
        ((1, 6, 11), {"kind": "text", "T": 40}),
        ((3, 4), {"kind": "masked text", "decay": "cosine", "accumulate": 2, "keep": 1}),
    ],
)
def test_resume_is_bit_exact(
    stops: tuple[int, ...], changes: dict[str, Any], tmp_path: Path, whole: Callable[..., Path]
) -> None:
    for stop in stops:
        assert go(tmp_path / "stopped", stop, **changes)[-1].step == stop
        assert newest(tmp_path / "stopped").stem == f"{stop:08d}"
    last = go(tmp_path / "stopped", **changes)
    assert last[0].event == f"resumed at step {stops[-1]}"
    assert_same_run(tmp_path / "stopped", whole(**changes))


@pytest.mark.parametrize(
    ("after", "changes"),
    [(1, {}), (4, {}), (6, {}), (11, {}), (6, {"kind": "text", "T": 40})],
)
def test_resume_after_an_interruption_between_checkpoints_is_bit_exact(
    after: int, changes: dict[str, Any], tmp_path: Path, whole: Callable[..., Path]
) -> None:
    """Like a kill: nothing is saved at that moment, and the last metrics line may be cut."""
    data = tiny_set(changes.get("kind", "pictures"))
    steps = runs.train(tmp_path / "interrupted", config(**changes), data, "cpu")
    for report in steps:
        if report.step == after:
            break
    steps.close()
    with open(tmp_path / "interrupted/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 12, "los')
    (tmp_path / "interrupted/state/.00000012.safetensors.1.part").write_bytes(b"half a state")
    with pytest.warns(DdimWarning, match=r"\b1\b"):
        again = go(tmp_path / "interrupted", **changes)
    assert again[0].step == after // 4 * 4
    assert_same_run(tmp_path / "interrupted", whole(**changes))
    assert not list((tmp_path / "interrupted").rglob("*.part"))


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_starting_a_finished_run_again_changes_nothing(kind: str, tmp_path: Path) -> None:
    go(tmp_path, kind=kind, preview_every=12)
    before = contents(tmp_path)
    (report,) = go(tmp_path, kind=kind, preview_every=12)
    assert report.step == 12
    after = {name: data for name, data in contents(tmp_path).items() if not name.startswith("tensorboard/")}
    assert after == {name: before[name] for name in after}


def test_a_deleted_model_is_written_again(tmp_path: Path) -> None:
    go(tmp_path)
    before = load(tmp_path, "cpu").network.state_dict()
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    (tmp_path / "model").rmdir()
    go(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in load(tmp_path, "cpu").network.state_dict().items())


def test_a_run_killed_between_state_and_model_writes_the_model_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        if newest(tmp_path).stem == "00000012":
            raise KeyboardInterrupt

    real = runs.checkpoint.write
    monkeypatch.setattr(runs.checkpoint, "write", lambda *arguments: kill() or real(*arguments))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert load(tmp_path, "cpu").config.provenance.steps < 12
    monkeypatch.undo()
    go(tmp_path)
    assert load(tmp_path, "cpu").config.provenance.steps == 12


def test_a_folder_of_a_run_killed_in_its_first_write_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.4711.part").write_text('{"half')
    go(tmp_path, stop=1)
    assert not list(tmp_path.glob(".*.part"))


def test_checkpoint_and_logging_intervals_may_change(tmp_path: Path, whole: Callable[..., Path]) -> None:
    go(tmp_path, stop=5)
    go(tmp_path, keep=7, checkpoint_every=2)
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize(("kind", "message"), [("levels", r"^stripes: "), ("text", r"^words\.txt: ")])
def test_a_label_beyond_the_classes_is_an_error(kind: str, message: str, tmp_path: Path) -> None:
    too_few = config(classes=2, kind=kind)
    with pytest.raises(DdimError, match=message):
        next(runs.train(tmp_path, too_few, tiny_set(kind, labelled=True), "cpu"))


def test_more_steps_resume_the_run_with_a_warning(tmp_path: Path) -> None:
    go(tmp_path)
    with pytest.warns(DdimWarning, match=r"\b15\b"):
        reports = go(tmp_path, steps=15)
    assert [report.step for report in reports] == [12, 13, 14, 15]
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 9, 12, 15]


def test_fewer_steps_than_trained_are_an_error(tmp_path: Path) -> None:
    go(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DdimError, match=r"\b10\b"):
        go(tmp_path, steps=10)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("pictures", {"lr": 1e-3}, "train.lr 0.002, not 0.001"),
        ("pictures", {"seed": 1}, "train.seed"),
        ("pictures", {"batch": 4}, "train.batch"),
        ("pictures", {"classes": 3}, "data_fingerprint|model.network.classes"),
        ("pictures", {"steps": 15, "ema": 0.5}, "train"),
        ("pictures", {"kind": "levels"}, "model.schedule.name"),
        ("pictures", {"kind": "text"}, "words.txt"),
        ("text", {"seed": 1}, "train.seed"),
        ("text", {"gamma": "vlb"}, "train.gamma"),
        ("text", {"T": 999}, "model.schedule.T"),
        ("text", {"kind": "masked text"}, "model.schedule.zero_terminal_snr"),
    ],
)
def test_another_configuration_is_an_error_that_names_the_key(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    go(tmp_path, stop=2, kind=kind)
    before = contents(tmp_path)
    with pytest.raises(DdimError, match=message):
        go(tmp_path, **{"kind": kind, **changes})
    assert contents(tmp_path) == before


def test_a_folder_with_other_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DdimError):
        go(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"notes"}


def test_a_folder_in_use_is_an_error(tmp_path: Path) -> None:
    first = runs.train(tmp_path, config(), tiny_set(), "cpu")
    next(first)
    with pytest.raises(DdimError):
        next(runs.train(tmp_path, config(), tiny_set(), "cpu"))
    first.close()
    assert go(tmp_path)[-1].step == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        *((damage, "pictures") for damage in ("cut", "empty", "text", "foreign", "unrelated")),
        ("foreign", "text"),
    ],
)
def test_a_damaged_state_is_reported_and_the_previous_one_is_used(
    damage: str, kind: str, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    go(tmp_path / "run", stop=9, kind=kind)
    path = newest(tmp_path / "run")
    data = path.read_bytes()
    if damage == "foreign":
        other: dict[str, Any] = {"classes": 3} if kind == "pictures" else {"kind": "masked text"}
        go(tmp_path / "other", stop=9, **other)
        data = newest(tmp_path / "other").read_bytes()
    elif damage == "unrelated":
        data = (tmp_path / "run/model/model.safetensors").read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"a text"}.get(damage, data))
    with pytest.warns(DdimWarning) as caught:
        assert go(tmp_path / "run", kind=kind)[0].step == 8
    assert all(len(str(warning.message).splitlines()) == 1 for warning in caught)
    assert {state.stem for state in (tmp_path / "run/state").iterdir()} == {f"{step:08d}" for step in (4, 8, 9, 12)}
    path.unlink()
    assert_same_run(tmp_path / "run", whole(kind=kind))


def test_a_damaged_run_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    go(tmp_path, stop=2)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DdimError, match=r"run\.json: "):
        go(tmp_path)


def test_after_a_non_finite_loss_the_run_resumes_from_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., Path]
) -> None:
    real = Trainer._loss

    def diverging_loss(self: Trainer, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, errors = real(self, *args)
        return loss * (torch.nan if self.step == 6 else 1.0), errors

    monkeypatch.setattr(Trainer, "_loss", diverging_loss)
    with pytest.raises(DdimError, match=r"^step 7: "):
        go(tmp_path / "run")
    assert newest(tmp_path / "run").stem == "00000004"
    assert load(tmp_path / "run", "cpu").config.provenance.steps == 4
    monkeypatch.undo()
    assert go(tmp_path / "run")[0].step == 4
    assert_same_run(tmp_path / "run", whole())


SMALL = ("network.width=16", "network.depth=1", "network.heads=2")
PRESETS = {
    "pictures": ("--preset", "digits"),
    "words.txt": ("--preset", "tinyshakespeare", "--length", LENGTH, *(f"--set={change}" for change in SMALL)),
}


@pytest.mark.parametrize(
    ("data", "step", "number"),
    [
        *(("pictures", step, number) for step in (1, 7) for number in (signal.SIGINT, signal.SIGTERM)),
        ("words.txt", 7, signal.SIGTERM),
    ],
)
def test_a_signal_saves_the_current_step_and_prints_how_to_resume(
    data: str,
    step: int,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_pictures(tmp_path / "pictures", 6)
    (tmp_path / "words.txt").write_text("a bad bed on a dead end ado " * 9, encoding="utf-8")
    real = Trainer.updates

    def updates_with_signal(self: Trainer) -> Iterator[Any]:
        for update in real(self):
            if update.step == step:
                signal.raise_signal(number)
            yield update

    monkeypatch.setattr(Trainer, "updates", updates_with_signal)
    command = ("train", tmp_path / data, *PRESETS[data], "--steps", 9, "--batch", 4, "--device", "cpu")
    command += ("--preview-every", 0, "--out", tmp_path / "run")
    handler = signal.getsignal(number)
    assert ddim(*command) == 128 + number
    assert signal.getsignal(number) == handler
    assert [path.stem for path in (tmp_path / "run/state").iterdir()] == [f"{step:08d}"]
    stopped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
    assert len(stopped) == 1
    assert stopped[0].startswith(f"stopped at step {step} of 9; ")
    monkeypatch.undo()
    assert ddim(*command) == 0
    output = capsys.readouterr()
    assert f"resumed at step {step}" in output.err
    assert output.out.startswith(f"done: 9 steps, 36 {'images' if data == 'pictures' else 'sequences'} seen")
    assert ddim(*command) == 0
    assert capsys.readouterr().out.startswith("nothing left to do: 9 steps")


def interrupted_process(data: object, folder: Path, moment: int, number: signal.Signals) -> int:
    """Run `ddim train` in a process, send it a signal after `moment` lines of metrics, and return its exit code."""
    command, env = process("train", data, *OPTIONS, "--out", folder)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        deadline = time.monotonic() + 150
        metrics = folder / "metrics.jsonl"
        while child.poll() is None:
            assert time.monotonic() < deadline
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= moment:
                with pytest.raises(DdimError, match="run: "), lock(folder):
                    pass
                child.send_signal(number)
                break
            select.select([child.stdout], [], [], 0.003)
        child.communicate()
    return child.returncode


@pytest.mark.slow
def test_resume_after_two_kills_is_bit_exact(tmp_path: Path) -> None:
    """Real processes, ended by SIGKILL between checkpoints."""
    write_pictures(tmp_path / "pictures", 40)
    assert interrupted_process(tmp_path / "pictures", tmp_path / "run", 3, signal.SIGKILL) == -signal.SIGKILL
    assert interrupted_process(tmp_path / "pictures", tmp_path / "run", 8, signal.SIGKILL) == -signal.SIGKILL
    for folder in ("run", "whole"):
        assert ddim("train", tmp_path / "pictures", *OPTIONS, "--out", tmp_path / folder) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(5, 61, 5))


@pytest.mark.slow
def test_resume_after_five_random_kills_is_bit_exact(tmp_path: Path) -> None:
    """On the digits; the last interruption is a SIGTERM."""
    moments = sorted(random.Random(3).sample(range(1, 11), 5))
    for moment in moments:
        assert interrupted_process("digits", tmp_path / "run", moment, signal.SIGKILL) == -signal.SIGKILL
    assert interrupted_process("digits", tmp_path / "run", 11, signal.SIGTERM) == 128 + signal.SIGTERM
    assert int(read_tensors(newest(tmp_path / "run"))[0]["step"]) >= 55
    for folder in ("run", "whole"):
        assert ddim("train", "digits", *OPTIONS, "--out", tmp_path / folder) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
