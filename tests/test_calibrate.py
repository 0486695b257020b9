"""The error of a model per timestep: validated on data with an analytic error, and written with unchanged weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import SCHEDULES
from ddim.data.pixels import to_float
from ddim.errors import DdimError
from ddim.exact import GaussianData
from ddim.model.load import load
from ddim.process import rng
from ddim.process.schedule import linear, zero_terminal_snr
from ddim.train import error_table as calibration
from ddim.train.error_table import TimestepMSE, choose_timesteps, error_table, interpolate
from models import contents, ddim, load_tiny, save_tiny, stripes, tiny_model, write_pictures


def scalar(variance: float) -> GaussianData:
    return GaussianData(torch.zeros(1), torch.tensor([variance]))


@given(T=st.integers(1, 300), count=st.integers(24, 400), dark=st.booleans())
def test_timesteps_are_increasing_and_include_both_ends(T: int, count: int, dark: bool) -> None:
    schedule = zero_terminal_snr(linear(T)) if dark and T > 1 else linear(T)
    times = choose_timesteps(schedule, count)
    assert times == sorted(set(times))
    assert times[0] >= 1
    assert times[-1] == T
    assert len(times) == T if count >= T else len(times) <= count
    assert set(range(1, min(T, 10) + 1)) <= set(times)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("variance", [1.0, 0.1, 0.01])
def test_100_timesteps_interpolate_the_table_to_3_percent(variance: float, name: str) -> None:
    schedule = SCHEDULES[name]
    truth = np.array([scalar(variance).error(schedule.level(t)) for t in range(1, 1001)])
    times = choose_timesteps(schedule, 100)
    table = interpolate(times, truth[np.array(times) - 1], 1000)
    lit = truth > 0
    assert np.abs(np.array(table)[lit] / truth[lit] - 1).max() < 0.03


@pytest.mark.parametrize("count", [23, 0, -3])
def test_too_few_timesteps_raise_an_error(count: int) -> None:
    with pytest.raises(DdimError, match=f"times {count}: "):
        choose_timesteps(linear(50), count)
    assert choose_timesteps(linear(5), 5) == [1, 2, 3, 4, 5]


def test_the_table_is_linear_between_timesteps_and_constant_outside() -> None:
    assert interpolate([2, 4, 7], [0.9, 0.5, 0.2], 8) == (0.9, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.2)
    assert interpolate([1, 2], [0.123456789, 1.23456789e-5], 2) == (0.12346, 1.2346e-05)


def gaussian(data: GaussianData, micro_batch: int = 50) -> Any:
    """A model that is ideal on Gaussian data, as images of one row."""

    def denoise(x: torch.Tensor, level: Any, /) -> Any:
        output = data.denoise(x.flatten(1), level)
        return SimpleNamespace(x0=output.x0.view_as(x), eps=output.eps.view_as(x))

    shape = (1, 1, len(data.mean))
    device = torch.device("cpu")
    return SimpleNamespace(denoise=denoise, schedule=linear(), shape=shape, micro_batch=micro_batch, device=device)


def test_the_error_of_an_ideal_denoiser_is_the_analytic_one() -> None:
    """Within five standard errors, which are analytic too: eps - E[eps | x] is normal, each is error sqrt(2 / dN)."""
    data = GaussianData(torch.linspace(-1, 1, 20), torch.full((20,), 0.25))
    images = data.sample(400, seed=1).float().view(400, 1, 1, 20)
    for one in error_table(gaussian(data), images, [1, 10, 100, 400, 1000], seed=2):
        truth = data.error(linear().level(one.t))
        assert one.error == pytest.approx(truth, abs=5 * one.standard_error)
        assert one.standard_error == pytest.approx(truth * np.sqrt(2 / 8000), rel=0.2)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_error_is_the_mean_over_images_and_pixels(predicts: str) -> None:
    model = tiny_model(predicts=predicts, micro_batch=3)
    images = stripes(5)
    for one in error_table(model, images, [600, 5], seed=7):
        level, errors = model.schedule.level(one.t), []
        for index, image in enumerate(images):
            eps = torch.from_numpy(rng.normal(7, index, one.t, (1, 8, 8)))
            x0 = to_float(image[None])[0]
            x = level.signal * x0 + level.noise * eps
            with torch.no_grad():
                output = model.network(x[None], torch.tensor([float(one.t)]))[0]
            message = {
                "eps": output,
                "x0": (x - level.signal * output) / level.noise,
                "v": level.noise * x + level.signal * output,
            }[predicts]
            errors.append((message - eps).double().square().mean().item())
        assert one.error == pytest.approx(np.mean(errors), rel=1e-4)
        assert one.standard_error == pytest.approx(np.std(errors, ddof=1) / np.sqrt(5), rel=1e-3)


def test_each_timestep_is_independent_and_bytes_equal_floats() -> None:
    model = tiny_model()
    together = list(error_table(model, stripes(4), [900, 3, 40], seed=1))
    assert [one.t for one in together] == [900, 3, 40]
    assert list(error_table(model, to_float(stripes(4)), [3], seed=1)) == [together[1]]
    assert next(iter(error_table(model, stripes(4), [3], seed=2))) != together[1]
    assert np.isnan(next(iter(error_table(model, stripes(1), [3]))).standard_error)


def test_labels_are_passed_to_the_network() -> None:
    model = tiny_model(classes=3, micro_batch=2)
    (plain,) = error_table(model, stripes(5), [300])
    (output,) = error_table(model, stripes(5), [300], labels=[0, 1, 2, 1, 0])
    (same,) = error_table(model, stripes(5), [300], labels=np.array([0, 1, 2, 1, 0]))
    assert plain != output == same
    ones = [next(iter(error_table(model, stripes(1), [300], labels=[label]))).error for label in range(3)]
    assert len(set(ones)) == 3
    with pytest.raises(DdimError, match=r"^labels: .*\b0\.\.2\b"):
        next(iter(error_table(model, stripes(5), [300], labels=[0, 1, 2, 3, 0])))


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (2, 9, 8, 1), (2, 8, 8, 3)])
def test_no_images_or_images_of_another_shape_raise_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(DdimError, match=r"^images: .*\(1, 8, 8\)"):
        next(iter(error_table(tiny_model(), np.zeros(shape, np.uint8), [1])))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    write_pictures(tmp_path / "pictures", 6)
    return tmp_path


def calibrate(place: Path, *more: object, out: str = "out") -> int:
    words = ("--limit", 5, "--times", 24, "--device", "cpu")
    return ddim("calibrate", place / "model", place / "pictures", *words, "--out", place / out, *more)


def test_the_command_adds_only_the_error_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(place / "model")
    assert calibrate(place, "--seed", 3) == 0
    output = capsys.readouterr().out.splitlines()
    assert contents(place / "model") == before
    after = contents(place / "out")
    assert sorted(after) == ["config.json", "model.safetensors"]
    assert after["model.safetensors"] == before["model.safetensors"]
    model = load_tiny(place / "out")
    times = choose_timesteps(model.schedule, 24)
    found = list(error_table(model, stripes(6)[:5], times, 3))
    assert model.config.error == pytest.approx(interpolate(times, [one.error for one in found], 1000), rel=1e-4)
    assert model.config.provenance.error_from == "calibrate pictures (train), 5 images"
    old, new = json.loads(before["config.json"]), json.loads(after["config.json"])
    del (
        new["checksum"],
        old["checksum"],
        new["error"],
        old["error"],
        new["provenance"]["error_from"],
        old["provenance"]["error_from"],
    )
    assert new == old
    assert output[0].split() == ["t", "error", "in", "eps", "standard", "error"]
    lines = [line.split() for line in output[1:-1]]
    assert lines[0] == ["1", f"{found[0].error:.6f}", f"{found[0].standard_error:.1e}"]
    assert (lines[-1][0], len(lines)) == ("1000", 12)
    assert output[-1] == f"{len(times)} timesteps, 5 images: {place / 'out'}"


def test_info_prints_the_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(place) == 0
    capsys.readouterr()
    assert ddim("info", place / "model") == 0
    assert "error table none (`ddim calibrate` measures one)" in " ".join(capsys.readouterr().out.split())
    assert ddim("info", place / "out") == 0
    error = load(place / "out", "cpu").config.error
    assert error is not None
    row = f"error table from calibrate pictures (train), 5 images: {error[0]:.4g} at t = 1 to {error[-1]:.4g} at T"
    assert row in " ".join(capsys.readouterr().out.split())


def test_a_model_can_be_calibrated_in_place_repeatedly(place: Path) -> None:
    before = contents(place / "model")
    assert calibrate(place, out="model") == 0
    first = load_tiny(place / "model").config.error
    assert calibrate(place, "--seed", 9, out="model") == 0
    assert load_tiny(place / "model").config.error != first
    assert contents(place / "model")["model.safetensors"] == before["model.safetensors"]
    assert sorted(path.name for path in place.iterdir()) == ["model", "pictures"]


def test_an_interrupted_calibration_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, before = calibration.error_table, contents(place)

    def interrupted(*words: Any) -> Iterator[TimestepMSE]:
        for one in real(*words):
            if one.t == 4:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(calibration, "error_table", interrupted)
    assert calibrate(place) == 130
    assert contents(place) == before
    assert sorted(path.name for path in place.iterdir()) == ["model", "pictures"]


def test_a_labelled_model_is_calibrated_with_the_labels_of_the_data(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", classes=2)
    for label in ("cats", "dogs"):
        write_pictures(tmp_path / "pictures" / label, 2)
    assert calibrate(tmp_path) == 0
    model = load_tiny(tmp_path / "out")
    images = np.concatenate([stripes(2), stripes(2)])
    (one,) = error_table(model, images, [1], labels=[0, 0, 1, 1])
    assert model.config.error is not None
    assert model.config.error[0] == pytest.approx(one.error, rel=1e-4)
