"""Bulk sampling: the same bytes for any batch size, order of the parts, stop, kill and resume."""

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

from ddim._io.atomic import lock
from ddim.data.pixels import to_uint8
from ddim.errors import DdimError, DdimWarning
from ddim.evaluation.sample_folder import SampleProgress, generate, read_sheet
from ddim.model.modality import image_path
from ddim.model.model import Model
from models import KINDS, contents, ddim, load_tiny, process, save_tiny, tiny_model

PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "eta 0": ("pictures", {}),
    "eta 1": ("pictures", {"eta": 1.0}),
    "sigma hat": ("pictures", {"sigma": "hat"}),
    "levels": ("levels", {"eta": 0.3}),
    "text": ("text", {"sampler": "markov"}),
    "masked text": ("masked text", {"eta": 0.3, "temperature": 0.8, "top_p": 0.9}),
}
every_plan = pytest.mark.parametrize(("saved", "settings"), PLANS.values(), ids=PLANS, indirect=["saved"])
every_kind = pytest.mark.parametrize("saved", KINDS, indirect=True)
AnyModel = Model


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image model, or with one of the modality of the test's parameter."""
    kind = getattr(request, "param", "pictures")
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", kind=kind)


@pytest.fixture(scope="module")
def model(saved: Path) -> AnyModel:
    return load_tiny(saved, micro_batch=4)


def samples(folder: Path) -> dict[str, bytes]:
    """The sample files of a run, images or texts."""
    return {name: data for name, data in contents(folder).items() if name.endswith((".png", ".txt"))}


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.*") if path.suffix in (".png", ".txt")}


@every_plan
def test_the_bytes_do_not_depend_on_batches_or_parts(settings: dict[str, Any], model: AnyModel, tmp_path: Path) -> None:
    plan = model.plan(4, **settings)
    for batch in (1, 3, 64):
        list(generate(model, plan, tmp_path / f"batch {batch}", 11, seed=5, name="tiny", batch=batch))
    list(generate(model, plan, tmp_path / "parts", 6, seed=5, name="tiny"))
    list(generate(model, plan, tmp_path / "parts", 5, start=6, seed=5, name="tiny"))
    list(generate(model, plan, tmp_path / "backwards", 5, start=6, seed=5, name="tiny", batch=2))
    list(generate(model, plan, tmp_path / "backwards", 6, seed=5, name="tiny", batch=4))
    wgap = samples(tmp_path / "batch 64")
    assert list(wgap) == [model.kind.path(Path(), index).name for index in range(11)]
    assert next(iter(wgap)) == ("000000.txt" if len(model.shape) == 1 else "000000.png")
    assert len(set(wgap.values())) == 11
    for other in ("batch 1", "batch 3", "parts", "backwards"):
        assert samples(tmp_path / other) == wgap, other
        assert manifest(tmp_path / other)["ranges"] == [[0, 11]]
        assert manifest(tmp_path / other) == manifest(tmp_path / "batch 64")


@every_kind
def test_the_files_match_model_sample(model: AnyModel, tmp_path: Path) -> None:
    list(generate(model, model.plan(4, sampler="auto"), tmp_path / "out", 5, start=2, seed=5))
    expected = model.sample(5, steps=4, seed=5, start=2)
    if not model.config.categorical:
        assert (read_sheet(tmp_path / "out", range(2, 7)) == to_uint8(expected)).all()
    elif len(model.shape) == 1:
        texts = [model.kind.path(tmp_path / "out", index).read_text() for index in range(2, 7)]
        assert texts == model.text(expected)
    else:
        grey = np.array([0, 85, 170, 255])
        assert (read_sheet(tmp_path / "out", range(2, 7)) == grey[expected.permute(0, 2, 3, 1)]).all()


@every_kind
def test_progress_is_reported_before_the_first_and_after_every_batch(model: AnyModel, tmp_path: Path) -> None:
    steps = generate(model, model.plan(2), tmp_path, 7, batch=3)
    assert next(steps) == SampleProgress(0, 7, 0)
    assert samples(tmp_path) == {}
    assert list(steps) == [SampleProgress(4, 7, 0), SampleProgress(7, 7, 0)]  # micro-batches of 4
    assert list(generate(model, model.plan(2), tmp_path, 9, batch=3)) == [
        SampleProgress(7, 9, 7),
        SampleProgress(9, 9, 7),
    ]
    assert list(generate(model, model.plan(2), tmp_path, 9, batch=3)) == [SampleProgress(9, 9, 9)]


