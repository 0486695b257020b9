"""Reading of files: only regular files, bounded in size, depth and digits, with values of the expected types."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ddim._io import reading
from ddim._io.checksum import read_journal
from ddim._io.safetensors import read_tensors, write_tensors
from ddim.errors import DdimError, DdimWarning, shorten
from ddim.model.config import ModelConfig, parse
from ddim.model.importers.types import read_json, read_state
from ddim.plan.plan import Plan
from ddim.sampling.latents import read_latents
from ddim.train.logger import MetricsLogger
from models import contents, ddim, save_tiny

READERS: dict[str, Callable[[Path], Any]] = {
    "bytes": reading.read_bytes,
    "text": reading.read_text,
    "json": lambda path: reading.read_json(path, dict),
    "lines": lambda path: read_journal(path, lambda line, _: line),
    "tensors": read_tensors,
    "latents": read_latents,
    "foreign json": read_json,
    "foreign weights": read_state,
}
every_reader = pytest.mark.parametrize("reader", READERS)


@every_reader
def test_a_fifo_is_an_error_without_blocking(reader: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DdimError, match="pipe: "):
        READERS[reader](tmp_path / "pipe")


@every_reader
def test_a_folder_is_an_error(reader: str, tmp_path: Path) -> None:
    with pytest.raises(DdimError, match=tmp_path.name):
        READERS[reader](tmp_path)


@every_reader
def test_a_sparse_file_of_200_gigabytes_is_an_error_without_reading(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "holes"
    path.touch()
    os.truncate(path, 200 << 30)
    started = time.monotonic()
    with pytest.raises(DdimError, match=r"holes: .*\b800\b"):
        READERS[reader](path)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("most", [0, 3, 4])
def test_the_size_is_limited(most: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    if most == 4:
        assert reading.read_bytes(tmp_path / "file", most) == b"1234"
    else:
        with pytest.raises(DdimError, match="file: "):
            reading.read_bytes(tmp_path / "file", most)


# A JSON text, and the error message.
BAD = {
    "deep": ("[" * 100_000, r"^file\.json: "),
    "closed and deep": ("[" * 500 + "]" * 500, r"^file\.json: "),
    "deep objects": ('{"a":' * 5000, r"^file\.json: "),
    "digits": ('{"a": ' + "1" * 5000 + "}", r"^file\.json: .*\b5000\b"),
    "twice": ('{"a": 1, "b": 2, "a": 3}', r"^file\.json: "),
    "surrogate": (r'{"a": "\ud800"}', r"^file\.json: "),
    "surrogate key": (r'{"\uDfff": 1}', r"^file\.json: "),
    "empty": ("", r"^file\.json: .*\bJSON\b"),
    "half": ('{"a": ', r"^file\.json: .*\bJSON\b"),
    "byte": (b'{"a": "\xff"}', r"^file\.json: "),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_json_is_a_one_line_error(name: str) -> None:
    text, wrong = BAD[name]
    with pytest.raises(DdimError, match=wrong) as error:
        reading.parse_json(text, "file.json")
    assert str(error.value).startswith("file.json: ")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["config", "plan", "latents", "metadata", "journal"])
def test_invalid_json_is_an_error_in_every_file(name: str, kind: str, tmp_path: Path) -> None:
    text = BAD[name][0]
    words = text if isinstance(text, str) else text.decode("latin-1")
    if kind == "journal":
        (tmp_path / "j").write_bytes(b'{"a": 1}\n' + (text if isinstance(text, bytes) else text.encode()) + b"\n{}\n")
        with pytest.warns(DdimWarning, match=r"\b2\b"):
            assert read_journal(tmp_path / "j", lambda line, _: line) == [{"a": 1}]
        assert (tmp_path / "j").read_bytes() == b'{"a": 1}\n'
        return
    if isinstance(text, bytes) and kind != "config":
        pytest.skip("a text")
    save_file({"latents": torch.zeros(1, 1, 2, 2)}, tmp_path / "z.safetensors", {"ddim": words})
    readers: dict[str, Callable[[], Any]] = {
        "config": lambda: parse(ModelConfig, text, "config.json"),
        "plan": lambda: Plan.from_json(words, "plan.json"),
        "latents": lambda: read_latents(tmp_path / "z.safetensors"),
        "metadata": lambda: read_tensors(tmp_path / "z.safetensors"),
    }
    with pytest.raises(DdimError):
        readers[kind]()


def test_valid_json_is_read_unchanged() -> None:
    text = r'{"a": [1, 2.5, null, true, "\ud83d\ude00"], "b": {"c": -1e-300}}'
    assert reading.parse_json(text, "x") == json.loads(text)
    deep = "[" * reading.DEPTH + "]" * reading.DEPTH
    assert reading.parse_json(deep, "x") == json.loads(deep)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -1, 10**30], [True, 1.0, "1", None, [], {}]),
        (float, [0, 1.5, -1], [True, float("nan"), float("inf"), 10**400, "1", None, []]),
        (str, ["", "a"], [1, None, ["a"]]),
        (dict, [{}], [[], None, "x"]),
        ((int, type(None)), [None, 3], [True, "x", 0.5]),
    ],
)
def test_values_must_have_the_expected_type(kind: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert reading.entry({"key": value}, "key", kind, "file") == value
    for value in bad:
        with pytest.raises(DdimError, match=r"^file: "):
            reading.entry({"key": value}, "key", kind, "file")
    with pytest.raises(DdimError, match=r"^file: "):
        reading.entry({}, "key", kind, "file")


@pytest.mark.parametrize(
    ("key", "value"), [("total", None), ("count", 1.5), ("seconds", "x"), ("used", []), ("took", {"save": "x"})]
)
def test_a_state_with_metadata_of_another_type_is_an_error(
    key: str, value: Any, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    state = tmp_path / "run/state/00000001.safetensors"
    tensors, meta = read_tensors(state)
    assert {"total", "count", "seconds", "used", "took"} <= meta.keys()
    write_tensors(state, tensors, meta | {key: value})
    code = ddim(*TRAIN.format(tmp_path / "run").split())
    output = capsys.readouterr().err
    assert "Traceback" not in output
    assert code == 2 or "state" in output  # an error, or resumed from an older state with a warning


TRAIN = "train digits --steps 2 --batch 2 --limit 8 --preview-every 0 --device cpu --precision float32 --out {}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert ddim(*TRAIN.format(out).replace("--steps 2", "--steps 1").split()) == 0
    return out


def test_a_damaged_metrics_file_is_truncated_to_its_valid_lines(tmp_path: Path) -> None:
    sound = [b'{"step": 1, "loss": 0.5}\n', b'{"step": 2}\n']
    odd = [b'{"step": \xff}\n', b"\x00\n", b'{"step": "3"}\n', b"[]\n", b"7\n", b'{"step": 9}\n', b'{"step": 2']
    (tmp_path / "metrics.jsonl").write_bytes(sound[0] + b"".join(odd[:5]) + sound[1] + odd[5] + odd[6])
    with pytest.warns(DdimWarning, match="metrics.jsonl"), MetricsLogger(tmp_path, 2):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(sound)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("command", ["info {0}", "sample {0} -n 1 --steps 1 --out {1}", "convert {0} --out {1}"])
def test_weights_that_are_not_finite_are_an_error(
    value: float, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddim.model import checkpoint

    folder = save_tiny(tmp_path / "model")
    config, weights = checkpoint.read(folder)
    weights["conv_in.weight"].view(-1)[3] = value
    checkpoint.write(folder, config, weights)
    before = contents(tmp_path)
    assert ddim(*command.format(folder, tmp_path / "out").split()) == 2
    output = capsys.readouterr()
    assert "model/model.safetensors: " in output.err
    assert output.out == ""
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_text_from_a_model_is_escaped_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    odd = "a\x1b]0;title\x07\rb\x9b31m\u202e"
    config["provenance"] |= {"command": odd, "data": odd, "split": odd, "version": odd, "init_from": odd}
    (folder / "config.json").write_text(json.dumps(config | {"checksum": ""}))
    for words in ("info", "info --json"):
        assert ddim(*words.split(), folder) == 0
        output = capsys.readouterr().out
        assert all(character.isprintable() or character == "\n" for character in output)
    assert json.loads(output)["provenance"]["command"] == odd


def test_a_long_value_is_shortened_wherever_it_is_echoed() -> None:
    assert shorten("x" * 120) == "x" * 120
    assert len(shorten("x" * 5000)) <= 120
    assert "5,000 characters" in shorten("x" * 5000)
    assert len(str(DdimError("x" * 5000, "y" * 5000, "z" * 5000))) < 2100


def test_a_large_limit_allocates_nothing(tmp_path: Path) -> None:
    """A small file is read within any limit, more than all memory too."""
    (tmp_path / "small").write_bytes(b"abc")
    assert reading.read_bytes(tmp_path / "small", 1 << 60) == b"abc"
    assert reading.read_stream(io.BytesIO(b"abcdef"), 4) == b"abcd"
