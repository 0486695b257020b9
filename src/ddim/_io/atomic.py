"""Files and folders that are never half-written, and folders that one process owns.

All that this package writes goes through this module, and every change that it makes to a file system is a call of
`os` here or in `ddim._io.temporary`, so that tests can let each of them fail.

What is half-written has a temporary name, see `ddim._io.temporary`.
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
    """Write a file so that a reader, at any moment, finds the old one or the whole new one.

    Args:
        path: The file.
        data: Its content.
        sync: Whether it must outlast a power cut too, not only a kill.

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
        raise DdimError(path, f"cannot be written ({error.strerror})", "choose a place you may write to") from None


class Appender(contextlib.AbstractContextManager["Appender"]):
    """A file to which whole lines are appended; it is made if it is not there.

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
        """Append bytes; a kill may leave the last line torn, a power cut may lose the last lines.

        Raises:
            DdimError: If it cannot be written to.
        """
        try:
            _write(self._handle, data)
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> DdimError:
        return DdimError(self._path, f"cannot be written ({error.strerror})", "choose a place you may write to")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the place of `folder` as a whole when the context ends without an error.

    At any moment `folder` is the old one, the new one, or, between two renames, what `interrupted` finds.

    Args:
        folder: Where. What is there is removed: see first that it is ours.

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
            raise DdimError(folder, f"cannot be put in place ({error.strerror})", "choose another place") from None
        inside = error.what.startswith(str(part))
        raise (DdimError(folder, error.wrong, error.mend) if inside else error) from None


def _exchange(part: Path, folder: Path) -> None:
    """Put a folder in the place of another one."""
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
    """Remove a file; it is no error if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> Path:
    """The folder, made if it is not there, with those above it.

    Raises:
        DdimError: If it cannot be made or written to.
    """
    try:
        for folder in reversed(_missing(path)):
            with contextlib.suppress(FileExistsError):  # another process may make it too
                os.mkdir(folder)
        if not path.is_dir():
            raise FileExistsError
    except OSError as error:
        why = error.strerror if not isinstance(error, FileExistsError) else "a file of that name is there"
        raise DdimError(path, f"cannot be made a folder ({why})", "choose another place") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise DdimError(path, "cannot be written to", "choose a folder you may write to")
    return path


def _missing(path: Path) -> list[Path]:
    """The folder and those above it that are not there, the innermost first."""
    return [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]


def unexpected_entries(folder: Path, *ours: str) -> list[str]:
    """What a folder holds beside our own names, locks and half-written files; nothing if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.name not in ours and not is_leftover(entry))


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Own a folder while the context lasts; the lock goes with the process, however it ends.

    Raises:
        DdimError: If another process owns it.
    """
    while True:
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DdimError(
                folder, f"cannot be written to ({error.strerror})", "choose a folder you may write to"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise DdimError(folder, "is in use by another process", "wait for it, or choose another folder") from None
        if os.fstat(handle).st_nlink:  # else the process that had it has just given up its claim
            break
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


@dataclass
class Claim:
    """What `claimed` gives: whether the folder is to be kept when the context ends with an error."""

    kept: bool = False

    def keep(self) -> None:
        """Something was made that is worth going on with."""
        self.kept = True


@contextlib.contextmanager
def claimed(folder: Path, *ours: str) -> Iterator[Claim]:
    """Own a folder, made if it is not there, while the context lasts; undo that where the context is of no use.

    If the folder was new or empty and the context ends with an error before `Claim.keep` was called, then what it put
    there under the names `ours` is removed, and the folder too if it was made: the corrected command can have it.

    Args:
        folder: The folder.
        ours: What the context may put there before something is worth keeping.

    Raises:
        DdimError: If it cannot be made, or another process owns it.
    """
    made, free = _missing(folder), not unexpected_entries(folder)
    locked = (folder / LOCK).exists()
    claim = Claim()
    try:
        make_folder(folder)
        with lock(folder):
            try:
                yield claim
            except Exception:
                if free and not claim.kept:
                    for name in ours if locked else (*ours, LOCK):
                        remove_tree(folder / name)
                raise
    except Exception:
        if free and not claim.kept:
            with contextlib.suppress(OSError):
                for each in made:
                    os.rmdir(each)
        raise


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
