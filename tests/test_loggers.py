"""Loggers of training metrics: TensorBoard, and W&B and MLflow replaced by stub modules, so without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ddim.errors import DdimError, DdimWarning
from ddim.names import LOGGERS
from ddim.train import run
from ddim.train.logger import ADAPTERS, MetricsLogger, logger_of
from ddim.train.run_config import RunConfig
from models import recipe, tiny_config, tiny_set


class Recorded:
    """What a stub library was asked to do."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def end(self) -> None:
        self.ended += 1

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def stub(name: str, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded, module = Recorded(), ModuleType(name)

    def wandb_init(**settings: Any) -> Any:
        recorded.starts.append(settings)
        identifier = settings.get("id", f"new{len(recorded.starts)}")
        return SimpleNamespace(id=identifier, log=recorded.log, finish=recorded.end)

    def mlflow_start(**settings: Any) -> Any:
        recorded.starts.append(settings)
        run_id = settings["run_id"] or f"new{len(recorded.starts)}"
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    vars(module).update(
        {"init": wandb_init}
        if name == "wandb"
        else {
            "start_run": mlflow_start,
            "log_params": recorded.params.append,
            "log_metrics": recorded.log,
            "end_run": recorded.end,
        }
    )
    monkeypatch.setitem(sys.modules, name, module)
    return recorded


def train(folder: Path, steps: int = 6, **settings: Any) -> None:
    data = tiny_set()
    config = RunConfig(data=data.name, data_fingerprint="x", model=tiny_config(), train=recipe(steps=steps))
    for _ in run.train(folder, config, data, "cpu", **settings):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_run_is_logged_and_resumed_under_one_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = stub(name, monkeypatch)
    train(tmp_path / "run", log=name)
    assert [step for step, _ in recorded.logged] == [3, 6]
    assert all({"loss", "lr", "grad_norm"} <= values.keys() for _, values in recorded.logged)
    assert recorded.ended == 1
    with pytest.warns(DdimWarning):
        train(tmp_path / "run", steps=9, log=name)
    first, second = recorded.starts
    assert [step for step, _ in recorded.logged] == [3, 6, 9]
    assert second["id" if name == "wandb" else "run_id"] == "new1"
    settings = first["config"] if name == "wandb" else recorded.params[0]
    assert settings["lr"] == recipe().lr
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_none_writes_metrics_only(tmp_path: Path) -> None:
    train(tmp_path, log="none")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "tensorboard").exists()


def test_any_object_with_log_and_close_is_a_logger(tmp_path: Path) -> None:
    class Mine:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.closed = False

        def log(self, step: int, values: Any) -> None:
            self.steps.append(step)

        def close(self) -> None:
            self.closed = True

    mine = Mine()
    train(tmp_path, log=mine)
    assert (mine.steps, mine.closed) == ([3, 6], True)


def test_a_logger_is_closed_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = stub("wandb", monkeypatch)
    with pytest.raises(RuntimeError), MetricsLogger(tmp_path, 0, "wandb"):
        raise RuntimeError
    assert recorded.ended == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_an_error_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DdimError, match=rf"^log {name}: .*pip install 'ddim\[\w+\]'"):
        train(tmp_path / "run", log=name)
    assert not (tmp_path / "run").exists()


def test_the_default_warns_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.warns(DdimWarning, match="tensorboard"):
        assert logger_of(None, tmp_path, 0) is None


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsLogger(tmp_path, 0, "tensorboard") as metrics:
        metrics.log(1, {"loss": 0.5}, seconds=1.0)
    assert [*(tmp_path / "tensorboard").glob("events.*")]


def test_names_match_the_adapters() -> None:
    assert {*LOGGERS} == {*ADAPTERS, "none"}
    with pytest.raises(DdimError, match="'paper'"):
        logger_of("paper", Path(), 0)
