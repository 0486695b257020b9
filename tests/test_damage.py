"""One flipped bit or a truncation in any file that is written and read back raises an error that names the file."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddim._io.checksum import journal_line, read_journal, seal, unseal, write_json
from ddim._io.safetensors import read_tensors, write_tensors
from ddim.data.text import TextPolicy
from ddim.errors import DdimError, DdimWarning
from ddim.evaluation import likelihood_run, statistics
from ddim.evaluation.accumulate import iter_gather
from ddim.evaluation.features import Extractor
from ddim.evaluation.moments import Moments
from ddim.evaluation.sample_folder import generate
from ddim.evaluation.statistics import Protocol, Statistics
from ddim.model import checkpoint
from ddim.model.config import CategoricalConfig, ModelConfig, ScheduleConfig
from ddim.model.load import load
from ddim.nn.transformer import TransformerConfig
from ddim.plan.plan import Plan
from ddim.sampling.latents import Latents, read_latents, write_latents
from ddim.train import run, run_config
from models import LENGTH, LETTERS, contents, ddim, load_tiny, recipe, save_tiny, stripes, tiny_model, tiny_set

BEFORE = Path(__file__).parent / "data" / "before_checksums"


def flipped(data: bytes, step: int = 1) -> Iterator[bytes]:
    """The data with each bit flipped in turn, every `step`-th of them."""
    for place in range(0, 8 * len(data), step):
        yield data[: place // 8] + bytes([data[place // 8] ^ (1 << place % 8)]) + data[place // 8 + 1 :]


def cut(data: bytes, count: int = 20) -> Iterator[bytes]:
    """The data truncated at several offsets, also followed by the old data."""
    for place in np.linspace(0, len(data.rstrip()) - 1, count).astype(int).tolist():
        yield data[:place]
        yield data[:place] + bytes(len(data) - place)


def save_plan(path: Path) -> Callable[[Path], object]:
    write_json(path, json.loads(tiny_model().plan(2).to_json()))
    return lambda path: Plan.from_json(path.read_bytes().decode("utf-8", "replace"), str(path))


def save_config(path: Path) -> Callable[[Path], object]:
    save_tiny(path.parent / "model")
    shutil.copy(path.parent / "model/config.json", path)
    return checkpoint.read_config


def save_latents(path: Path) -> Callable[[Path], object]:
    model = tiny_model()
    write_latents(path, Latents(torch.ones(1, 1, 2, 2), model.plan(1), names=("a",), model_sha256="abc"))
    return read_latents


def save_statistics(path: Path) -> Callable[[Path], object]:
    features = torch.arange(6.0).reshape(3, 2)
    protocol = Protocol(data="three", count=3, grid="8x8x1", extractor="two", extractor_sha256="0")
    Statistics(Moments(2).add(features), features, protocol).save(path)
    return statistics.read


def save_cell(path: Path) -> Callable[[Path], object]:
    def go(path: Path) -> object:
        space = Extractor("two", "0", lambda some: torch.as_tensor(some.reshape(len(some), -1)[:, :2]).float())
        return list(iter_gather(lambda some: [stripes(4)[some.start : some.stop]], 4, space, path, {"data": "four"}))

    go(path)
    return go


def save_state(path: Path) -> Callable[[Path], object]:
    write_tensors(path, {"step": torch.tensor(3), "network.weight": torch.ones(2)}, {"step": 3, "total": 0.5})
    return read_tensors


FILES: dict[str, tuple[str, Callable[[Path], Callable[[Path], object]]]] = {
    "plan": ("plan.json", save_plan),
    "model": ("config.json", save_config),
    "latents": ("latents.safetensors", save_latents),
    "statistics": ("statistics.safetensors", save_statistics),
    "cell": ("cell.safetensors", save_cell),
    "state": ("state.safetensors", save_state),
}


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.slow)], ids=["some bits", "every bit"])
@pytest.mark.parametrize(("name", "save"), FILES.values(), ids=FILES)
def test_a_flipped_bit_raises_an_error_that_names_the_file(
    name: str, save: Callable[[Path], Callable[[Path], object]], step: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    read = save(path)
    read(path)
    data = path.read_bytes()
    for damaged in [*flipped(data, step), *cut(data)]:
        path.write_bytes(damaged)
        with pytest.raises(DdimError) as caught:
            read(path)
        assert caught.value.subject.startswith(str(path))
        assert len(str(caught.value).splitlines()) == 1


def test_white_space_may_change() -> None:
    """An editor or git may change line endings."""
    text = json.dumps({"a": "b c", "d": [1, {"e": None}]}, indent=2)
    sealed = seal(text)
    assert json.loads(unseal(sealed, "x")) == json.loads(text)
    assert json.loads(unseal(sealed.replace(b"\n", b"\r\n"), "x")) == json.loads(text)
    assert json.loads(unseal(json.dumps(json.loads(sealed)).encode(), "x")) == json.loads(text)
    with pytest.raises(DdimError):
        unseal(sealed.replace(b"b c", b"b d"), "x")


def test_an_edited_file_is_read_after_following_the_hint(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model") / "config.json"
    before = checkpoint.read_config(path)
    path.write_text(path.read_text().replace('"predicts": "v"', '"predicts": "eps"'))
    with pytest.raises(DdimError) as caught:
        load(tmp_path / "model", "cpu")
    assert caught.value.subject == str(path)
    assert caught.value.hint.endswith('set its "checksum" to ""')
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checksum": ""}))
    assert load(tmp_path / "model", "cpu").config == before.model_copy(update={"predicts": "eps"})


def test_an_empty_checksum_may_be_anywhere() -> None:
    assert json.loads(unseal(b'{"checksum": "", "a": 1}', "x")) == {"a": 1}
    with pytest.raises(DdimError):
        unseal(b'{"checksum": "0", "a": 1}', "x")


def test_a_journal_is_truncated_before_the_first_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = [journal_line({"n": n, "value": n + 0.5}) for n in range(3)]
    whole = b"".join(lines)

    def read() -> list[Any]:
        return read_journal(path, lambda line, before: line if line["n"] == before else None)

    path.write_bytes(whole)
    assert [line["n"] for line in read()] == [0, 1, 2]
    for place, damaged in [(place, damaged) for place, damaged in enumerate(flipped(whole)) if place % 13 == 0]:
        path.write_bytes(damaged)
        first = place // 8 // len(lines[0])
        with pytest.warns(DdimWarning):
            found = read()
        assert found == [json.loads(line) | {} for line in map(_bare, lines[:first])]
        assert path.read_bytes() == b"".join(lines[:first])
    path.write_bytes(whole[:-1])
    with pytest.warns(DdimWarning, match=r"\b3\b"):
        assert len(read()) == 2


def _bare(line: bytes) -> str:
    what = json.loads(line)
    del what["checksum"]
    return json.dumps(what)


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_a_sample_is_finished_if_its_bytes_are_unchanged(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model", kind=kind)
    words = ("sample", tmp_path / "model", "-n", 9, "--steps", 2, "--device", "cpu", "--out", tmp_path / "out")
    assert ddim(*words) == 0
    before = contents(tmp_path / "out")
    files = [tmp_path / "out" / name for name in before if name[0].isdigit()]
    files[0].unlink()
    files[3].write_bytes(b"")
    files[4].write_bytes(files[4].read_bytes()[:-1])
    files[5].write_bytes(files[1].read_bytes())
    files[6].write_bytes(next(flipped(files[6].read_bytes(), 7)))
    times = [path.stat().st_mtime_ns for path in (files[1], files[2], files[7], files[8])]
    capsys.readouterr()
    assert ddim(*words) == 0
    assert "(4 existed, 4 regenerated)" in capsys.readouterr().out
    assert {name: data for name, data in contents(tmp_path / "out").items() if name[0].isdigit()} == {
        path.name: before[path.name] for path in files
    }
    assert [path.stat().st_mtime_ns for path in (files[1], files[2], files[7], files[8])] == times
    assert ddim(*words) == 0
    assert "(9 existed)" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_journal_of_samples_only_regenerates_samples(damage: str, tmp_path: Path) -> None:
    model = tiny_model()
    list(generate(model, model.plan(2), tmp_path, 5))
    before = contents(tmp_path)
    path = tmp_path / "SHA256SUMS"
    data = path.read_bytes()
    path.write_bytes({"torn": data[:-9], "flipped": data[:70] + b"\x00" + data[71:], "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = list(generate(model, model.plan(2), tmp_path, 5))
    assert [str(path) in str(warning.message) for warning in said] == [True] * (damage == "torn")
    assert made[-1].regenerated == {"torn": 1, "flipped": 1, "gone": 5}[damage]
    assert {**contents(tmp_path), "SHA256SUMS": b""} == {**before, "SHA256SUMS": b""}
    assert list(generate(model, model.plan(2), tmp_path, 5))[-1].existing == 5


def text_run() -> run_config.RunConfig:
    """The configuration of the run whose folder predates checksums."""
    model = ModelConfig(
        network=TransformerConfig(categories=len(LETTERS), length=LENGTH, width=4, depth=1, heads=1),
        data=TextPolicy(length=LENGTH, characters=LETTERS),
        categorical=CategoricalConfig(categories=len(LETTERS)),
        predicts="x0",
        schedule=ScheduleConfig(name="cosine", T=20),
    )
    train = recipe(steps=6, checkpoint_every=2, keep=1, gamma="simple")
    data = tiny_set("text")
    return run_config.RunConfig(data=data.name, data_fingerprint=data.fingerprint(), model=model, train=train)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """Files written by a version that wrote no checksums."""
    return Path(shutil.copytree(BEFORE, tmp_path / "before"))


def test_files_without_checksums_are_read(before: Path) -> None:
    model = load_tiny(before / "model")
    plan = Plan.from_json((before / "plan.json").read_text())
    assert plan == model.plan(3, sampler="ddim")
    file = read_latents(before / "latents.safetensors")
    assert (file.names, file.model_sha256) == (("a.png", "b.png"), model.config.sha256)
    assert file.x.shape == (2, 1, 8, 8)
    found = statistics.read(before / "statistics.safetensors")
    assert (found.protocol.data, found.moments.count, found.moments.dim) == ("four", 4, 3)
    space = Extractor("three", "0", lambda some: torch.zeros(len(some), 3))
    made = iter_gather(lambda some: [stripes(20)[:0]], 20, space, before / "cell.safetensors", {"data": "stripes"})
    assert list(made) == [20]


def test_a_run_without_checksums_is_resumed(before: Path, recwarn: pytest.WarningsRecorder) -> None:
    steps = [report.step for report in run.train(before / "run", text_run(), tiny_set("text"), "cpu")]
    assert steps == [4, 5, 6]
    assert all("threads" in str(warning.message) for warning in recwarn)  # of another torch, perhaps
    assert [json.loads(line)["step"] for line in (before / "run/metrics.jsonl").read_text().splitlines()] == [3, 6]
    assert load(before / "run", "cpu").config.provenance.steps == 6


def test_complete_samples_without_checksums_are_reused(before: Path) -> None:
    model = load_tiny(before / "model")
    folder = before / "samples"
    second = (folder / "000001.png").read_bytes()
    (folder / "000000.png").write_bytes(second)
    with pytest.warns(DdimWarning, match=r"\b2\b"):
        made = list(generate(model, model.plan(3, sampler="ddim"), folder, 3, seed=1, name="model"))
    assert (made[-1].existing, made[-1].regenerated) == (2, 1)
    assert (folder / "000001.png").read_bytes() == second != (folder / "000000.png").read_bytes()
    assert list(generate(model, model.plan(3, sampler="ddim"), folder, 3, seed=1, name="model"))[-1].existing == 3


def test_results_without_checksums_are_resumed(before: Path) -> None:
    model = load_tiny(before / "model")
    request = likelihood_run.bound_request(model, model.plan(3, "linear", eta=1.0), None, 0, 0)
    names = [str(index) for index in range(10)]
    steps = list(likelihood_run.measure(model, stripes(20)[:10], names, request, before / "likelihood", "model"))
    assert [len(blocks) for blocks in steps] == [2]
