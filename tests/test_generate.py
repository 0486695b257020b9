"""Bulk sampling: the same bytes however it is cut, stopped, killed and gone on with."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddim.errors import DdimError, DdimWarning
from ddim.files import lock
from ddim.generate import Made, generate, picture_path, read_sheet
from ddim.model import Model
from ddim.pixels import to_uint8
from models import contents, ddim, load_tiny, process, save_tiny, tiny_model

PLANS: dict[str, dict[str, Any]] = {"eta 0": {}, "eta 1": {"eta": 1.0}, "sigma hat": {"sigma": "hat"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(saved: Path) -> Model:
    return load_tiny(saved, micro_batch=4)


def pictures(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".png")}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS)
def test_the_bytes_do_not_depend_on_how_the_run_is_cut(settings: dict[str, Any], model: Model, tmp_path: Path) -> None:
    plan = model.plan(4, **settings)
    for batch in (1, 3, 64):
        list(generate(model, plan, tmp_path / f"batch {batch}", 11, seed=5, name="tiny", batch=batch))
    list(generate(model, plan, tmp_path / "parts", 6, seed=5, name="tiny"))
    list(generate(model, plan, tmp_path / "parts", 5, start=6, seed=5, name="tiny"))
    list(generate(model, plan, tmp_path / "backwards", 5, start=6, seed=5, name="tiny", batch=2))
    list(generate(model, plan, tmp_path / "backwards", 6, seed=5, name="tiny", batch=4))
    whole = pictures(tmp_path / "batch 64")
    assert list(whole) == [f"{index:06d}.png" for index in range(11)]
    assert len(set(whole.values())) == 11
    for other in ("batch 1", "batch 3", "parts", "backwards"):
        assert pictures(tmp_path / other) == whole, other
        assert manifest(tmp_path / other)["ranges"] == [[0, 11]]
        assert manifest(tmp_path / other) == manifest(tmp_path / "batch 64")


def test_the_files_hold_what_sample_gives(model: Model, tmp_path: Path) -> None:
    list(generate(model, model.plan(4, sampler="auto"), tmp_path / "out", 5, start=2, seed=5))
    expected = to_uint8(model.sample(5, steps=4, seed=5, start=2))
    assert (read_sheet(tmp_path / "out", range(2, 7)) == expected).all()


def test_reports_start_before_the_first_picture_and_end_with_the_last(model: Model, tmp_path: Path) -> None:
    steps = generate(model, model.plan(2), tmp_path, 7, batch=3)
    assert next(steps) == Made(0, 7, 0)
    assert pictures(tmp_path) == {}
    assert list(steps) == [Made(4, 7, 0), Made(7, 7, 0)]  # micro-batches of 4
    assert list(generate(model, model.plan(2), tmp_path, 9, batch=3)) == [Made(7, 9, 7), Made(9, 9, 7)]
    assert list(generate(model, model.plan(2), tmp_path, 9, batch=3)) == [Made(9, 9, 9)]


@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS)
def test_stopped_half_way_it_is_completed_and_nothing_is_made_twice(
    settings: dict[str, Any], model: Model, tmp_path: Path
) -> None:
    plan = model.plan(4, **settings)
    list(generate(model, plan, tmp_path / "whole", 11, seed=1))
    steps = generate(model, plan, tmp_path / "stopped", 11, seed=1, batch=2)
    for made in steps:
        if made.done == 4:
            break
    steps.close()
    before = times(tmp_path / "stopped")
    assert len(before) == 4
    picture_path(tmp_path / "stopped", 1).unlink()  # a hole is filled too
    del before["000001.png"]
    (tmp_path / "stopped" / ".000009.png.123.part").write_bytes(b"half a picture")
    list(generate(model, plan, tmp_path / "stopped", 11, seed=1))
    assert pictures(tmp_path / "stopped") == pictures(tmp_path / "whole")
    after = times(tmp_path / "stopped")
    assert {name: after[name] for name in before} == before
    assert [path.name for path in (tmp_path / "stopped").glob(".*")] == [".lock"]


def test_killed_it_is_completed_by_the_same_command(saved: Path, tmp_path: Path) -> None:
    """A real process, ended by SIGKILL while it writes."""
    n = 400
    words = ("sample", saved, "-n", n, "--steps", 2, "--eta", 1, "--dtype", "float32", "--batch", 4, "--device", "cpu")
    command, env = process(*words, "--out", tmp_path / "killed")
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    deadline = time.monotonic() + 120
    while running.poll() is None and not picture_path(tmp_path / "killed", 20).exists():
        assert time.monotonic() < deadline
        select.select([running.stdout], [], [], 0.005)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    before = times(tmp_path / "killed")
    assert 20 < len(before) < n
    assert ddim(*words, "--out", tmp_path / "killed") == 0
    assert ddim(*words, "--out", tmp_path / "whole") == 0
    assert len(pictures(tmp_path / "whole")) == n
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole")
    assert manifest(tmp_path / "killed") == manifest(tmp_path / "whole")
    after = times(tmp_path / "killed")
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_after_the_batch_at_hand(
    number: signal.Signals,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Model.sample_blocks

    def interrupted(self: Model, *args: Any, **words: Any) -> Any:
        for place, block in enumerate(real(self, *args, **words)):
            if place == 1 and len(args[1]) == 10:
                signal.raise_signal(number)
            yield block

    monkeypatch.setattr(Model, "sample_blocks", interrupted)
    handler = signal.getsignal(number)
    words = ("sample", saved, "-n", 10, "--steps", 2, "--micro-batch", 3, "--out", tmp_path / "out")
    assert ddim(*words) == 128 + number
    assert signal.getsignal(number) == handler
    assert len(pictures(tmp_path / "out")) == 6
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
    assert told == [f"stopped: 6 of 10 pictures in {tmp_path / 'out'}; run the same command to make the rest"]
    assert ddim(*words) == 0
    assert "10 pictures (6 were there)" in capsys.readouterr().out


def test_the_manifest_says_what_was_run(model: Model, saved: Path, tmp_path: Path) -> None:
    plan = model.plan(4, eta=0.5)
    list(generate(model, plan, tmp_path, 3, start=2, seed=9, name="tiny"))
    found = manifest(tmp_path)
    assert found["ranges"] == [[2, 5]]
    assert found["seed"] == 9
    assert found["model"] == {"name": "tiny", "sha256": model.config.sha256, "predicts": "v"}
    assert found["plan"] == json.loads(plan.to_json())
    assert found["network_calls"] == 4
    assert found["micro_batch"] == 4
    list(generate(model, plan, tmp_path, 1, start=9, seed=9, name="tiny"))
    assert manifest(tmp_path)["ranges"] == [[2, 5], [9, 10]]
    list(generate(model, plan, tmp_path, 6, start=4, seed=9, name="tiny"))
    assert manifest(tmp_path)["ranges"] == [[2, 10]]
    assert len(pictures(tmp_path)) == 8


def test_a_picture_says_where_it_comes_from(model: Model, tmp_path: Path) -> None:
    plan = model.plan(4, eta=0.5)
    list(generate(model, plan, tmp_path, 2, start=3, seed=9, name="tiny"))
    with Image.open(picture_path(tmp_path, 4)) as picture:
        text = picture.text  # type: ignore[attr-defined]
    assert text["seed"] == "9"
    assert text["index"] == "4"
    assert text["model"] == "tiny"
    assert text["model_sha256"] == model.config.sha256
    assert text["plan"] == plan.name
    assert len(text["plan_sha256"]) == 16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"plan": {"steps": 5}}, "plan"),
        ({"plan": {"steps": 4, "eta": 1.0}}, "plan"),
        ({"plan": {"steps": 4, "grid": "linear"}}, "plan"),
        ({"model": {"seed": 1}}, "model"),
        ({"model": {"micro_batch": 2}}, "micro_batch"),
        ({"model": {"dtype": "bfloat16"}}, "dtype"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    def run(plan: dict[str, Any], model: dict[str, Any], seed: int) -> None:
        tiny_model(**model).save(tmp_path / "model")
        some = load_tiny(tmp_path / "model", **{k: v for k, v in model.items() if k != "seed"})
        list(generate(some, some.plan(**plan), tmp_path / "out", 2, seed=seed))

    first: dict[str, Any] = {"plan": {"steps": 4}, "model": {"micro_batch": 4}, "seed": 0}
    run(**first)
    before = contents(tmp_path / "out")
    model = first["model"] | change.get("model", {})
    with pytest.raises(DdimError, match=f"holds pictures of another run: {named} is "):
        run(**{**first, **change, "model": model})
    assert contents(tmp_path / "out") == before


def test_another_label_or_guidance_is_refused(tmp_path: Path) -> None:
    model = tiny_model(classes=3)
    plan = model.plan(3)
    list(generate(model, plan, tmp_path / "out", 2, label=1, guidance=2.0))
    for label, guidance in ((2, 2.0), (1, 3.0), (None, None)):
        with pytest.raises(DdimError, match="another run"):
            list(generate(model, plan, tmp_path / "out", 2, label=label, guidance=guidance))


def test_another_version_goes_on_and_says_so(model: Model, tmp_path: Path) -> None:
    plan = model.plan(3)
    list(generate(model, plan, tmp_path, 2))
    found = manifest(tmp_path)
    found["software"]["torch"] = "1.0"
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    with pytest.warns(DdimWarning, match="bytes may differ"):
        list(generate(model, plan, tmp_path, 3))
    assert len(pictures(tmp_path)) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ranges": 3}', '"x"', '{"ranges": [[0]]}'])
def test_a_damaged_manifest_is_named(text: str, model: Model, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DdimError, match=r"manifest\.json"):
        list(generate(model, model.plan(2), tmp_path, 2))
    assert contents(tmp_path) == {"manifest.json": text.encode()}


def test_a_folder_of_other_things_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(DdimError, match=r"is not empty and holds no manifest\.json"):
        list(generate(model, model.plan(2), tmp_path, 2))
    assert contents(tmp_path) == {"holiday.png": b"mine"}


def test_a_folder_in_use_is_refused(model: Model, tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(DdimError, match="is in use by another process"):
        list(generate(model, model.plan(2), tmp_path, 2))
    first = generate(model, model.plan(2), tmp_path, 2)
    next(first)
    with pytest.raises(DdimError, match="is in use by another process"):
        next(generate(model, model.plan(2), tmp_path, 2))
    first.close()
    assert len(list(generate(model, model.plan(2), tmp_path, 2))) == 2


def test_samples_that_are_not_numbers_are_not_written(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.network.conv_out.bias.fill_(torch.inf)
    with pytest.raises(DdimError, match="not finite"):
        list(generate(model, model.plan(2), tmp_path, 2))
    assert pictures(tmp_path) == {}


def test_a_sheet_is_read_in_order(tmp_path: Path) -> None:
    colour = tiny_model(in_channels=3)
    list(generate(colour, colour.plan(2), tmp_path, 4))
    page = read_sheet(tmp_path, range(1, 4))
    assert page.shape == (3, 8, 8, 3)
    assert page.dtype == np.uint8
