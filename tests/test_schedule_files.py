"""An invalid schedule is an error when it is read, not when it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddim.errors import DdimError
from ddim.interop.scheduler_settings import Settings
from ddim.model.config import ModelConfig, ScheduleConfig, parse
from ddim.model.importers.diffusers import read_scheduler
from models import ddim, save_tiny, tiny_config

INVALID: dict[str, dict[str, Any]] = {
    "a first beta of 0": {"name": "betas", "T": 3, "betas": [0, 0.1, 0.2]},
    "a beta of 1 before the last": {"name": "betas", "T": 3, "betas": [0.1, 1, 0.2]},
    "a negative beta": {"name": "betas", "T": 3, "betas": [0.1, -0.1, 0.2]},
    "a list without numbers": {"name": "betas", "T": 0, "betas": []},
    "a bound of 0": {"name": "linear", "beta_start": 0},
    "a bound above 1": {"name": "sigmoid", "beta_end": 1.5},
    "one timestep, rescaled": {"name": "linear", "T": 1, "zero_terminal_snr": True},
    "too many timesteps": {"name": "linear", "T": 10**18},
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_schedule_in_a_configuration_is_an_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DdimError) as caught:
        parse(ScheduleConfig, json.dumps(INVALID[name]), "s.json")
    assert caught.value.subject == "s.json"
    text = tiny_config().model_dump_json()
    config = json.loads(text) | {"schedule": INVALID[name]}
    with pytest.raises(DdimError):
        parse(ModelConfig, json.dumps(config), "config.json")
    (tmp_path / "s.json").write_text(json.dumps(INVALID[name]))
    assert ddim("check", tmp_path / "s.json") == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"trained_betas": [0.0, 0.01, 0.02], "num_train_timesteps": 3},
        {"trained_betas": [0.01, 1.0, 0.02], "num_train_timesteps": 3},
        {"beta_start": 0.0},
        {"beta_end": 1.5},
        {"num_train_timesteps": 1, "rescale_betas_zero_snr": True},
    ],
)
def test_an_invalid_diffusers_scheduler_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(DdimError) as caught:
        read_scheduler(wrong, Path("scheduler_config.json"))
    assert caught.value.subject == "scheduler_config.json"


@pytest.mark.parametrize("log_snr", [[1.0, 1.0], [1.0, 2.0], ["-inf", 0.0], []])
def test_invalid_settings_of_plan_scheduler_are_errors(log_snr: list[Any]) -> None:
    with pytest.raises(ValueError):
        Settings.model_validate({"log_snr": log_snr})


def test_convert_writes_no_folder_for_an_invalid_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["schedule"] = {"name": "betas", "T": 3, "betas": [0.0, 0.1, 0.2]}
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    for to in ("ddim", "diffusers"):
        assert ddim("convert", folder, "--to", to, "--out", tmp_path / "out") == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not (tmp_path / "out").exists()
