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
        earlier: Whether a version of this library without SHA256SUMS wrote files there.
        sound: Decides from its content whether a file of such a version is complete.

    Warns:
        DdimWarning: If a line of SHA256SUMS is damaged; on exit, if files without a checksum were accepted.
    """

    def __init__(self, folder: Path, earlier: bool = False, sound: Callable[[Path], bool] | None = None):
        self._folder, path = folder, folder / SUMS
        self._sound = sound if earlier and not path.exists() else None
        data = read_bytes(path, memory()) if path.exists() else b""
        entries = _LINE.findall(data)
        sums = {name: digest for digest, name in entries}  # the last line counts if a file was rewritten
        torn = sum(67 + len(name) for _, name in entries) != len(data)
        if torn:
            warn(f"{path}: holds a line that is torn or damaged; what it was about is made again")
        if torn or len(sums) < len(entries):
            write_atomic(path, b"".join(digest + b"  " + name + b"\n" for name, digest in sums.items()))
        self._sums = {name.decode("utf-8", "replace"): digest.decode() for name, digest in sums.items()}
        self._file = Appender(path)
        self.taken = 0

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()
        if self.taken:
            warn(f"{self._folder}: {self.taken} file(s) of a version without checksums are taken as they are")

    def missing(self, paths: Sequence[Path]) -> tuple[list[int], int]:
        """Indices of the files that must be written, and how many of them exist but are damaged."""
        missing, damaged = [], 0
        for place, path in enumerate(paths):
            try:
                check_file(path)
                digest = sha256(path)
            except (DdimError, FileNotFoundError):
                missing.append(place)
                continue
            if self._sums.get(path.name) == digest:
                continue
            if self._sound is not None and self._sound(path):
                self._add([(path, digest)])
                self.taken += 1
                continue
            missing.append(place)
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
