"""Atomic writes of files and folders, and folder locks.

Everything this package writes goes through this module. Every change to a file system is a call of `os` here or in
`ddim._io.temporary`, so that tests can make each of them fail.

Files and folders are written under temporary names, see `ddim._io.temporary`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ddim._io.temporary import LOCK, create, is_leftover, remove_parts, remove_tree, temporary_name
from ddim.errors import DdimError


def write_atomic(path: Path, data: bytes, sync: bool = True) -> None:
    """Write a file atomically: a reader sees the old file or the complete new one.

    Args:
        path: The file.
        data: Its content.
        sync: Whether to fsync, so that the file survives a power cut and not only a kill.

    Raises:
        DdimError: If it cannot be written.
    """
    part = None
    try:
        part, handle = create(path)
        try:
            _write(handle, data)
            if sync:
                os.fsync(handle)
            os.replace(part, path)
        finally:
            os.close(handle)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)
        raise DdimError(path, f"cannot be written ({error.strerror})", "choose a writable path") from None


class Appender(contextlib.AbstractContextManager["Appender"]):
    """A file opened for appending lines; created if it does not exist.

    Args:
        path: The file.

    Raises:
        DdimError: If it cannot be written to.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._error(error) from None

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, data: bytes) -> None:
        """Append bytes; a kill may leave the last line incomplete, a power cut may lose the last lines.

        Raises:
            DdimError: If it cannot be written to.
        """
        try:
            _write(self._handle, data)
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> DdimError:
        return DdimError(self._path, f"cannot be written ({error.strerror})", "choose a writable path")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the context ends without an error.

    At any moment `folder` is the old one or the new one; between two renames the old one has a temporary name, see
    `ddim._io.temporary.interrupted`.

    Args:
        folder: The destination. An existing folder is removed: check first that this package wrote it.

    Raises:
        DdimError: If it cannot be written.
    """
    make_folder(folder.parent)
    remove_parts(folder.parent, folder.name)
    part = None
    try:
        part, handle = create(folder, of_folder=True)
        try:
            yield part
            sync_folder(part)
            _exchange(part, folder)
        finally:
            os.close(handle)
    except (DdimError, OSError) as error:
        if part is not None:
            remove_tree(part)
        if isinstance(error, OSError):
            raise DdimError(folder, f"cannot be written ({error.strerror})", "choose another path") from None
        is_inside = error.subject.startswith(str(part))
        raise (DdimError(folder, error.problem, error.hint) if is_inside else error) from None


def _exchange(part: Path, folder: Path) -> None:
    """Replace `folder` with `part`."""
    if not folder.exists():
        os.rename(part, folder)
        sync_folder(folder.parent)
        return
    old = temporary_name(folder, "old")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.rename(folder, old)
        try:
            os.rename(part, folder)
        except OSError:
            os.rename(old, folder)
            raise
        sync_folder(folder.parent)
        remove_tree(old)
    finally:
        os.close(handle)


def remove_file(path: Path) -> None:
    """Remove a file, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that they survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> Path:
    """Create a folder and its parents where they do not exist, and return it.

    Raises:
        DdimError: If it cannot be created or written to.
    """
    try:
        for folder in reversed(_missing(path)):
            with contextlib.suppress(FileExistsError):  # another process may create it at the same time
                os.mkdir(folder)
        if not path.is_dir():
            raise FileExistsError
    except OSError as error:
        reason = error.strerror if not isinstance(error, FileExistsError) else "a file of that name exists"
        raise DdimError(path, f"cannot be created ({reason})", "choose another path") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise DdimError(path, "is not writable", "choose a writable folder")
    return path


def _missing(path: Path) -> list[Path]:
    """The folder and its parents that do not exist, innermost first."""
    return [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]


def unexpected_entries(folder: Path, *expected: str) -> list[str]:
    """Names in a folder other than `expected`, locks and temporary files; empty if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.name not in expected and not is_leftover(entry))


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a folder while the context lasts; the lock is released when the process ends, even by a kill.

    Raises:
        DdimError: If another process holds the lock.
    """
    while True:
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DdimError(folder, f"is not writable ({error.strerror})", "choose a writable folder") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise DdimError(folder, "is in use by another process", "wait for it, or choose another folder") from None
        if os.fstat(handle).st_nlink:  # otherwise `claimed` of another process has just removed the lock file
            break
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


@dataclass
class Claim:
    """Yielded by `claimed`: whether the folder's content is kept when the context ends with an error.

    Args:
        kept: Whether it is kept.
    """

    kept: bool = False

    def keep(self) -> None:
        """Keep the content from now on: it can be resumed."""
        self.kept = True


@contextlib.contextmanager
def claimed(folder: Path, *expected: str) -> Iterator[Claim]:
    """Create and lock a folder while the context lasts; clean up after an early error.

    If the folder was new or empty and the context ends with an error before `Claim.keep` was called and while it holds
    nothing else, the files named in `expected` are removed, and the folder too if it was created, so that the corrected
    command can use it.

    Args:
        folder: The folder.
        expected: Names that the context may write before it calls `Claim.keep`.

    Raises:
        DdimError: If it cannot be created, or another process has locked it.
    """
    missing, was_empty = _missing(folder), not unexpected_entries(folder)
    was_locked = (folder / LOCK).exists()
    claim = Claim()
    try:
        make_folder(folder)
        with lock(folder):
            try:
                yield claim
            except Exception:
                if unexpected_entries(folder, *expected):  # a first result was written before the error
                    claim.keep()
                if was_empty and not claim.kept:
                    for name in expected if was_locked else (*expected, LOCK):
                        remove_tree(folder / name)
                raise
    except Exception:
        if was_empty and not claim.kept:
            with contextlib.suppress(OSError):
                for path in missing:
                    os.rmdir(path)
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path | None:
    """This user's cache folder for this package, which may not exist; None for a user without a home folder."""
    configured = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(configured) if configured else Path.home() / ".cache") / "ddim"
    except RuntimeError:  # no HOME and an unknown uid, as in containers
        return None
