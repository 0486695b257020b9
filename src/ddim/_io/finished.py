"""List of the finished files of a folder with their checksums, for resuming.

FOLDER/SHA256SUMS has a line for every file, its SHA-256 and its name, as `sha256sum -c` reads them. A line is written
before its file is moved into place: a kill in between leaves a line without a file, never a file without a line.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ddim._io.atomic import Appender, sha256, write_atomic
from ddim._io.reading import check_file, memory, read_bytes
from ddim.errors import DdimError, warn

SUMS = "SHA256SUMS"
_LINE = re.compile(rb"([0-9a-f]{64})  ([^\n]+)\n")


class Finished(contextlib.AbstractContextManager["Finished"]):
    """The finished files of a folder that this process has locked.

    Args:
        folder: The folder.
        unverified: Whether a version of this library without SHA256SUMS wrote files there.
        is_complete: Decides from its content whether a file of such a version is complete.

    Warns:
        DdimWarning: If a line of SHA256SUMS is damaged; on exit, if files without a checksum were accepted.
    """

    def __init__(self, folder: Path, unverified: bool = False, is_complete: Callable[[Path], bool] | None = None):
        self._folder, path = folder, folder / SUMS
        self._is_complete = is_complete if unverified and not path.exists() else None
        data = read_bytes(path, memory()) if path.exists() else b""
        entries = _LINE.findall(data)
        sums = {name: digest for digest, name in entries}  # the last line counts if a file was rewritten
        damaged = sum(67 + len(name) for _, name in entries) != len(data)
        if damaged:
            warn(f"{path}: has a damaged line; its file is written again")
        if damaged or len(sums) < len(entries):
            write_atomic(path, b"".join(digest + b"  " + name + b"\n" for name, digest in sums.items()))
        self._sums = {name.decode("utf-8", "replace"): digest.decode() for name, digest in sums.items()}
        self._file = Appender(path)
        self.accepted = 0

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()
        if self.accepted:
            warn(f"{self._folder}: {self.accepted} file(s) of a version without checksums are accepted unverified")

    def missing(self, paths: Sequence[Path]) -> tuple[list[int], int]:
        """Indices of the files that must be written, and how many of them exist but are damaged."""
        missing, damaged = [], 0
        for index, path in enumerate(paths):
            try:
                check_file(path)
                digest = sha256(path)
            except (DdimError, FileNotFoundError):
                missing.append(index)
                continue
            if self._sums.get(path.name) == digest:
                continue
            if self._is_complete is not None and self._is_complete(path):
                self._add([(path, digest)])
                self.accepted += 1
                continue
            missing.append(index)
            damaged += 1
        return missing, damaged

    def write(self, files: Sequence[tuple[Path, bytes]]) -> None:
        """Write files and list them as finished.

        Raises:
            DdimError: If they cannot be written.
        """
        self._add([(path, hashlib.sha256(data).hexdigest()) for path, data in files])
        for path, data in files:
            write_atomic(path, data, sync=False)

    def _add(self, files: Sequence[tuple[Path, str]]) -> None:
        new = {path.name: digest for path, digest in files if self._sums.get(path.name) != digest}
        if new:
            self._file.write("".join(f"{digest}  {name}\n" for name, digest in new.items()).encode())
        self._sums |= new
