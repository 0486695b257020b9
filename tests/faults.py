"""A file system that fails: every change that `ddim._io.atomic` makes is counted, and one of them fails or is the last.

The changes are the calls of `os` in `ddim._io.atomic` and `ddim._io.temporary`; nothing else in the package makes any.
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
    """What no code catches; from then on nothing is changed, as if the process were gone."""


class FaultySystem:
    """Stands for the module `os`.

    Args:
        at: Which change fails, counted from 1; none of them if 0.
        error: The number of the OSError; a kill if None.
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
                if name == "write":  # half of it arrives
                    real(args[0], args[1][: len(args[1]) // 2])
                self._fail()
            return None if name == "fsync" else real(*args)  # no power is cut here, and it takes long

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
        Whose `count` is the number of changes so far.
    """
    system = FaultySystem(at, error)
    with pytest.MonkeyPatch.context() as patch:
        for module in (atomic, temporary):
            patch.setattr(module, "os", system)
        yield system


FULL, BROKEN = errno.ENOSPC, errno.EIO
