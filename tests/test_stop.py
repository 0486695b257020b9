"""Stopping a training run: at once, in the middle of a step or preview, without a trace in the result."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim._io.safetensors import read_tensors
from ddim.cli import main as cli_main
from ddim.cli.main import Stopper
from ddim.train import run as runs
from ddim.train import trainer as trainer_module
from ddim.train.clock import EXIT_TIME, MEASURE_BY, Clock
from ddim.train.run_config import RunConfig
from ddim.train.trainer import Trainer
from models import ddim, recipe, tiny_config, tiny_set, write_pictures


@pytest.fixture(autouse=True)
def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off TensorBoard, which takes most of the time."""
    monkeypatch.setattr("ddim.train.logger.logger_of", lambda *_: None)


def go(folder: Path, abandon: Callable[[], bool] | None = None, kind: str = "pictures", **changes: Any) -> Any:
    """Train with a tiny network; returns the reports."""
    data, model = tiny_set(kind), tiny_config(kind, dropout=0.1)
    gamma = "v" if kind == "pictures" else "simple"
    train = recipe(**({"steps": 4, "accumulate": 2, "gamma": gamma} | changes))
    run = RunConfig(data=data.name, data_fingerprint=data.fingerprint(), model=model, train=train)
    return [*runs.train(folder, run, data, "cpu", "ddim train", abandon=abandon)]


def after(calls: int) -> Callable[[], bool]:
    """A request that comes at the given call."""
    count = [0]

    def requested() -> bool:
        count[0] += 1
        return count[0] > calls

    return requested


def calls_per_step(folder: Path, **changes: Any) -> int:
    counter = after(10**9)
    calls = [0]

    def counted() -> bool:
        calls[0] += 1
        return counter()

    go(folder, counted, steps=1, **changes)
    return calls[0]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(sorted((folder / "state").glob("*.safetensors"))[-1])[0]


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_a_step_abandoned_anywhere_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    """In the first or the second part of the batch."""
    go(tmp_path / "whole", kind=kind)
    each = calls_per_step(tmp_path / "one", kind=kind)
    assert each > 20
    for index, share in enumerate((0.2, 0.8)):
        folder = tmp_path / str(index)
        stopped = go(folder, after(2 * each + round(share * each)), kind=kind)
        assert stopped[-1].step == 2
        assert int(state(folder)["step"]) == 2
        assert go(folder, kind=kind)[-1].step == 4
        first, second = state(folder), state(tmp_path / "whole")
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_first_step_that_is_abandoned_saves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    reports = go(tmp_path, after(3))
    assert [report.step for report in reports] == [0, 0]
    assert not [*(tmp_path / "state").glob("*.safetensors")]
    assert go(tmp_path)[-1].step == 4


def test_an_abandoned_preview_is_saved_and_made_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = [False]
    real = runs.TrainingLoop._preview

    def preview(self: Any) -> str:
        stopping[0] = True
        return real(self)

    monkeypatch.setattr(runs.TrainingLoop, "_preview", preview)
    settings = {"preview_every": 2, "checkpoint_every": 100}
    assert go(tmp_path, lambda: stopping[0], **settings)[-1].step == 2
    assert not [*tmp_path.glob("previews/00000002*")]
    monkeypatch.undo()
    assert go(tmp_path, **settings)[-1].step == 4
    assert [path.stem for path in sorted(tmp_path.glob("previews/*.png"))] == ["00000002", "00000004"]


def test_without_a_request_the_result_is_the_same(tmp_path: Path) -> None:
    go(tmp_path / "plain")
    go(tmp_path / "watched", lambda: False)
    first, second = state(tmp_path / "plain"), state(tmp_path / "watched")
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_signal_during_a_step_is_acknowledged_and_obeyed_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "pictures", 6)
    real = Trainer._loss
    ended = []

    def loss(self: Trainer, *args: Any) -> Any:
        if self.step == 2 and self.abandon:
            signal.raise_signal(signal.SIGINT)
        result = real(self, *args)
        ended.append(self.step)
        return result

    monkeypatch.setattr(trainer_module.Trainer, "_loss", loss)
    command = ("train", tmp_path / "pictures", "--preset", "digits", "--steps", 4, "--batch", 4, "--device", "cpu")
    command += ("--preview-every", 0, "--out", tmp_path / "run")
    assert ddim(*command) == 128 + signal.SIGINT
    assert ended[-1] == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum("Ctrl-C again" in line for line in lines) == 1
    assert [path.stem for path in (tmp_path / "run/state").iterdir()] == ["00000002"]
    monkeypatch.undo()
    assert ddim(*command) == 0


def test_a_second_signal_exits_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Stopper() as stopper:
        signal.raise_signal(signal.SIGTERM)
        assert stopper()
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.code == 128 + signal.SIGINT
    assert len(capsys.readouterr().err.splitlines()) == 1


class Now:
    """A clock under the test's control."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_time_for_one_more_step_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose steps take long ends before one that would not fit, and one slow step is forgotten."""
    now = Now()
    monkeypatch.setattr("ddim.train.clock.time", now)
    clock = Clock(200.0)
    with clock.timed("save"):
        now.now += 2
    share = clock.after_step()
    while share < 1:
        now.now += 7
        share = clock.after_step()
    assert 200 - 7 - 7 - 3 - EXIT_TIME <= clock.used <= 200 - 3 - EXIT_TIME
    for _ in range(60):
        now.now += 0.01
        clock.after_step()
    assert clock.step < 0.1


def test_final_work_that_was_not_measured_is_done_early(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Now()
    monkeypatch.setattr("ddim.train.clock.time", now)
    clock = Clock(100.0, ending=("save", "preview"))
    now.now = MEASURE_BY * 90
    assert not clock.unmeasured("save")
    now.now = MEASURE_BY * 100
    assert clock.unmeasured("save")
    with clock.timed("save"):
        now.now += 1
    assert not clock.unmeasured("save")
    assert clock.unmeasured("preview")
    assert not Clock(None).unmeasured("save")


def test_the_start_of_this_process_is_in_the_past() -> None:
    assert cli_main.process_age() > 0
