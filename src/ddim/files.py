"""Files that are never half-written, and folders that one process owns."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ddim.errors import DdimError

T = TypeVar("T")


def write_atomic(path: Path, data: bytes, sync: bool = True) -> None:
    """Write a file so that a reader, at any moment, finds the old one or the whole new one.

    Args:
        path: The file.
        data: Its content.
        sync: Whether it must outlast a power cut too, not only a kill.

    Raises:
        DdimError: If it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise DdimError(path, f"cannot be written ({error.strerror})", "choose a place you may write to") from None


def read_journal(path: Path, parse: Callable[[Any, int], T | None]) -> list[T]:
    """The sound lines at the beginning of a file of JSON lines, which is cut to them: a kill may leave half a line.

    Args:
        path: The file; if there is none, there are no lines.
        parse: What a line's JSON stands for, given how many lines were before it; None for a line that is not sound.

    Returns:
        What they stand for, in order.
    """
    found: list[T] = []
    if not path.exists():
        return found
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        try:
            made = parse(json.loads(line), len(found)) if line.endswith("\n") else None
        except (ValueError, TypeError, KeyError):
            made = None
        if made is None:
            break
        found.append(made)
    write_atomic(path, "".join(lines[: len(found)]).encode())
    return found


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        DdimError: If it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror if not isinstance(error, FileExistsError) else "a file of that name is there"
        raise DdimError(path, f"cannot be made a folder ({why})", "choose another place") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise DdimError(path, "cannot be written to", "choose a folder you may write to")
    return path


def strangers(folder: Path, *ours: str) -> list[str]:
    """What a folder holds beside our own names, locks and half-written files; nothing if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(e.name for e in folder.iterdir() if e.name not in (".lock", *ours) and not e.match(".*.part"))


def remove_parts(folder: Path) -> None:
    """Remove what a killed `write_atomic` left. Call it while the folder is locked."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Own a folder while the context lasts; the lock goes with the process, however it ends.

    Raises:
        DdimError: If another process owns it.
    """
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DdimError(
            folder, f"cannot be written to ({error.strerror})", "choose a folder you may write to"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DdimError(folder, "is in use by another process", "wait for it, or choose another folder") from None
    try:
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path | None:
    """This user's cache folder for our files, which need not exist; None for a user without a home folder."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "ddim"
    except RuntimeError:  # no HOME, and a uid that the system does not know, as containers have them
        return None
