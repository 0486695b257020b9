"""The compiled kernels are loaded only from safe files, and a damaged cache is repaired."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import select
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddim.nn.cpu import kernels, library
from ddim.nn.cpu.library import Unavailable
from models import ddim, save_tiny

SOURCE = 'extern "C" int answer() { return %d; }\nextern "C" __attribute__((constructor)) void mark() { %s }\n'
OTHER = 54321  # no user's uid

try:
    library.find_compiler()
except Unavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)


def answer(built: ctypes.CDLL) -> int:
    """The answer of the test library; anything but 42 counts as a wrong result."""
    try:
        value = int(built.answer())
    except AttributeError:
        raise Unavailable("is another library") from None
    if value != 42:
        raise Unavailable("computes wrong numbers")
    return value


class Place:
    """A source file and a separate cache.

    Args:
        folder: Where both are.
    """

    def __init__(self, folder: Path):
        self.source, self.cache = folder / "answer.cpp", folder / "cache" / "ddim" / "kernels"
        self.source.write_text(SOURCE % (42, ""))

    def load(self) -> int:
        return library.load(self.source, answer)

    @property
    def built(self) -> Path:
        [path] = self.cache.iterdir()
        return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "FLAGS", ("-shared", "-fPIC"))  # quicker than with all of them
    return Place(tmp_path)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the compilers that were run."""
    ran: list[str] = []
    compile_, before = library._compile, logging.getLogger("ddim").level
    monkeypatch.setattr(library, "_compile", lambda *arguments: (ran.append(arguments[0]), compile_(*arguments)))
    logging.getLogger("ddim").setLevel(logging.INFO)
    yield ran
    logging.getLogger("ddim").setLevel(before)


