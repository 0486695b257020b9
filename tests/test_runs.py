"""A training run may be stopped at any moment in any way; the same command goes on and ends with the same bits."""

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

WORDS = ("--preset", "digits", "--steps", 60, "--batch", 16, "--checkpoint-every", 7, "--preview-every", 0)
WORDS += ("--log-every", 5, "--device", "cpu")


def config(classes: int = 0, T: int = 1000, kind: str = "pictures", **changes: Any) -> RunConfig:
    schedule = {"T": T, **({"beta_end": 0.2} if T < 100 and kind == "pictures" else {})}
    model = tiny_config(kind, classes=classes, schedule=schedule)
    data = tiny_set(kind, classes > 0)
    train = recipe(**(({"gamma": "simple"} if model.categorical else {}) | changes))
    return RunConfig(data=data.name, data_fingerprint=data.fingerprint(), model=model, train=train)


def go(folder: Path, stop: int = 0, classes: int = 0, kind: str = "pictures", **changes: Any) -> list[runs.Report]:
    """Run to the end, or until step `stop` is made."""
    at = [0]

    def asked() -> bool:
        at[0] += 1
        return stop > 0 and first + at[0] == stop

    reports, first = [], 0
    run, data = config(classes, kind=kind, **changes), tiny_set(kind, classes > 0)
    for report in runs.train(folder, run, data, "cpu", "ddim train", asked):
        if not reports:
            first = report.step
        reports.append(report)
    return reports


def newest(folder: Path) -> Path:
    return sorted((folder / "state").glob("*.safetensors"))[-1]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the one thing that two runs do not share."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "checksum")} for line in found]