@every_plan
def test_resume_after_a_stop_generates_only_missing_samples(
    settings: dict[str, Any], model: AnyModel, tmp_path: Path
) -> None:
    plan = model.plan(4, **settings)
    list(generate(model, plan, tmp_path / "wgap", 11, seed=1))
    steps = generate(model, plan, tmp_path / "stopped", 11, seed=1, batch=2)
    for progress in steps:
        if progress.done == 4:
            break
    steps.close()
    before = times(tmp_path / "stopped")
    assert len(before) == 4
    gap = model.kind.path(tmp_path / "stopped", 1)
    gap.unlink()  # is generated again too
    del before[gap.name]
    (tmp_path / "stopped" / f".000009{gap.suffix}.123.part").write_bytes(b"half a sample")
    list(generate(model, plan, tmp_path / "stopped", 11, seed=1))
    assert samples(tmp_path / "stopped") == samples(tmp_path / "wgap")
    after = times(tmp_path / "stopped")
    assert {name: after[name] for name in before} == before
    assert [path.name for path in (tmp_path / "stopped").glob(".*")] == [".lock"]


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "n"), [("pictures", 400), ("masked text", 200)], indirect=["saved"])
def test_resume_after_a_kill_is_bit_exact(n: int, saved: Path, tmp_path: Path) -> None:
    """A real process, ended by SIGKILL while it writes."""
    words = ("sample", saved, "-n", n, "--steps", 2, "--eta", 1, "--dtype", "float32", "--batch", 4, "--device", "cpu")
    command, env = process(*words, "--out", tmp_path / "killed")
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    deadline = time.monotonic() + 120
    twentieth = load_tiny(saved).kind.path(tmp_path / "killed", 20)
    while running.poll() is None and not twentieth.exists():
        assert time.monotonic() < deadline
        select.select([running.stdout], [], [], 0.005)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    before = times(tmp_path / "killed")
    assert 20 < len(before) < n
    assert ddim(*words, "--out", tmp_path / "killed") == 0
    assert ddim(*words, "--out", tmp_path / "wgap") == 0
    assert len(samples(tmp_path / "wgap")) == n
    assert samples(tmp_path / "killed") == samples(tmp_path / "wgap")
    assert manifest(tmp_path / "killed") == manifest(tmp_path / "wgap")
    after = times(tmp_path / "killed")
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.parametrize(
    ("saved", "number", "noun"),
    [
        ("pictures", signal.SIGINT, "images"),
        ("pictures", signal.SIGTERM, "images"),
        ("levels", signal.SIGINT, "images"),
        ("text", signal.SIGTERM, "texts"),
    ],
    indirect=["saved"],
)
def test_a_signal_stops_after_the_current_batch(
    number: signal.Signals,
    noun: str,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Model.sample_blocks

    def interrupted(self: Model, *args: Any, **words: Any) -> Any:
        for batch, block in enumerate(real(self, *args, **words)):
            if batch == 1 and len(args[1]) == 10:
                signal.raise_signal(number)
            yield block

    monkeypatch.setattr(Model, "sample_blocks", interrupted)
    handler = signal.getsignal(number)
    words = ("sample", saved, "-n", 10, "--steps", 2, "--micro-batch", 3, "--out", tmp_path / "out")
    assert ddim(*words) == 128 + number
    assert signal.getsignal(number) == handler
    assert len(samples(tmp_path / "out")) == 6
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
    assert line.startswith(f"stopped: 6 of 10 {noun} in {tmp_path / 'out'}; ")
    assert ddim(*words) == 0
    assert f"10 {noun} (6 existed)" in capsys.readouterr().out


@every_kind
def test_the_manifest_records_the_run(model: AnyModel, tmp_path: Path) -> None:
    plan = model.plan(4, eta=0.5)
    list(generate(model, plan, tmp_path, 3, start=2, seed=9, name="tiny"))
    content = manifest(tmp_path)
    assert content["ranges"] == [[2, 5]]
    assert content["seed"] == 9
    assert content["model"] == {"name": "tiny", "sha256": model.config.sha256, "predicts": model.config.predicts}
    assert content["plan"] == json.loads(plan.to_json())
    assert model.kind.read_plan(json.dumps(content["plan"]), "plan") == plan
    assert content["shape"] == list(model.shape)
    assert content["network_calls"] == 4
    assert content["micro_batch"] == 4
    list(generate(model, plan, tmp_path, 1, start=9, seed=9, name="tiny"))
    assert manifest(tmp_path)["ranges"] == [[2, 5], [9, 10]]
    list(generate(model, plan, tmp_path, 6, start=4, seed=9, name="tiny"))
    assert manifest(tmp_path)["ranges"] == [[2, 10]]
    assert len(samples(tmp_path)) == 8


def test_images_have_the_run_in_their_metadata(model: Model, tmp_path: Path) -> None:
    plan = model.plan(4, eta=0.5)
    list(generate(model, plan, tmp_path, 2, start=3, seed=9, name="tiny"))
    with Image.open(image_path(tmp_path, 4)) as image:
        text = image.text  # type: ignore[attr-defined]
    assert text["seed"] == "9"
    assert text["index"] == "4"
    assert text["model"] == "tiny"
    assert text["model_sha256"] == model.config.sha256
    assert text["plan"] == plan.name
    assert len(text["plan_sha256"]) == 16


@pytest.mark.parametrize("kind", ["pictures", "text"])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"plan": {"steps": 5}}, "steps"),
        ({"plan": {"steps": 4, "eta": 1.0}}, "plan"),
        ({"plan": {"steps": 4, "grid": "linear"}}, "plan"),
        ({"model": {"seed": 1}}, "model"),
        ({"model": {"micro_batch": 2}}, "micro_batch"),
        ({"model": {"dtype": "bfloat16"}}, "dtype"),
    ],
)
def test_another_run_in_the_same_folder_is_an_error(
    change: dict[str, Any], key: str, kind: str, tmp_path: Path
) -> None:
    def run(plan: dict[str, Any], model: dict[str, Any], seed: int) -> None:
        tiny_model(kind=kind, **model).save(tmp_path / "model")
        loaded = load_tiny(tmp_path / "model", **{k: v for k, v in model.items() if k != "seed"})
        list(generate(loaded, loaded.plan(**plan), tmp_path / "out", 2, seed=seed))

    first: dict[str, Any] = {"plan": {"steps": 4}, "model": {"micro_batch": 4}, "seed": 0}
    run(**first)
    before = contents(tmp_path / "out")
    model = first["model"] | change.get("model", {})
    with pytest.raises(DdimError, match=rf"out: .*\b{key}\b"):
        run(**{**first, **change, "model": model})
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["pictures", "masked text"])
def test_another_label_or_guidance_is_an_error(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind=kind, classes=3)
    plan = model.plan(3)
    list(generate(model, plan, tmp_path / "out", 2, label=1, guidance=2.0))
    for label, guidance in ((2, 2.0), (1, 3.0), (None, None)):
        with pytest.raises(DdimError, match="out: "):
            list(generate(model, plan, tmp_path / "out", 2, label=label, guidance=guidance))


