"""Models published on the hub and fetched from it: the folder, its card, and what is said when it cannot be had."""

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
from ddim.model.base import ModelBase
from ddim.model.config import Provenance
from ddim.model.image import Model
from ddim.model.load import build_model, load
from ddim.model.tokens import TokenModel
from models import KINDS, contents, new_network, recipe, save_tiny, tiny_config, tiny_model

THREE = ["README.md", "config.json", "model.safetensors"]
COMMAND = "ddim train `stripes` --out 'runs/a|b'"
KNOWN = Provenance(
    data="stripes | and\nmore",
    split="train",
    data_fingerprint="0123abcd",
    pictures=60_000,
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
    """A model of whose training everything is known."""
    config = tiny_config(**changes).model_copy(update={"provenance": KNOWN, "error": (0.5,) * 999 + (0.25,)})
    return build_model(new_network(config.network), config, "cpu", dtype="float32")


def written(model: Any, folder: Path, **settings: Any) -> tuple[ModelCard, str]:
    """The card of a model that was saved."""
    assert model.save_pretrained(folder, **settings) == folder
    return ModelCard.load(folder / "README.md"), (folder / "README.md").read_text(encoding="utf-8")


def table(text: str) -> dict[str, str]:
    """Every row of a card's tables."""
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| ") and line != "| | |"]
    assert all(len(row) == 4 for row in rows), rows
    return {row[1].strip(): row[2].strip() for row in rows}


def blocks(text: str) -> dict[str, str]:
    """The first code block of each language."""
    return {found[2]: found[3] for found in reversed([*re.finditer(r"^(`{3,})(\w+)\n(.*?)\n\1$", text, re.S | re.M)])}


def refused(function: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(DdimError) as caught:
        function(*arguments, **settings)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind=kind)
    model.save_pretrained(tmp_path / "there" / "tiny")
    assert sorted(contents(tmp_path)) == [f"there/tiny/{name}" for name in THREE]
    again = type(model).from_pretrained(tmp_path / "there" / "tiny", **FLOAT32)
    assert type(again) is type(model)
    assert torch.equal(again.sample(2, steps=3), model.sample(2, steps=3))
    assert type(ModelBase.from_pretrained(tmp_path / "there" / "tiny", device="cpu")) is ModelBase
    assert torch.equal(load(tmp_path / "there" / "tiny", **FLOAT32).sample(2, steps=3), model.sample(2, steps=3))


def test_the_card_says_what_the_configuration_says(tmp_path: Path) -> None:
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
    assert rows["pictures"] == "8x8, grey"
    assert rows["labels"] == "3 classes"
    assert rows["predicts"] == "v"
    assert rows["schedule"].startswith("linear, T = 1000, log-SNR 9.21 at t = 1 to -10.12 at T")
    assert rows["SHA-256 of the weights"] == config.sha256
    assert rows["error per time"] == "0.5 at t = 1 to 0.25 at T, from calibrate stripes"
    assert rows["data"] == "stripes \\| and more, split train, 60,000 images"
    assert (rows["steps"], rows["images seen"], rows["time"]) == ("6,500", "832,000", "76.0 minutes")
    assert (rows["hash of the data"], rows["library"]) == ("0123abcd", "ddim 9.8.7")
    said = blocks(text)
    assert said["sh"] == COMMAND
    assert json.loads(said["json"]) == json.loads(KNOWN.model_dump_json())["training"]
    assert "never trained without a label" in text
    assert "labels=0" in said["python"]


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    card, text = written(tiny_model(kind="text"), tmp_path / "tiny")
    assert "license" not in card.data.to_dict()
    assert card.data.pipeline_tag == "text-generation"
    rows = table(text)
    assert rows.keys() == {"network", "parameters", "text", "noise", "labels", "predicts", "schedule"} | {
        "SHA-256 of the weights"
    }
    assert (rows["noise"], rows["labels"]) == ("uniform", "none")
    for word in ("trained\n", "steps |", " 0 ", "None", "recipe", "error"):
        assert word not in text.replace("seed=0", "").replace("steps 20 -n 16", ""), word
    assert "What it was trained on is not known." in text


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
    made = model.push_to_hub("tiny", license="mit", private=True, commit_message="first", branch="main")
    assert made == "https://hub/me/tiny/commit/1"
    model.save_pretrained(tmp_path / "tiny", license="mit", repo_id="me/tiny")
    (_, created, settings), (_, uploaded, files, more) = calls
    assert (created, uploaded) == ("tiny", "me/tiny")
    assert settings["private"] is True
    assert (more["commit_message"], more["revision"]) == ("first", "main")
    assert list(files) == THREE
    assert files == contents(tmp_path / "tiny")
    with pytest.raises(TypeError, match="colour"):
        model.push_to_hub("tiny", colour="red")

    def fail(self: HfApi, **_: Any) -> Any:
        raise OSError("no way\nthrough")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    assert "me/tiny: " in refused(model.push_to_hub, "me/tiny")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub with one repository, "me/tiny", whose files are those of a folder; what it was asked for is kept."""
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
    assert "cache/model.safetensors: " in refused(Model.from_pretrained, "me/tiny")


@pytest.mark.parametrize("safe", [True, False])
def test_pickles_are_fetched_only_where_there_is_nothing_else(safe: bool, repository: Any) -> None:
    names = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin", "samples/1.png", "run.py"]
    names += ["unet/diffusion_pytorch_model.safetensors"] if safe else []
    for name in names:
        (repository.there / name).parent.mkdir(parents=True, exist_ok=True)
        (repository.there / name).write_bytes(b"{}")
    found = contents(hub.fetch("me/tiny"))
    weights = f"unet/diffusion_pytorch_model.{'safetensors' if safe else 'bin'}"
    assert list(found) == ["model_index.json", "unet/config.json", weights]


def test_what_was_downloaded_before_is_found_without_a_connection(tmp_path: Path) -> None:
    """The hub's own cache, as its library lays it out."""
    model, place = tiny_model(), tmp_path / "models--me--tiny"
    model.save_pretrained(place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    how = {"cache_dir": tmp_path, "local_files_only": True}
    again = Model.from_pretrained("me/tiny", **how, **FLOAT32)
    assert torch.equal(again.sample(2, steps=3), model.sample(2, steps=3))
    said = refused(Model.from_pretrained, "me/other", **how)
    assert said.startswith("me/other: is not here, and the hub cannot be reached; ")
    assert "me/..other: " in refused(hub.fetch, "me/..other", **how)


def answered(kind: Any, text: str) -> Exception:
    """An error of the hub, made without the answer that it carries."""
    error: Exception = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answered(errors.RepositoryNotFoundError, "404\n\nfor url"), "no such repository, or it is private; "),
        (answered(errors.GatedRepoError, "403\nfor url"), "is a gated repository; "),
        (answered(errors.RevisionNotFoundError, "404\nfor url"), "has no revision v2; "),
        (errors.LocalEntryNotFoundError("long\nstory"), "is not here, and the hub cannot be reached; "),
        (errors.OfflineModeIsEnabled("offline"), "is not here, and the hub cannot be reached; "),
        (RuntimeError("name or service\nnot known"), "the hub refused or could not be reached (name or service); "),
        (TimeoutError(), "the hub refused or could not be reached (TimeoutError); "),
    ],
)
def test_what_went_wrong_is_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert refused(Model.from_pretrained, "me/tiny", revision="v2").startswith(f"me/tiny: {said}")
    assert refused(hub.fetch, "me/tiny", revision="v2").startswith(f"me/tiny: {said}")


