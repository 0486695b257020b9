"""Models published on the hub and fetched from it: the folder, its card, and the errors."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, errors

from ddim.errors import DdimError, DdimWarning
from ddim.interop import diffusers_export
from ddim.model import checkpoint, hub
from ddim.model.config import Provenance
from ddim.model.load import build_model, load
from ddim.model.model import Model
from models import KINDS, contents, new_network, recipe, save_tiny, tiny_config, tiny_model

THREE = ["README.md", "config.json", "model.safetensors"]
COMMAND = "ddim train `stripes` --out 'runs/a|b'"
KNOWN = Provenance(
    data="stripes | and\nmore",
    split="train",
    data_fingerprint="0123abcd",
    images=60_000,
    command=COMMAND,
    version="9.8.7",
    steps=6500,
    images_seen=832_000,
    seconds=4560.8,
    training=recipe(label_drop=0),
    error_from="calibrate stripes",
)
FLOAT32 = {"dtype": "float32", "device": "cpu"}


def trained(**changes: Any) -> Any:
    """A model whose training is fully recorded."""
    config = tiny_config(**changes).model_copy(update={"provenance": KNOWN, "error": (0.5,) * 999 + (0.25,)})
    return build_model(new_network(config.network), config, "cpu", dtype="float32")


def written(model: Any, folder: Path, **settings: Any) -> tuple[ModelCard, str]:
    """The card of a saved model."""
    assert model.save_pretrained(folder, **settings) == folder
    return ModelCard.load(folder / "README.md"), (folder / "README.md").read_text(encoding="utf-8")


def table(text: str) -> dict[str, str]:
    """Every row of a card's tables."""
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| ") and line != "| | |"]
    assert all(len(row) == 4 for row in rows), rows
    return {row[1].strip(): row[2].strip() for row in rows}


def blocks(text: str) -> dict[str, str]:
    """The first code block of each language."""
    return {match[2]: match[3] for match in reversed([*re.finditer(r"^(`{3,})(\w+)\n(.*?)\n\1$", text, re.S | re.M)])}


