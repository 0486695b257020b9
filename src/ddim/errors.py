"""What goes wrong, said in one line: `error: <what or which file>: <what is wrong>; <how to mend it>`."""

from __future__ import annotations

import warnings

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


class DdimError(Exception):
    """Bad input from a user. The commands print it as one line and exit with 2.

    Args:
        what: The thing or file at fault.
        wrong: What is wrong with it.
        mend: How to mend it.
    """

    def __init__(self, what: object, wrong: str, mend: str):
        self.what, self.wrong, self.mend = shorten(str(what), SUBJECT), shorten(wrong, TEXT), shorten(mend, TEXT)
        super().__init__(f"{self.what}: {self.wrong}; {self.mend}")


class DdimWarning(UserWarning):
    """Something asked for was changed or left out; the message says what."""


def say(message: str) -> None:
    """Say aloud that something asked for was changed or left out (a `DdimWarning`)."""
    warnings.warn(message, DdimWarning, stacklevel=3)