def test_a_folder_or_a_bundled_name_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("the hub was asked"))
    save_tiny(tmp_path / "me" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert Model.from_pretrained("me/tiny", device="cpu").shape == (1, 8, 8)
    assert hub.place("mnist") == "mnist"
    assert "nothing: " in refused(Model.from_pretrained, "nothing")
    assert "a/b/c: " in refused(Model.from_pretrained, "a/b/c")
    assert "nothing: " in refused(Model.from_pretrained, tmp_path / "nothing")


def test_a_model_of_the_other_class_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "pictures")
    save_tiny(tmp_path / "text", kind="text")
    said = refused(TokenModel.from_pretrained, tmp_path / "pictures")
    assert said.endswith("is a model of real-valued pictures; load it with Model.from_pretrained")
    said = refused(Model.from_pretrained, tmp_path / "text")
    assert said.endswith("is a model of categories; load it with TokenModel.from_pretrained")


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")  # of eps: where it starts, and that it clips
def test_another_codes_model_is_read_as_ours(tmp_path: Path) -> None:
    model = tiny_model(predicts="eps", padding="both")
    diffusers_export.write(tmp_path / "theirs", model.config, model.network.state_dict())
    again = Model.from_pretrained(tmp_path / "theirs", **FLOAT32)
    assert again.notes
    ours, theirs = (one.sample(2, steps=3, clip_x0=False) for one in (model, again))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_a_card_is_kept_by_save_and_replaced_by_save_pretrained(tmp_path: Path) -> None:
    folder, model = tmp_path / "tiny", tiny_model()
    _, first = written(model, folder)
    (folder / "README.md").write_text("edited")
    with pytest.warns(DdimWarning):
        model.save(folder)
    assert contents(folder)["README.md"] == b"edited"
    assert written(model, folder)[1] == first
    assert sorted(contents(folder)) == THREE


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("of something else")
    before, model = contents(tmp_path), tiny_model()
    assert refused(model.save_pretrained, tmp_path).startswith(f"{tmp_path}: ")
    assert refused(model.save, tmp_path).startswith(f"{tmp_path}: ")
    assert contents(tmp_path) == before
    model.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    assert "tiny: " in refused(model.save_pretrained, tmp_path / "tiny")
    assert (tmp_path / "tiny" / "notes.txt").read_text() == "mine"


def test_without_huggingface_hub_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = "the Hugging Face Hub: needs huggingface_hub; pip install 'ddim[hub]'"
    assert refused(model.save_pretrained, tmp_path / "a") == line
    assert refused(model.push_to_hub, "me/tiny") == line
    assert refused(Model.from_pretrained, "me/tiny") == line
    assert not contents(tmp_path)
    model.save(tmp_path / "b")
    assert Model.from_pretrained(tmp_path / "b", device="cpu").shape == model.shape


def test_models_do_not_wait_for_huggingface_hub() -> None:
    code = "import sys, ddim.model.image; print({'huggingface_hub', 'diffusers', 'onnx'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
