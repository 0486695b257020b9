"""The compiled kernels as a shared library: built with the machine's compiler, cached, verified and loaded.

Loading a library runs its code, so a file that another user could have written is never loaded: the cache folder and
the file must belong to this user and be writable by nobody else, and the file's name contains its SHA-256, which is
verified first. Folders and files are opened once and then used through their descriptors, so that they cannot be
exchanged in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ddim._io.atomic import user_cache
from ddim.nn.cpu.units import cpu_flags

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
TIME_LIMIT = 120.0
"""Time limit for the compiler in seconds; it usually takes about 3."""
LARGEST = 64 << 20  # largest file in bytes; the library has a few hundred thousand
OTHERS = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)
T = TypeVar("T")


class Unavailable(Exception):
    """The kernels are not available; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Folder:
    """An open folder that belongs to this user and that nobody else can write to.

    Args:
        path: Its path.
        handle: Its file descriptor.
    """

    path: Path
    handle: int


def load(source: Path, accept: Callable[[ctypes.CDLL], T]) -> T:
    """Load the library of a source file, from the cache if a valid one is there, else compile it.

    Args:
        source: A C++ file.
        accept: Converts a library to the result; it raises `Unavailable` for one that does not work.

    Returns:
        The result of `accept`.

    Raises:
        Unavailable: If there is no compiler, it fails, or the compiled library is not accepted.
    """
    compiler = find_compiler()
    key = source.read_bytes() + repr((FLAGS, compiler, platform.machine(), cpu_flags(), torch.__version__)).encode()
    prefix = f"kernels-{hashlib.sha256(key).hexdigest()[:16]}-"
    cache, problem = _open_cache()
    try:
        reason = ""
        for name in _names(cache, prefix):
            assert cache is not None
            try:
                return accept(_loaded(cache, name, name.removeprefix(prefix).removesuffix(".so")))
            except Unavailable as error:
                reason = f" again: {cache.path / name} {error}"
                _remove_invalid(cache, name)
        log.info("compiling CPU kernels (once, about 3 s)%s", reason)
        with contextlib.ExitStack() as stack:
            build, build_problem = _open_build_folder(cache, stack)
            problem = problem or build_problem
            _compile(compiler, source, build.path)
            try:
                result = accept(_loaded(build, "kernels.so"))
            except Unavailable as error:
                log.warning("the CPU kernels are not used: the library built by %s %s", Path(compiler).name, error)
                raise Unavailable(f"the library built by {Path(compiler).name} {error}") from None
            if cache is not None and not problem:
                problem = _store(build, cache, prefix)
        if problem:
            log.warning("the CPU kernels are not cached, each process compiles them: %s", problem)
        return result
    finally:
        if cache is not None:
            os.close(cache.handle)


