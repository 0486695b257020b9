"""What goes wrong, said in one line: `error: <what or which file>: <what is wrong>; <how to mend it>`."""

from __future__ import annotations

import copyreg
import warnings
from typing import Any

SUBJECT, TEXT = 400, 800
"""The most characters of an error's subject, and of what is said of it."""


def printable(text: object) -> str:
    """A name on one line that any terminal can show; what cannot be shown is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shorten(text: str, most: int = 120) -> str:
    """A text of at most so many characters: of a longer one the beginning and the end are left.

    Args:
        text: A value that is echoed in a message, which may be of any length.
        most: The most characters, at least 40.
    """
    if len(text) <= most:
        return text
    note = f"... ({len(text):,} characters) ..."
    left = most - len(note)
    return text[: left - left // 3] + note + text[len(text) - left // 3 :]


class Hint(str):
    """What to do, as several ways to do it; see `either`."""

    ways: tuple[str, ...] = ()


def either(*ways: str) -> Hint:
    """A hint of several ways. Of a library it names arguments as Python has them, `fit='stretch'`.

    The commands write an argument as their option, `--fit stretch`, and leave out ways that they have no option for.

    Args:
        ways: What can be done, one thing each.
    """
    made = Hint(", or ".join(ways))
    made.ways = ways
    return made


class DdimError(ValueError):
    """Bad input from a user. The commands print it as one line and exit with 2.

    It can be pickled, so that it passes from one process to another, as can every subclass, whatever its arguments.

    Args:
        what: The thing or file at fault.
        wrong: What is wrong with it.
        mend: How to mend it.
    """

    def __init__(self, what: object, wrong: str, mend: str):
        self.what, self.wrong, self.mend = shorten(str(what), SUBJECT), shorten(wrong, TEXT), shorten(mend, TEXT)
        super().__init__(f"{self.what}: {self.wrong}; {self.mend}")

    def __reduce__(self) -> tuple[Any, ...]:
        # By default the class would be called with the one message.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class DdimWarning(UserWarning):
    """Something asked for was changed or left out; the message says what.

    Args:
        message: What, and why.
        mend: How to have it otherwise; "" where that is plain.
    """

    def __init__(self, message: str, mend: str = ""):
        self.message, self.mend = message, mend
        super().__init__(f"{message}; {mend}" if mend else message)


def warn(message: str, mend: str = "") -> None:
    """Say aloud that something asked for was changed or left out (a `DdimWarning`).

    Args:
        message: What was, and why.
        mend: How to have it otherwise, see `either`.
    """
    warnings.warn(DdimWarning(message, mend), stacklevel=3)