def assert_same_run(one: Path, other: Path) -> None:
    assert newest(one).name == newest(other).name
    first, second = read_tensors(newest(one))[0], read_tensors(newest(other))[0]
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert {key.split(".")[0] for key in first} == {"network", "ema", "optimizer", "step", "errors"}
    assert lines(one) == lines(other)
    assert load(one, "cpu").config.error == load(other, "cpu").config.error
    for key, value in load(one, "cpu").network.state_dict().items():
        assert torch.equal(load(other, "cpu").network.state_dict()[key], value), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Undisturbed runs, each made once."""
    made: dict[str, Path] = {}

    def find(**changes: Any) -> Path:
        key = repr(changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            go(made[key], **changes)
        return made[key]

    return find


@pytest.mark.parametrize("kind", ["pictures", "levels", "text"])
def test_a_run_writes_all_it_promises(kind: str, tmp_path: Path) -> None:
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
            assert preview.size == (6 * 18 + 2, 6 * 18 + 2)
    assert [line["step"] for line in lines(tmp_path / "run")] == [3, 6, 9, 12]
    assert RunConfig.model_validate_json(unseal(files["run.json"], "run.json")) == config(kind=kind, preview_every=6)


def test_tensorboard_can_read_the_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    go(tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(line["step"], pytest.approx(line["loss"])) for line in lines(tmp_path)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_averaged_network_and_says_where_it_comes_from(kind: str, tmp_path: Path) -> None:
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
def test_the_model_is_given_the_errors_of_its_training(kind: str, tmp_path: Path) -> None:
    """At every time that was drawn the mean the state holds, and between those times a straight line."""
    go(tmp_path, kind=kind, T=40, ema=0.5)
    config = load(tmp_path, "cpu").config
    state, _ = read_tensors(newest(tmp_path))
    known = state["errors.counts"] > 1e-12
    assert 4 < known.sum() < 40
    means = (state["errors.sums"] / state["errors.counts"])[known]
    expected = np.interp(range(40), known.nonzero()[:, 0], means)
    assert config.error is not None
    assert len(config.error) == 40
    np.testing.assert_allclose(config.error, expected, rtol=1e-4)
    assert config.provenance.error_from == "training"


def test_errors_known_at_too_few_times_are_not_told(tmp_path: Path) -> None:
    go(tmp_path)
    state, _ = read_tensors(newest(tmp_path))
    assert 0 < (state["errors.counts"] > 0).sum() < 100
    config = load(tmp_path, "cpu").config
    assert (config.error, config.provenance.error_from) == (None, "")


def test_a_run_of_an_older_version_goes_on_and_says_that_it_had_no_table(tmp_path: Path) -> None:
    go(tmp_path, stop=6)
    tensors, meta = read_tensors(newest(tmp_path))
    write_tensors(newest(tmp_path), {k: v for k, v in tensors.items() if not k.startswith("errors.")}, meta)
    with pytest.warns(DdimWarning):
        assert go(tmp_path)[-1].step == 12


def test_the_metrics_are_means_over_the_steps_between(tmp_path: Path) -> None:
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
def test_stopped_and_gone_on_with_it_is_the_same_run(
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
def test_broken_off_between_checkpoints_it_is_the_same_run(
    after: int, changes: dict[str, Any], tmp_path: Path, whole: Callable[..., Path]
) -> None:
    """As a kill would: nothing is saved at the moment it ends, and the last line may be cut."""
    data = tiny_set(changes.get("kind", "pictures"))
    steps = runs.train(tmp_path / "broken", config(**changes), data, "cpu")
    for report in steps:
        if report.step == after:
            break
    steps.close()
    with open(tmp_path / "broken/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 12, "los')
    (tmp_path / "broken/state/.00000012.safetensors.1.part").write_bytes(b"half a state")
    with pytest.warns(DdimWarning, match=r"\b1\b"):
        again = go(tmp_path / "broken", **changes)
    assert again[0].step == after // 4 * 4
    assert_same_run(tmp_path / "broken", whole(**changes))
    assert not list((tmp_path / "broken").rglob("*.part"))


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_a_finished_run_started_again_changes_nothing(kind: str, tmp_path: Path) -> None:
    go(tmp_path, kind=kind, preview_every=12)
    before = contents(tmp_path)
    (report,) = go(tmp_path, kind=kind, preview_every=12)
    assert report.step == 12
    after = {name: data for name, data in contents(tmp_path).items() if not name.startswith("tensorboard/")}
    assert after == {name: before[name] for name in after}


def test_a_model_that_is_gone_is_written_again(tmp_path: Path) -> None:
    go(tmp_path)
    before = load(tmp_path, "cpu").network.state_dict()
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    (tmp_path / "model").rmdir()
    go(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in load(tmp_path, "cpu").network.state_dict().items())


def test_killed_after_the_state_and_before_the_model_it_writes_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        if newest(tmp_path).stem == "00000012":
            raise KeyboardInterrupt

    real = runs.checkpoint.write
    monkeypatch.setattr(runs.checkpoint, "write", lambda *words: killed() or real(*words))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert load(tmp_path, "cpu").config.provenance.steps < 12
    monkeypatch.undo()
    go(tmp_path)
    assert load(tmp_path, "cpu").config.provenance.steps == 12


def test_killed_in_the_first_write_the_folder_can_still_be_used(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.4711.part").write_text('{"half')
    go(tmp_path, stop=1)
    assert not list(tmp_path.glob(".*.part"))


def test_how_often_is_saved_and_logged_may_change(tmp_path: Path, whole: Callable[..., Path]) -> None:
    go(tmp_path, stop=5)
    go(tmp_path, keep=7, checkpoint_every=2)
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize(("kind", "wrong"), [("levels", r"^stripes: "), ("text", r"^words\.txt: ")])
def test_a_label_beyond_the_classes_is_refused(kind: str, wrong: str, tmp_path: Path) -> None:
    few = config(classes=2, kind=kind)
    with pytest.raises(DdimError, match=wrong):
        next(runs.train(tmp_path, few, tiny_set(kind, labelled=True), "cpu"))


def test_more_steps_go_on_and_say_so(tmp_path: Path) -> None:
    go(tmp_path)
    with pytest.warns(DdimWarning, match=r"\b15\b"):
        reports = go(tmp_path, steps=15)
    assert [report.step for report in reports] == [12, 13, 14, 15]
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 9, 12, 15]


def test_fewer_steps_than_are_made_are_refused(tmp_path: Path) -> None:
    go(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DdimError, match=r"\b10\b"):
        go(tmp_path, steps=10)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
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
def test_another_recipe_is_refused_and_the_key_named(
    kind: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    go(tmp_path, stop=2, kind=kind)
    before = contents(tmp_path)
    with pytest.raises(DdimError, match=named):
        go(tmp_path, **{"kind": kind, **changes})
    assert contents(tmp_path) == before


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DdimError):
        go(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    first = runs.train(tmp_path, config(), tiny_set(), "cpu")
    next(first)
    with pytest.raises(DdimError):
        next(runs.train(tmp_path, config(), tiny_set(), "cpu"))
    first.close()
    assert go(tmp_path)[-1].step == 12


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        *((damage, "pictures") for damage in ("cut", "empty", "text", "foreign", "strange")),
        ("foreign", "text"),
    ],
)
def test_a_damaged_state_is_named_and_without_it_the_one_before_serves(
    damage: str, kind: str, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    go(tmp_path / "run", stop=9, kind=kind)
    path = newest(tmp_path / "run")
    data = path.read_bytes()
    if damage == "foreign":
        other: dict[str, Any] = {"classes": 3} if kind == "pictures" else {"kind": "masked text"}
        go(tmp_path / "other", stop=9, **other)
        data = newest(tmp_path / "other").read_bytes()
    elif damage == "strange":
        data = (tmp_path / "run/model/model.safetensors").read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"a text"}.get(damage, data))
    with pytest.warns(DdimWarning) as caught:
        assert go(tmp_path / "run", kind=kind)[0].step == 8
    assert all(len(str(warning.message).splitlines()) == 1 for warning in caught)
    assert {each.stem for each in (tmp_path / "run/state").iterdir()} == {f"{step:08d}" for step in (4, 8, 9, 12)}
    path.unlink()
    assert_same_run(tmp_path / "run", whole(kind=kind))


def test_a_damaged_run_file_is_named(tmp_path: Path) -> None:
    go(tmp_path, stop=2)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DdimError, match=r"run\.json: "):
        go(tmp_path)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., Path]
) -> None:
    real = Trainer._loss

    def diverge(self: Trainer, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, errors = real(self, *args)
        return loss * (torch.nan if self.step == 6 else 1.0), errors

    monkeypatch.setattr(Trainer, "_loss", diverge)
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
def test_a_signal_saves_that_very_step_and_tells_how_to_go_on(
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

    def interrupted(self: Trainer) -> Iterator[Any]:
        for update in real(self):
            if update.step == step:
                signal.raise_signal(number)
            yield update

    monkeypatch.setattr(Trainer, "updates", interrupted)
    words = ("train", tmp_path / data, *PRESETS[data], "--steps", 9, "--batch", 4, "--device", "cpu")
    words += ("--preview-every", 0, "--out", tmp_path / "run")
    handler = signal.getsignal(number)
    assert ddim(*words) == 128 + number
    assert signal.getsignal(number) == handler
    assert [path.stem for path in (tmp_path / "run/state").iterdir()] == [f"{step:08d}"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
    assert told == [f"stopped at step {step} of 9; run the same command to resume"]
    monkeypatch.undo()
    assert ddim(*words) == 0
    told = capsys.readouterr()
    assert f"resumed at step {step}" in told.err
    assert told.out.startswith(f"done: 9 steps, 36 {'images' if data == 'pictures' else 'sequences'} seen")
    assert ddim(*words) == 0
    assert capsys.readouterr().out.startswith("nothing left to do: 9 steps")


def disturbed(data: object, folder: Path, moment: int, number: signal.Signals) -> int:
    """Run `ddim train` as a real process until `moment` lines of metrics are there, then send it a signal."""
    command, env = process("train", data, *WORDS, "--out", folder)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        deadline = time.monotonic() + 150
        metrics = folder / "metrics.jsonl"
        while running.poll() is None:
            assert time.monotonic() < deadline
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= moment:
                with pytest.raises(DdimError, match="run: "), lock(folder):
                    pass
                running.send_signal(number)
                break
            select.select([running.stdout], [], [], 0.003)
        running.communicate()
    return running.returncode


def test_killed_twice_it_is_the_same_run(tmp_path: Path) -> None:
    """Real processes, ended by SIGKILL between checkpoints."""
    write_pictures(tmp_path / "pictures", 40)
    assert disturbed(tmp_path / "pictures", tmp_path / "run", 3, signal.SIGKILL) == -signal.SIGKILL
    assert disturbed(tmp_path / "pictures", tmp_path / "run", 8, signal.SIGKILL) == -signal.SIGKILL
    for folder in ("run", "whole"):
        assert ddim("train", tmp_path / "pictures", *WORDS, "--out", tmp_path / folder) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(5, 61, 5))


@pytest.mark.heavy
def test_killed_at_five_random_moments_it_is_the_same_run(tmp_path: Path) -> None:
    """On the digits; ended by SIGTERM once more at last."""
    moments = sorted(random.Random(3).sample(range(1, 11), 5))
    for moment in moments:
        assert disturbed("digits", tmp_path / "run", moment, signal.SIGKILL) == -signal.SIGKILL
    assert disturbed("digits", tmp_path / "run", 11, signal.SIGTERM) == 128 + signal.SIGTERM
    assert int(read_tensors(newest(tmp_path / "run"))[0]["step"]) >= 55
    for folder in ("run", "whole"):
        assert ddim("train", "digits", *WORDS, "--out", tmp_path / folder) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
