"""`ddim tune`, `--sampler`, and plans that belong to one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddim.errors import DdimError, DdimWarning
from ddim.names import SAMPLER_NAMES
from ddim.plan.plan import Plan
from ddim.samplers import SAMPLERS as NAMED
from ddim.samplers import recommended
from models import contents, ddim, load_tiny, save_tiny, tiny_model

SMALL = ("--pilots", 8, "--device", "cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model")
    save_tiny(tmp_path / "other", seed=1)
    return tmp_path


def test_a_tuned_plan_is_written_cached_and_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = ("tune", place / "model", "--calls", 3, *SMALL)
    assert ddim(*tune, "--out", place / "plan.json") == 0
    output = capsys.readouterr()
    plan = Plan.from_json((place / "plan.json").read_text())
    assert plan.nfe == 3
    assert f"{plan.name}, 3 network evaluations" in output.out
    assert ddim(*tune, "--out", place / "again.json") == 0
    assert "cached result" in capsys.readouterr().err
    assert (place / "again.json").read_bytes() == (place / "plan.json").read_bytes()
    assert ddim(*tune, "--out", place / "fresh.json", "--fresh") == 0
    assert "cached result" not in capsys.readouterr().err
    assert (place / "fresh.json").read_bytes() == (place / "plan.json").read_bytes()
    sample = ("--plan", place / "plan.json", "-n", 2, "--device", "cpu")
    assert ddim("sample", place / "model", *sample, "--out", place / "samples") == 0
    assert len(contents(place / "samples")) == 4  # with the manifest and the list of checksums


def test_a_damaged_cached_plan_is_tuned_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = ("tune", place / "model", "--calls", 2, *SMALL, "--out", place / "plan.json")
    assert ddim(*tune) == 0
    [cached] = (place / "cache").rglob("*.json")
    first = (place / "plan.json").read_bytes()
    cached.write_text(cached.read_text()[:100])
    capsys.readouterr()
    assert ddim(*tune) == 0
    assert "cached result" not in capsys.readouterr().err
    assert (place / "plan.json").read_bytes() == first


def test_without_a_home_folder_nothing_is_cached(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    tune = ("tune", place / "model", "--calls", 2, *SMALL, "--precision", "float32", "--out", place / "plan.json")
    assert ddim(*tune) == ddim(*tune) == 0
    assert "cached result" not in capsys.readouterr().err


def test_a_plan_of_another_model_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = json.loads(tiny_model().plan(3, sampler="ddim").to_json())
    fingerprint = load_tiny(place / "model").fingerprint
    (place / "plan.json").write_text(json.dumps({**body, "made_for": fingerprint}))
    sample = ("--plan", place / "plan.json", "-n", 1, "--device", "cpu")
    assert ddim("sample", place / "model", *sample, "--out", place / "a") == 0
    capsys.readouterr()
    assert ddim("sample", place / "other", *sample, "--out", place / "b") == 2
    assert "plan ddim(equal-angle, S=3, eta=0): " in capsys.readouterr().err
    assert not (place / "b").exists()
    assert ddim("sample", place / "other", *sample, "--any-model", "--out", place / "b") == 0


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (("--calls", 1), "--nfe 1"),
        (("--calls", 5, "--pilots", 3), "--calibration-samples 3"),
        (("--calls", 5, "--solver", "euler"), "solver 'euler': is unknown"),
        (("--calls", 5, "--seed", -1), "--seed -1"),
    ],
)
def test_invalid_tuning_options_are_one_line_errors(
    place: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], wrong: str
) -> None:
    assert ddim("tune", place / "model", *words, "--device", "cpu", "--out", place / "plan.json") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {wrong}")
    assert err.count("\n") == 1
    assert not (place / "plan.json").exists()


def test_the_list_of_sampler_names_is_complete() -> None:
    assert tuple(NAMED) == SAMPLER_NAMES


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_sampler_samples_images(place: Path, name: str) -> None:
    words = ("-n", 1, "--steps", 3, "--sampler", name, "--device", "cpu", "--force")  # the network is a random one
    assert ddim("sample", place / "model", *words, "--out", place / "out") == 0
    assert json.loads((place / "out" / "manifest.json").read_text())["plan_name"]


def test_auto_uses_the_recommended_sampler_and_is_named_auto() -> None:
    model = tiny_model()
    for steps in (5, 10, 40):
        sampler, grid = recommended(steps, model.schedule, model.config.predicts)
        auto, plain = model.plan(steps, sampler="auto"), model.plan(steps, grid, sampler=sampler)
        assert auto.rows == plain.rows
        assert auto.name.replace("auto: ", "") == plain.name
        assert "auto" in auto.name
    assert model.plan(10, eta=0.5, sampler="auto") == model.plan(10, eta=0.5)
    assert model.plan(10, "log-snr", sampler="auto") == model.plan(10, "log-snr")
    assert (model.sample(2, steps=4) == model.sample(2, plan=model.plan(4, sampler="auto"))).all()


@pytest.mark.parametrize("words", [("--eta", 0.5), ("--sigma", "hat")])
def test_noise_options_require_ddim(place: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...]) -> None:
    assert ddim("sample", place / "model", "--sampler", "unipc3", *words, "--out", place / "out") == 2
    assert "sampler unipc3: " in capsys.readouterr().err


def test_an_unknown_sampler_is_a_one_line_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ddim("sample", place / "model", "--sampler", "euler", "--out", place / "out") == 2
    assert capsys.readouterr().err.startswith("error: sampler 'euler': is unknown; choose one of ddim, ab2")


def test_a_cache_that_cannot_be_written_does_not_prevent_tuning(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    assert ddim("tune", place / "model", "--calls", 2, *SMALL, "--out", place / "plan.json") == 0
    assert "cannot be written" in capsys.readouterr().err
    assert Plan.from_json((place / "plan.json").read_text()).nfe == 2


def test_samplers_with_several_evaluations_per_step_warn() -> None:
    with pytest.warns(DdimWarning, match=r"\b9\b"):
        assert tiny_model().plan(5, sampler="heun").nfe == 9


def test_a_plan_with_two_initial_states_cannot_be_sampled(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inversion = load_tiny(place / "model").inversion("reversible", 4)
    (place / "plan.json").write_text(inversion.resume_plan.to_json())
    words = ("sample", place / "model", "--plan", place / "plan.json", "-n", 1, "--device", "cpu")
    assert ddim(*words, "--out", place / "out") == 2
    assert "plan: " in capsys.readouterr().err
    assert not (place / "out").exists()
    assert ddim("check", place / "plan.json") == 0


def test_an_invalid_origin_is_an_error() -> None:
    model = tiny_model()
    for origin in (torch.zeros(3, 1, 8, 8), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(DdimError, match="origin: "):
            model.sample(4, steps=3, origin=origin, top=500)