def find_compiler() -> str:
    """The C++ compiler: $CXX, g++ or clang++.

    Raises:
        Unavailable: If there is none, or this is not Linux.
    """
    if platform.system() != "Linux":
        raise Unavailable(f"they are built on Linux only, this is {platform.system()}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        raise Unavailable("there is no C++ compiler (g++ or clang++)")
    return compiler


def _open_folder(path: Path) -> Folder:
    """Open a folder and check its owner and permissions.

    Raises:
        OSError: If it cannot be opened.
        PermissionError: If it belongs to another user, or others can write to it.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    info = os.fstat(handle)
    if info.st_uid == os.geteuid() and not info.st_mode & OTHERS:
        return Folder(path, handle)
    os.close(handle)
    if info.st_uid != os.geteuid():
        raise PermissionError(0, f"belongs to another user (uid {info.st_uid})", str(path))
    raise PermissionError(0, "can be written to by other users (chmod go-w it)", str(path))


def _open_cache() -> tuple[Folder | None, str]:
    """The cache folder, or None and the reason."""
    parent = user_cache()
    if parent is None:
        return None, "this user has no home folder (set XDG_CACHE_HOME)"
    path = parent / "kernels"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        return _open_folder(path), ""
    except OSError as error:
        return None, _describe(error, path)


def _open_build_folder(cache: Folder | None, stack: contextlib.ExitStack) -> tuple[Folder, str]:
    """A new temporary folder, in the cache if possible, and the reason if it is elsewhere."""
    problem = ""
    for parent in (None,) if cache is None else (cache.path, None):
        try:
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="ddim-kernels-", dir=parent))
            folder = _open_folder(Path(path))
        except OSError as error:
            problem = problem or _describe(error, parent or Path("temporary folder"))
            continue
        stack.callback(os.close, folder.handle)
        return folder, problem
    raise Unavailable(f"there is no folder to compile them in ({problem})")


def _names(cache: Folder | None, prefix: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        names = [] if cache is None else sorted(os.listdir(cache.handle))
        yield from (name for name in names if name.startswith(prefix) and name.endswith(".so"))


def _loaded(folder: Folder, name: str, digest: str | None = None) -> ctypes.CDLL:
    """Load a library of a folder, if it belongs to this user and has the expected SHA-256.

    Raises:
        Unavailable: If not, or if it cannot be loaded.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe of that name must not block
    try:
        handle = os.open(name, flags, dir_fd=folder.handle)
    except OSError as error:
        raise Unavailable(f"cannot be opened ({error.strerror})") from None
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode) or info.st_size > LARGEST:
            raise Unavailable("is not a library")
        if digest is not None and (info.st_uid != os.geteuid() or info.st_mode & OTHERS):
            raise Unavailable("can be written to by other users")
        if digest is not None and _digest(handle) != digest:
            raise Unavailable("is damaged")
        descriptor = Path(f"/proc/self/fd/{handle}")
        # The descriptor stays open: the loader identifies libraries by name, and a reused descriptor number would be
        # the name of this library.
        library = ctypes.CDLL(str(descriptor) if descriptor.exists() else str(folder.path / name))
        handle = -1
        return library
    except OSError as error:
        raise Unavailable(f"cannot be loaded ({error})") from None
    finally:
        if handle >= 0:
            os.close(handle)


def _digest(handle: int) -> str:
    with open(handle, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_invalid(cache: Folder, name: str) -> None:
    """Remove an invalid file from the cache, unless it is a folder or belongs to another user."""
    with contextlib.suppress(OSError):
        info = os.stat(name, dir_fd=cache.handle, follow_symlinks=False)
        if info.st_uid == os.geteuid() and not stat.S_ISDIR(info.st_mode):
            os.unlink(name, dir_fd=cache.handle)


def _store(build: Folder, cache: Folder, prefix: str) -> str:
    """Move the compiled library into the cache atomically; returns the reason if this fails, else ""."""
    name = ""
    try:
        handle = os.open("kernels.so", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=build.handle)
        try:
            os.fchmod(handle, 0o600)
            os.fsync(handle)
            name = f"{prefix}{_digest(handle)}.so"
        finally:
            os.close(handle)
        os.rename("kernels.so", name, src_dir_fd=build.handle, dst_dir_fd=cache.handle)
        os.fsync(cache.handle)
    except OSError as error:
        return _describe(error, cache.path / name)
    return ""


def _compile(compiler: str, source: Path, folder: Path) -> None:
    """Compile a source file to `kernels.so` in a folder.

    Raises:
        Unavailable: If the compiler cannot be run, fails, or takes longer than `TIME_LIMIT`.
    """
    name, command = Path(compiler).name, [compiler, *FLAGS, str(source), "-o", str(folder / "kernels.so")]
    try:
        # A file, because child processes of a killed compiler would keep a pipe open.
        with open(folder / "messages.txt", "w+b") as messages:
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, start_new_session=True
            ) as process:
                try:
                    process.wait(TIME_LIMIT)
                except subprocess.TimeoutExpired:
                    raise Unavailable(f"{name} did not finish within {TIME_LIMIT:g} s") from None
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
            messages.seek(0)
            lines = messages.read(10_000).decode(errors="replace").strip().splitlines()
    except OSError as error:
        raise Unavailable(f"{name} cannot be run ({error.strerror})") from None
    if process.returncode:
        raise Unavailable(f"{name} fails: {(lines or ['no message'])[0][:120]}")


def _describe(error: OSError, path: Path) -> str:
    return f"{error.filename or path}: {error.strerror or error}"
