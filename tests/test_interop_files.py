"""Untrusted weight files: their contents never run, and errors have one line."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddim.errors import DdimError
from ddim.model.importers import CheckpointHints, read


class Trap:
    """A pickle that writes a file when it is executed."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.place, "executed")


def zipped(trap: Trap, path: Path) -> None:
    torch.save({"model": {"conv_in.weight": trap}}, path)


def old(trap: Trap, path: Path) -> None:
    torch.save([trap], path, _use_new_zipfile_serialization=False)


def plain(protocol: int) -> Callable[[Trap, Path], None]:
    return lambda trap, path: path.write_bytes(pickle.dumps(trap, protocol)) and None


def tar(trap: Trap, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(trap)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def module(trap: Trap, path: Path) -> None:
    layer = nn.Linear(2, 2)
    layer.trap = trap  # type: ignore[assignment]
    torch.save(layer, path)


TRAPS = {"zip": zipped, "before zip": old, "tar": tar, "a whole module": module}
TRAPS |= {f"pickle, protocol {protocol}": plain(protocol) for protocol in (0, 2, 4, 5)}


@pytest.mark.parametrize("name", TRAPS)
def test_a_file_that_would_run_code_is_an_error_and_does_not_run(name: str, tmp_path: Path) -> None:
    path, place = tmp_path / "model.pt", tmp_path / "ran"
    TRAPS[name](Trap(place), path)
    with pytest.raises(DdimError, match=r"model\.pt: .*\bcode\b") as error:
        read(path, CheckpointHints(size=(16, 16)))
    assert "\n" not in str(error.value)
    assert not place.exists()


def test_the_trap_runs_when_unpickled(tmp_path: Path) -> None:
    zipped(Trap(tmp_path / "ran"), tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "ran").read_text() == "executed"


def half(path: Path, legacy: bool) -> None:
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello\nworld"),
    "truncated": lambda path: half(path, False),
    "truncated, before zip": lambda path: half(path, True),
    "another zip": other_zip,
    "a folder": lambda path: path.mkdir(),
    "not there": lambda path: None,
    "numpy": lambda path: np.savez(path.open("wb"), a=np.ones(3)),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_a_one_line_error(name: str, suffix: str, tmp_path: Path) -> None:
    from ddim.model.importers import detect

    path = tmp_path / f"model{suffix}"
    BROKEN[name](path)
    with pytest.raises(DdimError) as error:
        detect.read(path, CheckpointHints(size=(16, 16)))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_any_damage_of_a_file_is_a_ddim_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    random = np.random.default_rng(0)
    for legacy in (False, True):
        torch.save({"a": torch.ones(10), "b": 3}, path, _use_new_zipfile_serialization=not legacy)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(100):
            bad = whole.copy()
            bad[random.integers(0, min(len(bad), 700), 3)] = random.integers(0, 256, 3)
            path.write_bytes(bad.tobytes())
            with pytest.raises(DdimError):  # at the latest because it is no known network
                read(path, CheckpointHints(size=(16, 16)))
