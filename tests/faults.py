"""A faulty file system: counts the changes made by `ddim._io`, one of which fails or is the last.

The changes are calls of `os` in `ddim._io.atomic` and `ddim._io.temporary`, the only modules that change files.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest

from ddim._io import atomic, temporary

CHANGES = ("write", "fsync", "mkdir", "rmdir", "rename", "replace", "unlink")


class Killed(BaseException):
    """Raised in place of a kill; no code catches it, and later changes have no effect."""


class FaultySystem:
    """Replaces the module `os`.

    Args:
        at: Number of the change that fails, from 1; 0 for none.
        error: errno of the OSError; None for a kill.
    """

    def __init__(self, at: int = 0, error: int | None = None):
        self.at, self.error, self.count, self.dead = at, error, 0, False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "open":
            return self._open
        if name not in CHANGES:
            return real

        def call(*args: Any) -> Any:
            if self._counted():
                if name == "write":  # half of it is written
                    real(args[0], args[1][: len(args[1]) // 2])
                self._fail()
            return None if name == "fsync" else real(*args)  # skipped, since it is slow and no test cuts the power

        return call

    def _open(self, path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT and self._counted():
            self._fail()
        return os.open(path, flags, *mode)

    def _counted(self) -> bool:
        if self.dead:
            raise Killed
        self.count += 1
        return self.count == self.at

    def _fail(self) -> None:
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        self.dead = True
        raise Killed


@contextlib.contextmanager
def faulty(at: int = 0, error: int | None = None) -> Iterator[FaultySystem]:
    """Let one change of the file system fail while the context lasts.

    Yields:
        The faulty system, whose `count` is the number of changes so far.
    """
    system = FaultySystem(at, error)
    with pytest.MonkeyPatch.context() as patch:
        for module in (atomic, temporary):
            patch.setattr(module, "os", system)
        yield system


FULL, BROKEN = errno.ENOSPC, errno.EIO
