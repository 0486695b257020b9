"""Damage of every kind to every kind of file: no traceback, no hang, and never another result with exit code 0."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim import samplers
from ddim.cli.main import main
from ddim.evaluation.moments import Moments
from ddim.evaluation.statistics import Protocol, Statistics
from ddim.interop import diffusers_export
from ddim.process import schedule
from foreign_lucid import LucidNet
from foreign_nets import filled
from models import contents, save_tiny, tiny_model, write_pictures

HANG = 90  # seconds after which a command counts as one that hangs


class Hang(BaseException):
    """A command that does not end; no OSError, as TimeoutError is, which a command may meet itself."""


@dataclass(frozen=True)
class Kind:
    """A kind of file, and a command that reads it.

    Args:
        file: The file that is damaged, below the place.
        command: The command; its result is what it prints and what it makes.
        result: The file or folder that it writes, below the place; "" for nothing.
        start: What it goes on from: a folder that is copied to `out` before; "" for nothing.
        is_input: Whether it is data or a foreign file, of which any content that can be read is a right one.
        slow: Whether the command takes a second or so.
    """

    file: str
    command: str
    result: str = ""
    start: str = ""
    is_input: bool = False
    slow: bool = False


PLAIN = "sample {0}/model -n 3 --dtype float32 --device cpu --out {0}/out"
SAMPLE = PLAIN + " --steps 2"
TRAIN = "train {0}/pictures --preset digits --size 8 --steps 4 --batch 2 --set network.channels=16 "
TRAIN += "--set network.groups=4 --warmup 1 --checkpoint-every 2 --log-every 1 "
TRAIN += "--preview-every 0 --device cpu --out {0}/out"
LIKELIHOOD = "likelihood {{0}}/{} {{0}}/{} --dtype float32 --steps 2 --device cpu --out {{0}}/out"
ENCODE = "encode {0}/model {0}/pictures/0.png --steps 2 --device cpu --out {0}/"
FOREIGN = "sample {0}/diffusers -n 1 --steps 2 --dtype float32 --device cpu --force --out {0}/out"

KINDS: dict[str, Kind] = {
    "config": Kind("model/config.json", SAMPLE, "out"),
    "weights": Kind("model/model.safetensors", SAMPLE, "out"),
    "manifest": Kind("out/manifest.json", SAMPLE, "out", "samples"),
    "sample": Kind("out/000001.png", SAMPLE, "out", "samples"),
    "latents": Kind("z.safetensors", "decode {0}/model {0}/z.safetensors --device cpu --out {0}/out", "out"),
    "statistics": Kind("a.safetensors", "distance {0}/a.safetensors {0}/b.safetensors"),
    "plan": Kind("plan.json", PLAIN + " --plan {0}/plan.json", "out", is_input=True),
    "checked plan": Kind("plan.json", "check {0}/plan.json --schedule linear", is_input=True),
    "betas": Kind("betas.json", "check {0}/betas.json", is_input=True),
    "picture": Kind("pictures/0.png", ENCODE + "new.safetensors", is_input=True),
    "foreign network": Kind("diffusers/unet/config.json", FOREIGN, "out", is_input=True),
    "foreign schedule": Kind("diffusers/scheduler/scheduler_config.json", FOREIGN, "out", is_input=True),
    "foreign weights": Kind("diffusers/unet/diffusion_pytorch_model.safetensors", FOREIGN, "out", is_input=True),
    "state dict": Kind(
        "net.pt", "convert {0}/net.pt --size 8 --schedule cosine --predicts v --out {0}/out", is_input=True
    ),
    "text": Kind("good.txt", LIKELIHOOD.format("words", "good.txt --limit 1"), is_input=True, slow=True),
    "run": Kind("out/run.json", TRAIN, "out/model", "run", slow=True),
    "state": Kind("out/state/00000002.safetensors", TRAIN, "out/model", "run", slow=True),
    "metrics": Kind("out/metrics.jsonl", TRAIN, "out/model", "run", slow=True),
    "blocks": Kind("out/blocks.jsonl", LIKELIHOOD.format("model", "pictures"), "out", "measured", slow=True),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    save_tiny(root / "model")
    save_tiny(root / "words", kind="text")
    write_pictures(root / "pictures", 4)
    (root / "good.txt").write_text("a bad bed on a dead end " * 30)
    model = tiny_model(predicts="eps")
    diffusers_export.write(root / "diffusers", model.config, model.network.state_dict())
    torch.save(filled(LucidNet(16, multipliers=(1, 2))).state_dict(), root / "net.pt")
    (root / "plan.json").write_text(samplers.ddim(schedule.linear().levels([1000, 500, 0])).to_json())
    (root / "betas.json").write_text(json.dumps([0.1, 0.2, 0.3]))
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        vectors = torch.randn(40, 4, generator=generator)
        protocol = Protocol(data=name, count=40, grid="8x8x1", extractor="digits28", extractor_sha256="0")
        Statistics(Moments(4).add(vectors), vectors, protocol).save(root / f"{name}.safetensors")
    assert run(ENCODE + "z.safetensors", root, "")[0] == 0
    for kind, start in (("manifest", "samples"), ("run", "run"), ("blocks", "measured")):
        command = KINDS[kind].command.replace("-n 3", "-n 2").replace("--steps 4 --b", "--steps 2 --b")
        code, output, *_ = run(command.format(root), root, "out")
        assert code == 0, output
        (root / "out").rename(root / start)
    body = (root / "measured/blocks.jsonl").read_text().splitlines(keepends=True)
    (root / "measured/blocks.jsonl").write_text(body[0])
    return root


def run(command: str, root: Path, result: str) -> tuple[int | str, str, dict[str, bytes]]:
    """Run a command in this process: its exit code or traceback, its output, and the files that it writes."""

    def hang(*_: object) -> None:
        raise Hang(f"{command} hangs")

    output, wrong = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG)
    code: int | str = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(wrong):
            main(command.format(root).split())
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        code = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if code not in (0, 1):
        output.write(wrong.getvalue())
    complaints = [line for line in wrong.getvalue().splitlines() if line.startswith("error: ")]
    if code == 2 and len(complaints) != 1:
        code = f"exit 2 without one line of complaint: {wrong.getvalue()}"
    if "Traceback" in wrong.getvalue():
        code = wrong.getvalue()
    files = contents(root / result) if result and (root / result).is_dir() else {}
    files = {name: data for name, data in files.items() if "config.json" not in name or "model" not in result}
    return code, output.getvalue(), files


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One bit flipped."""
    if not data:
        return data
    body = bytearray(data)
    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return bytes(body)


