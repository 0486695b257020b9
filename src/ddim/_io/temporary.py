"""Temporary names of files and folders that are being written, and cleanup after killed processes.

A file or folder is written as `.NAME.PID-RANDOM.part` beside its destination; a folder that is being replaced is
briefly `.NAME.PID-RANDOM.old`. The writing process holds a lock (flock) on them, which ends with the process: whoever
can take that lock knows that the writer is gone, and may remove them. Nothing else is ever removed.
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
"""Temporary files of early 0.1 versions, whose names had no random part."""


def temporary_name(path: Path, role: str) -> Path:
    """A unique temporary path beside a path; the role is "part" or "old"."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.{role}")


def temporaries(folder: Path) -> list[tuple[Path, str, str]]:
    """Entries of a folder with a temporary name of this package: path, final name, and "part" or "old"."""
    if not folder.is_dir():
        return []
    matches = ((entry.path, _TEMPORARY.fullmatch(entry.name)) for entry in os.scandir(folder))
    return [(Path(path), match["name"], match["role"]) for path, match in matches if match]


def create(path: Path, of_folder: bool = False) -> tuple[Path, int]:
    """Create and lock a temporary file or folder beside a path; returns its path and an open descriptor."""
    while True:
        part = temporary_name(path, "part")
        if of_folder:
            os.mkdir(part)
            handle = os.open(part, os.O_RDONLY)
        else:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # otherwise another process removed it before it was locked
            return part, handle
        os.close(handle)


@contextlib.contextmanager
def lock_leftover(path: Path) -> Iterator[None]:
    """Lock a temporary file or folder of another process.

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
    """The newest `.old` copy of a missing folder, left by a process killed while replacing it; None if none."""
    if folder.exists() or not folder.parent.is_dir():
        return None
    candidates = [path for path, name, role in temporaries(folder.parent) if (name, role) == (folder.name, "old")]
    return max((path for path in candidates if path.is_dir()), key=lambda path: path.stat().st_mtime_ns, default=None)


def remove_parts(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of killed processes from a folder, and restore folders whose replacement was interrupted.

    Temporary files of running processes, and files without a temporary name, are left alone.

    Args:
        folder: The folder.
        name: Only temporary files of this final name; None for all.
    """
    for place in {each for _, each, role in temporaries(folder) if role == "old" and name in (None, each)}:
        old = interrupted(folder / place)
        if old is not None:
            with contextlib.suppress(OSError), lock_leftover(old):
                os.rename(old, folder / place)
    for path, each, _ in temporaries(folder):
        if name in (None, each):
            with contextlib.suppress(OSError), lock_leftover(path):
                remove_tree(path)
    if name is None and folder.is_dir():
        for entry in list(os.scandir(folder)):
            if _EARLIER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with its content, as far as possible; no error is raised."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            os.unlink(path)
            return
        for entry in list(os.scandir(path)):
            remove_tree(Path(entry.path))
        os.rmdir(path)


def is_leftover(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is an empty lock file or a temporary file of this package."""
    if entry.name == LOCK or _EARLIER.fullmatch(entry.name):
        return entry.is_file(follow_symlinks=False) and (entry.name != LOCK or not entry.stat().st_size)
    return _TEMPORARY.fullmatch(entry.name) is not None