def error_of(function: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(DdimError) as caught:
        function(*arguments, **settings)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_loaded(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind=kind)
    model.save_pretrained(tmp_path / "there" / "tiny")
    assert sorted(contents(tmp_path)) == [f"there/tiny/{name}" for name in THREE]
    again = type(model).from_pretrained(tmp_path / "there" / "tiny", **FLOAT32)
    assert type(again) is type(model)
    assert torch.equal(again.sample(2, steps=3), model.sample(2, steps=3))
    assert type(Model.from_pretrained(tmp_path / "there" / "tiny", device="cpu")) is Model
    assert torch.equal(load(tmp_path / "there" / "tiny", **FLOAT32).sample(2, steps=3), model.sample(2, steps=3))


def test_the_card_states_the_configuration(tmp_path: Path) -> None:
    model = trained(classes=3)
    card, text = written(model, tmp_path / "tiny", license="cc-by-4.0")
    assert card.data.library_name == "ddim"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.license == "cc-by-4.0"
    assert {"ddim", "diffusion", "unet", "class-conditional"} <= set(card.data.tags)
    config = checkpoint.read_config(tmp_path / "tiny" / "config.json")
    rows, count = table(text), sum(p.numel() for p in model.network.parameters())
    assert rows["network"] == str(config.network)
    assert rows["parameters"] == f"{count:,}, stored as float32, {4 * count / 1e6:.1f} MB"
    assert rows["images"] == "8x8, grey"
    assert rows["labels"] == "3 classes"
    assert rows["predicts"] == "v"
    assert rows["schedule"].startswith("linear, T = 1000, log-SNR 9.21 at t = 1 to -10.12 at T")
    assert rows["SHA-256 of the weights"] == config.sha256
    assert rows["error per time"] == "0.5 at t = 1 to 0.25 at T, from calibrate stripes"
    assert rows["data"] == "stripes \\| and more, split train, 60,000 images"
    assert (rows["steps"], rows["images seen"], rows["time"]) == ("6,500", "832,000", "76.0 minutes")
    assert (rows["hash of the data"], rows["library"]) == ("0123abcd", "ddim 9.8.7")
    output = blocks(text)
    assert output["sh"] == COMMAND
    assert json.loads(output["json"]) == json.loads(KNOWN.model_dump_json())["training"]
    assert "always trained with labels" in text
    assert "labels=0" in output["python"]


def test_unrecorded_facts_are_omitted(tmp_path: Path) -> None:
    card, text = written(tiny_model(kind="text"), tmp_path / "tiny")
    assert "license" not in card.data.to_dict()
    assert card.data.pipeline_tag == "text-generation"
    rows = table(text)
    assert rows.keys() == {"network", "parameters", "text", "noise", "labels", "predicts", "schedule"} | {
        "SHA-256 of the weights"
    }
    assert (rows["noise"], rows["labels"]) == ("uniform", "none")
    for word in ("trained\n", "steps |", " 0 ", "None", "The settings", "error"):
        assert word not in text.replace("seed=0", "").replace("steps 20 -n 16", ""), word
    assert "Its training data are not recorded." in text


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_the_code_in_the_card_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind=kind)
    _, text = written(model, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(blocks(text)["python"], names)
    assert type(names["model"]) is type(model)
    assert names["samples"].shape == (16, *model.shape)
    dtype = re.search(r"# (\w+), \((.*?)\)", text)
    assert dtype is not None
    assert str(names["samples"].dtype) == f"torch.{dtype[1]}"
    assert tuple(int(side) for side in dtype[2].split(",")) == names["samples"].shape
    assert kind == "pictures" or len(names["texts"]) == 16
    _, text = written(model, tmp_path / "tiny", repo_id="me/small")
    assert "load('me/small')" in text
    assert "\n# small\n" in text


def test_push_uploads_the_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model(), []

    def create_repo(self: HfApi, repo_id: str, **settings: Any) -> Any:
        calls.append(("create", repo_id, settings))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self: HfApi, repo_id: str, folder_path: Path, **settings: Any) -> str:
        calls.append(("upload", repo_id, contents(Path(folder_path)), settings))
        return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    result = model.push_to_hub("tiny", license="mit", private=True, commit_message="first", branch="main")
    assert result == "https://hub/me/tiny/commit/1"
    model.save_pretrained(tmp_path / "tiny", license="mit", repo_id="me/tiny")
    (_, created, settings), (_, uploaded, files, more) = calls
    assert (created, uploaded) == ("tiny", "me/tiny")
    assert settings["private"] is True
    assert (more["commit_message"], more["revision"]) == ("first", "main")
    assert list(files) == THREE
    assert files == contents(tmp_path / "tiny")
    with pytest.raises(DdimError, match="colour"):
        model.push_to_hub("tiny", colour="red")

    def fail(self: HfApi, **_: Any) -> Any:
        raise OSError("no way\nthrough")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    assert "me/tiny: " in error_of(model.push_to_hub, "me/tiny")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub with one repository, "me/tiny", whose files are those of a folder; the requests are recorded."""
    there, asked = tmp_path / "there", []

    def snapshot_download(name: str, allow_patterns: list[str], **settings: Any) -> str:
        asked.append((name, settings))
        here = tmp_path / "cache"
        for file in sorted(there.rglob("*")):
            path = file.relative_to(there)
            if file.is_file() and any(fnmatch.fnmatch(path.as_posix(), pattern) for pattern in allow_patterns):
                (here / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, here / path)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(there=there, asked=asked)


def test_a_repository_is_downloaded_and_checked(repository: Any) -> None:
    model = tiny_model()
    model.save_pretrained(repository.there)
    how = {"revision": "v1", "cache_dir": "elsewhere", "token": "secret", "local_files_only": True}
    again = Model.from_pretrained("me/tiny", **how, **FLOAT32)
    assert repository.asked == [("me/tiny", {**how, "force_download": False})]
    assert torch.equal(again.sample(2, steps=3), model.sample(2, steps=3))
    weights = repository.there / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert "cache/model.safetensors: " in error_of(Model.from_pretrained, "me/tiny")


@pytest.mark.parametrize("safe", [True, False])
def test_pickles_are_downloaded_only_without_safetensors(safe: bool, repository: Any) -> None:
    names = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin", "samples/1.png", "run.py"]
    names += ["unet/diffusion_pytorch_model.safetensors"] if safe else []
    for name in names:
        (repository.there / name).parent.mkdir(parents=True, exist_ok=True)
        (repository.there / name).write_bytes(b"{}")
    actual = contents(hub.fetch("me/tiny"))
    weights = f"unet/diffusion_pytorch_model.{'safetensors' if safe else 'bin'}"
    assert list(actual) == ["model_index.json", "unet/config.json", weights]


def test_cached_repositories_are_found_offline(tmp_path: Path) -> None:
    """The hub's own cache, as its library lays it out."""
    model, place = tiny_model(), tmp_path / "models--me--tiny"
    model.save_pretrained(place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    how = {"cache_dir": tmp_path, "local_files_only": True}
    again = Model.from_pretrained("me/tiny", **how, **FLOAT32)
    assert torch.equal(again.sample(2, steps=3), model.sample(2, steps=3))
    output = error_of(Model.from_pretrained, "me/other", **how)
    assert output.startswith("me/other: no such folder, ")
    assert "me/..other: " in error_of(hub.fetch, "me/..other", **how)


def answered(kind: Any, text: str) -> Exception:
    """An error of the hub, made without the answer that it carries."""
    error: Exception = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answered(errors.RepositoryNotFoundError, "404\n\nfor url"), "no such folder, and no such repository"),
        (answered(errors.GatedRepoError, "403\nfor url"), "is a gated repository; "),
        (answered(errors.RevisionNotFoundError, "404\nfor url"), "has no revision v2; "),
        (errors.LocalEntryNotFoundError("long\nstory"), "no such folder, "),
        (errors.OfflineModeIsEnabled("offline"), "no such folder, "),
        (
            RuntimeError("name or service\nnot known"),
            "the Hub denied access or could not be reached (name or service); ",
        ),
        (TimeoutError(), "the Hub denied access or could not be reached (TimeoutError); "),
    ],
)
def test_errors_of_the_hub_are_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert error_of(Model.from_pretrained, "me/tiny", revision="v2").startswith(f"me/tiny: {message}")
    assert error_of(hub.fetch, "me/tiny", revision="v2").startswith(f"me/tiny: {message}")