def test_the_library_is_built_once_and_private_to_this_user(
    place: Place, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert place.load() == place.load() == 42
    assert len(compilations) == len(caplog.records) == 1  # what takes seconds is logged, once
    assert hashlib.sha256(place.built.read_bytes()).hexdigest() in place.built.name
    for path in (place.cache, place.built):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def replaced(path: Path, data: bytes) -> None:
    """Another file in its place; to write into the file of a loaded library would end the process."""
    part = path.with_name("part")
    part.write_bytes(data)
    part.chmod(0o600)
    os.replace(part, path)


def cut(path: Path) -> None:
    replaced(path, path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    replaced(path, bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    replaced(path, data)


def emptied(path: Path) -> None:
    replaced(path, b"")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


def exchanged(path: Path) -> None:
    """Another library, which would do something when it is loaded, under the right name."""
    source = path.parent.parent / "evil.cpp"
    source.write_text(SOURCE % (42, "__builtin_trap();"))
    library._compile(library.find_compiler(), source, path.parent.parent)
    os.replace(path.parent.parent / "kernels.so", path)
    path.chmod(0o600)


def writable(path: Path) -> None:
    path.chmod(0o620)


@pytest.mark.parametrize("damage", [cut, zeroed, flipped, emptied, pipe, link, exchanged, writable])
def test_a_changed_library_is_rebuilt(damage: Any, place: Place, compilations: list[str]) -> None:
    place.load()
    sound = place.built.read_bytes()
    damage(place.built)
    del compilations[:]
    assert place.load() == 42
    assert place.built.read_bytes() == sound
    assert place.load() == 42
    assert len(compilations) == 1


def test_a_folder_with_its_name_is_not_removed(
    place: Place, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    place.load()
    path = place.built
    path.unlink()
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    assert place.load() == place.load() == 42
    assert (path / "mine.txt").read_text() == "mine"
    assert str(path) in caplog.text


def test_a_library_with_wrong_results_is_rebuilt_once(place: Place, compilations: list[str]) -> None:
    """A sound file by its digest, but what it computes is wrong: as after a compiler that has been repaired."""
    place.load()
    good, name = place.built, place.built.name
    place.source.write_text(SOURCE % (41, ""))
    library._compile(library.find_compiler(), place.source, place.source.parent)
    bad = place.source.parent / "kernels.so"
    bad.chmod(0o600)
    good.unlink()
    wrong = place.cache / f"{name[: name.rindex('-')]}-{hashlib.sha256(bad.read_bytes()).hexdigest()}.so"
    bad.rename(wrong)
    place.source.write_text(SOURCE % (42, ""))
    del compilations[:]
    assert place.load() == 42
    assert len(compilations) == 1
    assert place.built.name == name


def test_a_compiler_with_wrong_results_is_not_used(
    place: Place, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    place.source.write_text(SOURCE % (41, ""))
    with pytest.raises(Unavailable):
        place.load()
    assert len(compilations) == 1
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert list(place.cache.iterdir()) == []  # nothing that is wrong is cached


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_cache_that_others_can_write_to_is_not_used(
    mode: int, place: Place, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    place.load()
    place.cache.chmod(mode)
    exchanged(place.built)
    before = {path: path.read_bytes() for path in place.cache.iterdir()}
    assert place.load() == 42
    assert len(compilations) == 3  # exchanged's own is one
    assert str(place.cache) in caplog.text
    assert {path: path.read_bytes() for path in place.cache.iterdir()} == before


def test_another_users_file_is_not_used(place: Place, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place.load()
    sound = place.built
    before, fstat = sound.read_bytes(), os.fstat

    def of_another(handle: int) -> Any:
        about = fstat(handle)
        foreign = stat.S_ISREG(about.st_mode)
        return os.stat_result([OTHER if foreign and k == 4 else value for k, value in enumerate(about)])

    with monkeypatch.context() as patch:
        patch.setattr(library.os, "fstat", of_another)
        assert place.load() == 42
    assert len(compilations) == 2
    assert place.built == sound
    assert sound.read_bytes() == before


def test_another_users_folder_is_not_used(
    place: Place, compilations: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.load()
    original = place.cache.stat().st_ino, os.fstat

    def of_another(handle: int) -> Any:
        about = original[1](handle)
        foreign = about.st_ino == original[0]
        return os.stat_result([OTHER if foreign and k == 4 else value for k, value in enumerate(about)])

    with monkeypatch.context() as patch:
        patch.setattr(library.os, "fstat", of_another)
        assert place.load() == 42
    assert len(compilations) == 2
    assert str(OTHER) in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("owned", ["file", "folder"])
def test_a_constructor_of_another_users_library_never_runs(
    owned: str, place: Place, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It would end the process that runs these tests."""
    place.load()
    path = place.built
    exchanged(path)
    evil = path.with_name(f"{path.name[: path.name.rindex('-')]}-{hashlib.sha256(path.read_bytes()).hexdigest()}.so")
    path.rename(evil)  # so that its digest is right
    os.chown(evil if owned == "file" else place.cache, OTHER, OTHER)
    assert place.load() == 42
    assert owned == "file" or str(OTHER) in caplog.text


def test_without_a_home_folder_there_is_no_cache(
    place: Place, compilations: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert place.load() == 42
    assert "home" in caplog.text


def test_without_a_writable_cache_the_kernels_still_compile(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.cache.parent.parent.write_text("a file")
    assert place.load() == 42
    assert str(place.cache.parent) in caplog.text


def compiler(folder: Path, script: str) -> str:
    """A compiler that runs a shell script."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", ["echo 'it is broken' >&2; exit 3", "exit 0"])
def test_a_compiler_that_fails(script: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(place.source.parent, script))
    with pytest.raises(Unavailable):
        place.load()
    assert list(place.cache.iterdir()) == []


def test_a_hanging_compiler_is_killed_with_its_children(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it started holds a pipe open, of which the end is seen as soon as that is gone."""
    pipe = place.source.parent / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    script = f"exec 3>{pipe}\nsleep 600 &\necho started >&3\nwait"
    monkeypatch.setenv("CXX", compiler(place.source.parent, script))
    wait = library.subprocess.Popen.wait

    def as_soon_as_it_runs(self: Any, timeout: float | None = None) -> int:
        if timeout is not None:
            select.select([end], [], [])
        return wait(self, timeout)

    monkeypatch.setattr(library, "TIME_LIMIT", 0.01)
    monkeypatch.setattr(library.subprocess.Popen, "wait", as_soon_as_it_runs)
    with pytest.raises(Unavailable):
        place.load()
    os.set_blocking(end, True)
    assert os.read(end, 100) == b"started\n"
    assert os.read(end, 100) == b""
    os.close(end)


def test_no_compiler(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(Unavailable, match="compiler"):
        place.load()


def test_an_unavailable_result_is_cached_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Path] = []

    def refuse(source: Path, accept: Any) -> Any:
        tries.append(source)
        raise Unavailable("the library built by g++ computes wrong numbers")

    monkeypatch.setattr(library, "load", refuse)
    kernels._outcome.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(Unavailable):
                kernels.kernels()
    finally:
        kernels._outcome.cache_clear()
    assert len(tries) == 1


def test_a_command_logs_the_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It continues in float32, with the reason, if the compiler fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo 'it is broken' >&2; exit 3"))
    monkeypatch.setattr("ddim.model.precision.units_of", lambda device: library_units())
    kernels._outcome.cache_clear()
    try:
        model = save_tiny(tmp_path / "model")
        assert ddim("sample", model, "-n", 1, "--steps", 2, "--out", tmp_path / "out", "--device", "cpu") == 0
    finally:
        kernels._outcome.cache_clear()
    lines = capsys.readouterr()
    assert "note: compiling CPU kernels" in lines.err
    assert "float32 on cpu" in lines.out
    assert "it is broken" in lines.out


def library_units() -> Any:
    from ddim.nn.cpu.units import Units

    return Units(matrix=False, vector=True)
