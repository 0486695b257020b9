"""What goes wrong, said in one line: `error: <what or which file>: <what is wrong>; <how to mend it>`."""

from __future__ import annotations

import warnings


class DdimError(Exception):
    """Bad input from a user. The commands print it as one line and exit with 2.

    Args:
        what: The thing or file at fault.
        wrong: What is wrong with it.
        mend: How to mend it.
    """

    def __init__(self, what: object, wrong: str, mend: str):
        self.what, self.wrong, self.mend = str(what), wrong, mend
        super().__init__(f"{self.what}: {wrong}; {mend}")


class DdimWarning(UserWarning):
    """Something asked for was changed or left out; the message says what."""


def say(message: str) -> None:
    """Say aloud that something asked for was changed or left out (a `DdimWarning`)."""
    warnings.warn(message, DdimWarning, stacklevel=3)