@every_kind
def test_another_version_resumes_with_a_warning(model: AnyModel, tmp_path: Path) -> None:
    plan = model.plan(3)
    list(generate(model, plan, tmp_path, 2))
    content = manifest(tmp_path)
    content["software"]["torch"] = "1.0"
    content["checksum"] = ""
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.warns(DdimWarning):
        list(generate(model, plan, tmp_path, 3))
    assert len(samples(tmp_path)) == 3


@pytest.mark.parametrize("saved", ["pictures", "text"], indirect=True)
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ranges": 3}', '"x"', '{"ranges": [[0]]}'])
def test_a_damaged_manifest_is_an_error(text: str, model: AnyModel, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DdimError, match=r"manifest\.json"):
        list(generate(model, model.plan(2), tmp_path, 2))
    assert contents(tmp_path) == {"manifest.json": text.encode()}


@every_kind
def test_a_folder_of_other_files_is_an_error(model: AnyModel, tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(DdimError, match=r"\bmanifest\.json\b"):
        list(generate(model, model.plan(2), tmp_path, 2))
    assert contents(tmp_path) == {"holiday.png": b"mine"}


@pytest.mark.parametrize("saved", ["pictures", "text"], indirect=True)
def test_a_folder_in_use_is_an_error(model: AnyModel, tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(DdimError):
        list(generate(model, model.plan(2), tmp_path, 2))
    first = generate(model, model.plan(2), tmp_path, 2)
    next(first)
    with pytest.raises(DdimError):
        next(generate(model, model.plan(2), tmp_path, 2))
    first.close()
    assert len(list(generate(model, model.plan(2), tmp_path, 2))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_are_not_finite_are_not_written(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind=kind)
    for parameter in model.network.parameters():
        parameter.fill_(torch.nan)
    with pytest.raises(DdimError, match=r"^samples: "):
        list(generate(model, model.plan(2), tmp_path, 2))
    assert samples(tmp_path) == {}


def test_images_are_read_in_order(tmp_path: Path) -> None:
    colour = tiny_model(in_channels=3)
    list(generate(colour, colour.plan(2), tmp_path, 4))
    page = read_sheet(tmp_path, range(1, 4))
    assert page.shape == (3, 8, 8, 3)
    assert page.dtype == np.uint8
