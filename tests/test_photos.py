"""The preset `photos`, recipes that are fitted to the length of a run, and folders of images with a stray text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.cli import _fitting
from ddim.data.policy import ImagePolicy
from ddim.data.text import is_text
from ddim.errors import DdimError
from ddim.nn.unet import UNetConfig
from ddim.train import fit, photos
from models import ddim, recipe, tiny_config, tiny_set, write_pictures


@pytest.fixture(autouse=True)
def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off TensorBoard, which takes most of the time."""
    monkeypatch.setattr("ddim.train.logger.logger_of", lambda *_: None)


def speed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let a machine take this many seconds per step of the smallest network."""

    def measured(model: Any, *_: Any) -> float:
        return seconds * (model.network.channels / 32 if model.network.kind == "unet" else 1)

    monkeypatch.setattr(fit, "seconds_per_step", measured)


def configuration(folder: Path) -> dict[str, Any]:
    text = (folder / "run.json").read_text(encoding="utf-8")
    return json.loads(text[: text.rindex("}") + 1])


SIZES = [(8, 8), (16, 16), (28, 28), (32, 32), (24, 40), (33, 47), (50, 30), (64, 64), (96, 128), (125, 125)]


@pytest.mark.parametrize("scale", photos.SCALES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_scale_has_a_network_for_any_size(scale: photos.Scale, height: int, width: int) -> None:
    for channels in (1, 3):
        config = UNetConfig(**photos.network(scale, ImagePolicy(height=height, width=width, channels=channels)))
        assert config.shape == (channels, height, width)
        for side in config.attention:
            assert side <= 16


@pytest.mark.parametrize("scale", photos.SCALES)
@pytest.mark.parametrize("steps", [1, 7, 100, 5000, 10**6])
def test_all_intervals_fit_the_number_of_steps(scale: photos.Scale, steps: int) -> None:
    settings = recipe(**photos.recipe(scale, steps))
    assert settings.warmup <= max(1, steps / 10)
    assert 1 <= settings.checkpoint_every <= settings.preview_every <= max(1, steps / 4)


def test_more_time_gives_a_larger_network_and_a_slower_machine_a_smaller_one() -> None:
    def chosen(budget: float, each: float) -> int:
        measure = lambda scale: each * scale.channels * scale.blocks  # noqa: E731
        return photos.choose(measure, lambda seconds: int(budget / seconds), float("inf"))[0].channels

    widths = [chosen(60.0 * 4**k, 0.002) for k in range(8)]
    assert widths == sorted(widths)
    assert widths[0] == 32
    assert widths[-1] == photos.SCALES[-1].channels
    assert chosen(3600, 0.002) >= chosen(3600, 0.02)


def test_a_short_run_scales_its_warmup_and_intervals() -> None:
    changes = {each.name: each.value for each in fit.fit_to_length(recipe(warmup=500, preview_every=1000), 264, 1.0)}
    assert 1 <= changes["warmup"] <= 264 / 10
    assert 1 <= changes["preview_every"] <= 66
    assert fit.fit_to_length(recipe(warmup=10, preview_every=0, log_every=2), 264, 1.0) == []
    assert fit.fit_to_length(recipe(warmup=500), 264, 1.0, ("warmup", "log_every")) == []


def test_checkpoints_of_slow_steps_come_often_enough() -> None:
    (change,) = fit.fit_to_length(recipe(checkpoint_every=1000, log_every=1), 800_000, 90.0)
    assert change.name == "checkpoint_every"
    assert change.value * 90 <= 600


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_the_measured_time_of_a_step_is_positive_and_leaves_no_trace(kind: str) -> None:
    before = torch.random.get_rng_state()
    train = recipe(gamma="v" if kind == "pictures" else "simple")
    assert 0 < fit.seconds_per_step(tiny_config(kind), train, tiny_set(kind), "cpu") < 30
    assert torch.equal(torch.random.get_rng_state(), before)


def test_photos_train_and_resume_with_the_recipe_of_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Colour images that are not square; the machine is slower at the second start."""
    write_pictures(tmp_path / "pictures", 6)
    (tmp_path / "pictures/notes.txt").write_text("holiday", encoding="utf-8")
    command = ("train", tmp_path / "pictures", "--preset", "photos", "--size", "8x12", "--device", "cpu", "--batch", 2)
    command += ("--set", "network.channels=16", "--preview-every", 0, "--out", tmp_path / "run")
    speed(monkeypatch, 0.001)
    assert ddim(*command, "--steps", 2) == 0
    first = configuration(tmp_path / "run")
    data = first["model"]["data"]
    assert (data["height"], data["width"], data["channels"]) == (8, 12, 3)
    speed(monkeypatch, 5.0)
    assert ddim(*command, "--steps", 3) == 0
    second = configuration(tmp_path / "run")
    assert second["model"] == first["model"]
    assert {key for key in first["train"] if first["train"][key] != second["train"][key]} == {"steps"}
    assert "3 steps" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "budget", "smallest"), [(0.3, "5min", True), (0.01, "1h", False)])
def test_the_network_of_photos_follows_the_measured_speed(
    seconds: float, budget: str, smallest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddim.cli._starting import seconds as duration
    from ddim.train.presets import preset

    speed(monkeypatch, seconds)
    data: Any = tiny_set()
    data.policy = ImagePolicy(height=32, width=32, channels=1)
    changes: Any = {part: {} for part in ("data", "train", "network", "schedule", "categorical")}
    changes["train"] |= {"budget": duration(budget), "steps": None}
    model, train = _fitting.fitted("photos", preset("photos"), changes, None, data, "cpu", Path("no such folder"))
    assert (model.network.channels == photos.SCALES[0].channels) == smallest
    assert train.warmup <= duration(budget) / seconds / 10


def test_a_run_that_would_take_days_says_so_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    speed(monkeypatch, 10.0)
    monkeypatch.setattr("ddim.train.run.train", lambda *_: (_ for _ in ()).throw(DdimError("run", "starts", "")))
    command = ("train", "digits", "--steps", 100_000, "--device", "cpu", "--out", tmp_path / "run")
    assert ddim(*command) == 2
    lines = capsys.readouterr().err.splitlines()
    (note,) = [line for line in lines if "days" in line]
    assert "--preset photos" in note
    assert "100,000" in note
    assert lines.index(note) < len(lines) - 1


def test_a_warmup_of_the_user_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    speed(monkeypatch, 1.0)
    command = ("train", "digits", "--budget", "4min", "--warmup", 500, "--device", "cpu", "--out", tmp_path / "run")
    assert ddim(*command) == 2
    assert "--warmup" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("notes.txt", "a.png"), False),
        (("LICENSE.txt", "train-00000-of-00001.parquet"), False),
        (("captions.txt", "people/a.JPG"), False),
        (("train.txt", "a.png"), True),
        (("shakespeare.txt",), True),
        (("a.png",), False),
    ],
)
def test_a_folder_is_of_texts_without_images_or_with_a_train_file(
    names: tuple[str, ...], text: bool, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert is_text(tmp_path) == text


def test_an_unreadable_photo_is_one_line_that_names_an_option_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "pictures", 6)
    (tmp_path / "pictures/broken.png").write_bytes(b"no image")
    speed(monkeypatch, 0.001)
    command = ("train", tmp_path / "pictures", "--preset", "photos", "--size", 8, "--device", "cpu", "--batch", 2)
    command += ("--set", "network.channels=16", "--steps", 1, "--preview-every", 0, "--out", tmp_path / "run")
    assert ddim(*command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken.png" in line
    assert "--skip-unreadable" in line
    assert ddim(*command, "--skip-unreadable") == 0
