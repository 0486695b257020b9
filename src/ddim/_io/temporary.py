"""Temporary names of files and folders that are being written, and what a killed process left under them.

What is being written has a name beside its place, `.NAME.PID-RANDOM.part`, and a folder that is being replaced is for
a moment `.NAME.PID-RANDOM.old`. Their owner holds a lock on them (flock), which goes with the process: whoever can
take that lock knows that the owner is gone, and may remove them. Nothing else is ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.(?P<role>part|old)", re.DOTALL)
_EARLIER = re.compile(r"\..+\.\d+\.part", re.DOTALL)
"""Temporary files of version 0.1 before its names had a random part."""


def temporary_name(path: Path, role: str) -> Path:
    """A name beside a path that no other process uses; the role is "part" or "old"."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.{role}")


def temporaries(folder: Path) -> list[tuple[Path, str, str]]:
    """What has a temporary name of ours in a folder: path, final name, and "part" or "old"."""
    if not folder.is_dir():
        return []
    matches = ((entry.path, _TEMPORARY.fullmatch(entry.name)) for entry in os.scandir(folder))
    return [(Path(path), match["name"], match["role"]) for path, match in matches if match]


def create(path: Path, of_folder: bool = False) -> tuple[Path, int]:
    """Make a temporary file or folder beside a path, and lock it: its path and an open descriptor of it."""
    while True:
        part = temporary_name(path, "part")
        if of_folder:
            os.mkdir(part)
            handle = os.open(part, os.O_RDONLY)
        else:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else another process has removed it before it was locked
            return part, handle
        os.close(handle)


@contextlib.contextmanager
def taken(path: Path) -> Iterator[None]:
    """Hold the lock on what another process made.

    Raises:
        OSError: If that process is alive, or the path is neither a file nor a folder.
    """
    if stat.S_IFMT(os.lstat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise FileNotFoundError
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def interrupted(folder: Path) -> Path | None:
    """Where the content of a folder is that is missing because a process was killed while it replaced it."""
    if folder.exists() or not folder.parent.is_dir():
        return None
    found = [path for path, name, role in temporaries(folder.parent) if (name, role) == (folder.name, "old")]
    return max((path for path in found if path.is_dir()), key=lambda path: path.stat().st_mtime_ns, default=None)


def remove_parts(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder; a folder whose replacement they broke off is put back.

    What a living process is writing, and whatever does not have a temporary name of ours, is left alone.

    Args:
        folder: The folder.
        name: Only what was being written under this name.
    """
    for place in {each for _, each, role in temporaries(folder) if role == "old" and name in (None, each)}:
        old = interrupted(folder / place)
        if old is not None:
            with contextlib.suppress(OSError), taken(old):
                os.rename(old, folder / place)
    for path, each, _ in temporaries(folder):
        if name in (None, each):
            with contextlib.suppress(OSError), taken(path):
                remove_tree(path)
    if name is None and folder.is_dir():
        for entry in list(os.scandir(folder)):
            if _EARLIER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with all in it, as far as that is possible."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            os.unlink(path)
            return
        for entry in list(os.scandir(path)):
            remove_tree(Path(entry.path))
        os.rmdir(path)


def is_leftover(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a lock of ours, or something half-written."""
    if entry.name == LOCK or _EARLIER.fullmatch(entry.name):
        return entry.is_file(follow_symlinks=False) and (entry.name != LOCK or not entry.stat().st_size)
    return _TEMPORARY.fullmatch(entry.name) is not None
