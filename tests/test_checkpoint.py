"""Model folders: round trips, errors that name the damaged file, and no code that is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim._io.atomic import sha256
from ddim.errors import DdimError
from ddim.model import checkpoint
from ddim.model.config import ModelConfig
from ddim.model.load import load
from ddim.model.model import Model
from models import CATEGORICAL, KINDS, LETTERS, contents, load_tiny, save_tiny, tiny_model

every_kind = pytest.mark.parametrize("kind", KINDS, indirect=True)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """The modality of the model in `folder`."""
    return getattr(request, "param", "pictures")


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", kind=kind)


def error_of(folder: Path) -> str:
    """The one-line error of loading a model."""
    with pytest.raises(DdimError) as caught:
        load(folder, "cpu")
    line = str(caught.value)
    assert "\n" not in line
    return line


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes | {"checksum": ""}))


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Replace the weights and update the checksum."""
    save_file(weights, folder / "model.safetensors")
    edit(folder, sha256=sha256(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("kind", "predicts"),
    [*(("pictures", what) for what in ("eps", "x0", "v")), *((kind, "x0") for kind in CATEGORICAL)],
)
@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")  # of eps: where it starts, and that it clips
def test_round_trip(kind: str, predicts: str, tmp_path: Path) -> None:
    model = tiny_model(kind=kind, predicts=predicts, classes=3, dropout=0.1)
    model.save(tmp_path / "a" / "model")
    again = load_tiny(tmp_path / "a" / "model")
    assert type(again) is type(model)
    assert again.config.model_copy(update={"sha256": ""}) == model.config
    for key, value in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value), key
    extra = {} if model.config.categorical else {"clip_x0": False}
    plan = model.plan(grid=[1, 300, 600, 1000], **extra)
    assert torch.equal(again.sample(2, plan=plan), model.sample(2, plan=plan))
    assert sorted(contents(tmp_path / "a")) == ["model/config.json", "model/model.safetensors"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


@every_kind
def test_the_checksum_is_that_of_the_weights_file(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["sha256"] == sha256(folder / "model.safetensors")


@every_kind
def test_weights_saved_in_bfloat16_are_loaded_as_float32(kind: str, folder: Path) -> None:
    model = tiny_model(kind=kind)
    model.save(folder, torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert {value.dtype for value in load_tiny(folder).network.state_dict().values()} == {torch.float32}


@every_kind
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_changed_byte_is_detected(where: str, folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert "model.safetensors: does not match the checksum in config.json; " in error_of(folder)


@every_kind
def test_truncated_weights_are_detected_even_with_a_correct_checksum(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "checksum" in error_of(folder)
    edit(folder, sha256=sha256(path))
    assert "is not a safetensors file" in error_of(folder)


@every_kind
def test_a_missing_key_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = sorted(weights)[0]
    del weights[key]
    rewrite(folder, weights)
    assert f"{key} is missing" in error_of(folder)


@every_kind
def test_an_extra_key_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    rewrite(folder, weights | {"stowaway": torch.zeros(3)})
    assert "stowaway is unexpected" in error_of(folder)


@pytest.mark.parametrize(
    ("kind", "key", "size"),
    [
        ("pictures", "conv_in.bias", 16),
        ("levels", "unet.conv_in.bias", 16),
        ("text", "logits.bias", 7),
        ("masked text", "logits.bias", 8),
    ],
    indirect=["kind"],
)
def test_a_wrong_shape_is_named(key: str, size: int, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    rewrite(folder, weights | {key: torch.zeros(3)})
    assert f"{key} is [3], not [{size}]" in error_of(folder)


ZEROS = {"name": "cosine", "zero_terminal_snr": True}
WORDS = {"length": 12, "characters": LETTERS}
WRONG: list[Any] = [
    *(
        (kind, changes, named)
        for kind in ("pictures", "text")
        for changes, named in (
            ({"colour": 1}, "colour"),
            ({"version": 2}, "version"),
            ({"format": "onnx"}, "format"),
            ({"predicts": "noise"}, "predicts"),
            ({"schedule": {"name": "linear", "T": 0}}, "schedule.T"),
            ({"schedule": {"name": "betas", "betas": [0.1, 0.2], "T": 3}}, "model/config.json"),
            ({"schedule": {"name": "betas", "betas": [0.1, 1.5], "T": 2}}, "beta"),
            ({"network": {"groups": 7}}, "network"),
            ({"error": [0.5]}, "model/config.json"),
            ({"error": [0.5] * 999 + [-0.1]}, "error.999"),
        )
    ),
    ("pictures", {"data": {"height": 16, "width": 8, "channels": 1}}, "model/config.json"),
    ("pictures", {"categorical": {"categories": 4}, "predicts": "x0"}, "model/config.json"),
    ("levels", {"categorical": None}, "model/config.json"),
    ("levels", {"categorical": {"categories": 5}}, "model/config.json"),
    ("levels", {"predicts": "eps"}, "model/config.json"),
    ("levels", {"categorical": {"categories": 4, "pi": [0.5, 0.5]}}, "model/config.json"),
    ("levels", {"categorical": {"categories": 4, "pi": [0.5, 0.5, 0.5, 0.5]}}, "model/config.json"),
    ("levels", {"categorical": {"categories": 4, "pi": [0.5, 0.5, 0, 0]}}, "zero_terminal_snr"),
    ("levels", {"categorical": {"categories": 4, "pi": "grey"}}, "categorical.pi"),
    ("levels", {"categorical": {"categories": 4, "carry_over": True}}, "model/config.json"),
    ("levels", {"categorical": {"categories": 1}}, "categorical.categories"),
    ("text", {"data": WORDS | {"length": 13}}, "model/config.json"),
    ("text", {"data": WORDS | {"characters": LETTERS + "z"}}, "model/config.json"),
    pytest.param("text", {"data": WORDS | {"characters": LETTERS[:-1] + "a"}}, "model/config.json"),
    pytest.param("text", {"data": WORDS | {"length": 0}}, "model/config.json"),
    pytest.param("pictures", {"data": {"height": 0, "width": 8, "channels": 1}}, "model/config.json"),
    ("text", {"data": {"height": 8, "width": 8, "channels": 1}}, "model/config.json"),
    (
        "text",
        {"categorical": {"categories": 7, "pi": "mask"}, "schedule": ZEROS},
        "model/config.json",
    ),
    ("masked text", {"schedule": {"name": "cosine"}}, "zero_terminal_snr"),
    ("masked text", {"categorical": None}, "model/config.json"),
]


@pytest.mark.parametrize(("kind", "changes", "named"), WRONG, indirect=["kind"])
def test_a_wrong_configuration_is_named(changes: dict[str, Any], named: str, folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(DdimError) as caught:
        load(folder, "cpu").schedule  # noqa: B018
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_array_of_numbers_is_written_on_one_line(tmp_path: Path) -> None:
    """Of any length; a string that looks like an array is unchanged."""
    model = tiny_model()
    values = model.config.model_dump()
    values["schedule"] = {"name": "betas", "T": 40, "betas": [1e-05, *(0.01 + i / 1000 for i in range(39))]}
    values["error"] = [1 / (3 + t) for t in range(40)]
    values["provenance"]["command"] = "ddim train 'a [\n  1,\n  2\n]' --set network.attention=[4, 8]"
    config = ModelConfig.model_validate(values)
    Model(model.network, config).save(tmp_path / "model")
    text = (tmp_path / "model/config.json").read_text()
    assert checkpoint.read(tmp_path / "model")[0].model_copy(update={"sha256": ""}) == config
    lines = {line.split('"')[1]: line.rstrip(",") for line in text.splitlines() if '"' in line}
    for key, numbers in (("betas", 40), ("multipliers", 2), ("attention", 1), ("error", 40)):
        assert lines[key].endswith("]"), key
        assert lines[key].count(",") == numbers - 1, key
    assert not re.search(r"^\s*[-\d.]", text, re.M)


def test_the_error_is_interpolated_linearly_between_timesteps() -> None:
    values = tiny_model().config.model_dump() | {"schedule": {"T": 4}, "error": [0.8, 0.4, 0.3, 0.1]}
    config = ModelConfig.model_validate(values)
    schedule = config.schedule.build()
    actual = [config.error_at(schedule.level(t)) for t in (1, 1.25, 2.5, 4, 0.5, 0)]
    assert actual == pytest.approx([0.8, 0.7, 0.35, 0.1, 0.9, 1.0])


@every_kind
def test_a_copy_has_byte_identical_weights(kind: str, folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path), path, {"written by": "another program"})
    edit(folder, sha256=sha256(path))
    config = checkpoint.read(folder)[0].model_copy(update={"error": (0.5,) * 1000})
    before = contents(folder)
    for place in (tmp_path / "deep/copy", folder):
        checkpoint.copy(folder, place, config)
        assert (place / "model.safetensors").read_bytes() == before["model.safetensors"]
        assert checkpoint.read(place)[0] == config
    save_tiny(tmp_path / "other", seed=1, kind=kind)
    with pytest.raises(DdimError, match="other: "):
        checkpoint.copy(folder, tmp_path / "other", config)
    with pytest.raises(DdimError):
        checkpoint.copy(folder, tmp_path, config)
    with pytest.raises(DdimError, match=r"other/model\.safetensors: "):
        checkpoint.copy(tmp_path / "other", tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"model: tiny", bytes(range(128, 200))])
def test_a_configuration_that_is_not_json_raises_an_error(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    assert str(folder / "config.json") in error_of(folder)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_pickle_raises_an_error_and_is_never_executed(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = tmp_path / "model.pt"
    torch.save({"state": Bomb(mark)}, bomb)
    assert "model.pt: " in error_of(bomb)
    shutil.copy(bomb, folder / "model.safetensors")
    edit(folder, sha256=sha256(bomb))
    assert "model/model.safetensors: " in error_of(folder)
    (folder / "config.json").write_bytes(pickle.dumps(Bomb(mark)))
    error_of(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark))).close()  # it would have gone off
    assert mark.exists()


@pytest.mark.parametrize("broken", [1, 2, 3, 4])
def test_a_failed_save_keeps_the_old_model(broken: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = contents(folder), []
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def fail(*args: Any, real: Any = real) -> None:
            calls.append(args)
            if len(calls) == broken:
                raise OSError(28, "No space left on device")
            real(*args)

        monkeypatch.setattr(os, name, fail)
    with pytest.raises(DdimError, match="model: "):
        tiny_model(seed=1).save(folder)
    monkeypatch.undo()
    assert len(calls) >= broken
    assert contents(folder) == before
    load_tiny(folder)
    tiny_model(seed=1).save(folder)
    assert contents(folder) != before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_full_disk_keeps_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DdimError, match="model: "):
        tiny_model(seed=1).save(folder)
    assert contents(folder) == before


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DdimError):
        tiny_model().save(tmp_path)
    with pytest.raises(DdimError, match=r"notes\.txt: "):
        tiny_model().save(tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_with_another_config_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DdimError):
        tiny_model().save(tmp_path)
    assert contents(tmp_path) == {"config.json": b"{}", "thesis.txt": b"mine"}


@every_kind
def test_the_old_model_survives_a_kill_between_the_two_renames(folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.4711-0123abcd.old")
    folder.rename(old)
    assert load(folder, "cpu").config.sha256 == checkpoint.read(old)[0].sha256
    tiny_model(seed=5).save(folder)
    assert not old.exists()
    assert load(folder, "cpu").fingerprint == tiny_model(seed=5).fingerprint


def test_the_folder_of_a_run_names_its_model(folder: Path) -> None:
    assert checkpoint.find(folder.parent) == folder
    assert checkpoint.find(str(folder)) == folder


def test_bundled_models_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(checkpoint, "bundled", lambda: {"tiny": folder})
    assert checkpoint.find("tiny") == folder
    with pytest.raises(DdimError, match=r"^tinny: "):
        checkpoint.find("tinny")


@pytest.mark.parametrize("checkout", [True, False])
def test_a_checkout_has_models_outside_the_package(
    checkout: bool, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "checkout/src/ddim"
    for name, place in (("small", package / "weights"), ("large", tmp_path / "checkout/models")):
        shutil.copytree(folder, place / name)
    if checkout:
        (tmp_path / "checkout/pyproject.toml").touch()
    monkeypatch.setattr(checkpoint.importlib.resources, "files", lambda name: package)
    assert sorted(checkpoint.bundled()) == (["large", "small"] if checkout else ["small"])


def test_the_name_of_a_preset_hints_at_training() -> None:
    with pytest.raises(DdimError, match=r"^celeba64: .*--preset\b"):
        checkpoint.find("celeba64")


@pytest.mark.parametrize("name", sorted(checkpoint.bundled()))
def test_bundled_models_are_complete(name: str) -> None:
    config, weights = checkpoint.read(name)
    assert config.provenance.data
    assert weights