def torn(data: bytes, rng: random.Random) -> bytes:
    """Some bytes overwritten."""
    first = rng.randrange(len(data) + 1)
    end = min(len(data), first + rng.choice((1, 8, 64, 512)))
    return data[:first] + rng.choice((bytes(end - first), rng.randbytes(end - first))) + data[end:]


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end missing, a part missing, or a part twice."""
    first, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice((data[:first], data[:first] + data[end:], data[:end] + data[first:]))


ODD: tuple[Any, ...] = (None, True, [], {}, "", "x" * 5000, "\ud800", "\x1b]0;x\x07", -1, 0, 2**63, 10**30, 1e308, 0.5)
DEEP = "[" * 100_000


def retyped(data: bytes, rng: random.Random) -> bytes:
    """A JSON text with a value of another type, a key missing, deep nesting, or a number of 5,000 digits."""
    value = json.loads(data)
    holders: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        one = level.pop()
        for key in one if isinstance(one, dict) else range(len(one)):
            holders.append((one, key))
            if isinstance(one[key], dict | list):
                level.append(one[key])
    holder, key = rng.choice(holders)
    what = rng.randrange(5)
    if what == 0 and isinstance(holder, dict):
        del holder[key]
        return json.dumps(value).encode()
    holder[key] = rng.choice(ODD) if what < 4 else "HERE"
    text = json.dumps(value)
    return text.replace('"HERE"', rng.choice((DEEP, "1" * 5000, "NaN", "1e999"))).encode()


def reheaded(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with damaged JSON, in its header or in our metadata there."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = header.get("__metadata__", {}).get("ddim")
    if meta and rng.random() < 0.7:
        header["__metadata__"]["ddim"] = retyped(meta.encode(), rng).decode()
        result = json.dumps(header).encode()
    else:
        result = retyped(json.dumps(header).encode(), rng)
    return len(result).to_bytes(8, "little") + result + data[8 + size :]


def lined(data: bytes, rng: random.Random) -> bytes:
    """A file of JSON lines with one of them damaged."""
    lines = data.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    lines[place] = retyped(lines[place], rng) + b"\n"
    return b"".join(lines)


def unsealed(data: bytes, rng: random.Random) -> bytes:
    """As `retyped`, `reheaded` or `lined`, in a file without its checksums, which would refuse anything."""
    if data[:1] == b"{":
        lines = [{k: v for k, v in json.loads(line).items() if k != "checksum"} for line in _objects(data)]
        return lined("".join(json.dumps(line) + "\n" for line in lines).encode(), rng)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = json.loads(header["__metadata__"]["ddim"])
    meta.pop("checksum", None)
    header["__metadata__"]["ddim"] = json.dumps(meta)
    result = json.dumps(header).encode()
    return reheaded(len(result).to_bytes(8, "little") + result + data[8 + size :], rng)


def _objects(data: bytes) -> list[bytes]:
    """The lines of a file of JSON lines, or a JSON text as a whole."""
    lines = data.splitlines()
    return lines if all(line.endswith(b"}") for line in lines) else [data]


def damages(kind: Kind) -> list[Callable[[bytes, random.Random], bytes]]:
    """The kinds of damage to a kind of file."""
    extra = {".json": [retyped, retyped], ".safetensors": [reheaded, reheaded], ".jsonl": [lined]}
    suffix = Path(kind.file).suffix
    sealed = suffix in extra and not kind.is_input and kind.file != "model/model.safetensors"
    return [flipped, torn, cut, *extra.get(suffix, []), *([unsealed] if sealed else [])]


def attack(place: Path, name: str, count: int, seed: int) -> Iterator[str]:
    """Damage a file many times: yields a description of every failure."""
    kind = KINDS[name]

    def fresh() -> None:
        shutil.rmtree(place / "out", ignore_errors=True)
        if kind.start:
            shutil.copytree(place / kind.start, place / "out")

    fresh()
    whole = (place / kind.file).read_bytes()
    right = run(kind.command, place, kind.result)
    assert right[0] in (0, 1), right
    rng, same = random.Random(f"{name} {seed}"), 2 if kind.result else 1  # the files written, else the output
    for number in range(count):
        fresh()
        damage = rng.choice(damages(kind))
        broken = damage(whole, rng)
        (place / kind.file).write_bytes(broken)
        actual = run(kind.command, place, kind.result)
        where = f"{name} {number} ({damage.__name__})"
        if isinstance(actual[0], str):
            yield f"{where}: {actual[0]}"
        elif actual[0] == 0 and actual[same] != right[same] and not kind.is_input and damage is not unsealed:
            encoded = base64.b64encode(broken[:200]).decode()
            yield f"{where}: another result, {actual[1]!r} of {encoded}"
    if not kind.start:
        (place / kind.file).write_bytes(whole)
    shutil.rmtree(place / "out", ignore_errors=True)


@pytest.mark.parametrize("name", KINDS)
def test_damage_raises_an_error(name: str, place: Path) -> None:
    wrong = [*attack(place, name, 1 if KINDS[name].slow else 7, 0)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_more_damage_raises_an_error(name: str, place: Path) -> None:
    wrong = [*attack(place, name, 53, 1)]
    assert not wrong, "\n".join(wrong)


def test_the_heavy_test_damages_files_1000_times() -> None:
    assert 53 * len(KINDS) >= 1000