def test_a_folder_or_bundled_name_is_not_searched_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("the hub was asked"))
    save_tiny(tmp_path / "me" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert Model.from_pretrained("me/tiny", device="cpu").shape == (1, 8, 8)
    assert hub.place("mnist") == "mnist"
    assert "nothing: " in error_of(Model.from_pretrained, "nothing")
    assert "a/b/c: " in error_of(Model.from_pretrained, "a/b/c")
    assert "nothing: " in error_of(Model.from_pretrained, tmp_path / "nothing")


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")  # of eps: where it starts, and that it clips
def test_a_model_of_diffusers_is_converted(tmp_path: Path) -> None:
    model = tiny_model(predicts="eps", padding="both")
    diffusers_export.write(tmp_path / "theirs", model.config, model.network.state_dict())
    again = Model.from_pretrained(tmp_path / "theirs", **FLOAT32)
    assert again.notes
    native, external = (one.sample(2, steps=3, clip_x0=False) for one in (model, again))
    torch.testing.assert_close(external, native, rtol=0, atol=1e-4)


def test_a_card_is_kept_by_save_and_replaced_by_save_pretrained(tmp_path: Path) -> None:
    folder, model = tmp_path / "tiny", tiny_model()
    _, first = written(model, folder)
    (folder / "README.md").write_text("edited")
    with pytest.warns(DdimWarning):
        model.save(folder)
    assert contents(folder)["README.md"] == b"edited"
    assert written(model, folder)[1] == first
    assert sorted(contents(folder)) == THREE


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("of something else")
    before, model = contents(tmp_path), tiny_model()
    assert error_of(model.save_pretrained, tmp_path).startswith(f"{tmp_path}: ")
    assert error_of(model.save, tmp_path).startswith(f"{tmp_path}: ")
    assert contents(tmp_path) == before
    model.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    assert "tiny: " in error_of(model.save_pretrained, tmp_path / "tiny")
    assert (tmp_path / "tiny" / "notes.txt").read_text() == "mine"


def test_without_huggingface_hub_the_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = "the Hugging Face Hub: needs huggingface_hub; pip install 'ddim[hub]'"
    assert error_of(model.save_pretrained, tmp_path / "a") == line
    assert error_of(model.push_to_hub, "me/tiny") == line
    assert error_of(Model.from_pretrained, "me/tiny") == line
    assert not contents(tmp_path)
    model.save(tmp_path / "b")
    assert Model.from_pretrained(tmp_path / "b", device="cpu").shape == model.shape


@pytest.mark.slow
def test_models_do_not_import_huggingface_hub() -> None:
    code = "import sys, ddim.model.model; print({'huggingface_hub', 'diffusers', 'onnx'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
