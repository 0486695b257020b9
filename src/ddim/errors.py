"""Errors and warnings, printed in one line: `error: <subject>: <problem>; <hint>`."""

from __future__ import annotations

import copyreg
import sys
import warnings
from typing import Any

SUBJECT, TEXT = 400, 800
"""Maximum number of characters of an error's subject, and of its problem and its hint."""


def printable(text: object) -> str:
    """Text on one line that any terminal can show; unprintable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shorten(text: str, most: int = 120) -> str:
    """Shorten a text to at most `most` characters by replacing its middle with a note of its length.

    Args:
        text: A value to repeat in a message, of any length.
        most: The maximum number of characters, at least 40.
    """
    if len(text) <= most:
        return text
    note = f"... ({len(text):,} characters) ..."
    shown = most - len(note)
    return text[: shown - shown // 3] + note + text[len(text) - shown // 3 :]


class Hint(str):
    """A hint with several alternatives; see `either`."""

    alternatives: tuple[str, ...] = ()


def either(*alternatives: str) -> Hint:
    """A hint with several alternatives, which name arguments as in Python, `fit='stretch'`.

    The commands write an argument as their option, `--fit stretch`, and drop alternatives without such an option.

    Args:
        alternatives: The alternatives, one action each.
    """
    hint = Hint(", or ".join(alternatives))
    hint.alternatives = alternatives
    return hint


class DdimError(ValueError):
    """An error caused by the user's input. The commands print it as one line and exit with code 2.

    It can be pickled, and so passed between processes; so can every subclass, whatever its arguments.

    Args:
        subject: The subject: the file or setting at fault.
        problem: The problem.
        hint: The hint: how to fix it.
    """

    def __init__(self, subject: object, problem: str, hint: str):
        self.subject, self.problem, self.hint = (
            shorten(str(subject), SUBJECT),
            shorten(problem, TEXT),
            shorten(hint, TEXT),
        )
        super().__init__(f"{self.subject}: {self.problem}; {self.hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with the message as its only argument.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class DdimWarning(UserWarning):
    """A request was changed or partly shown out, as the message explains.

    Args:
        message: What was changed, and why.
        hint: The hint: how to avoid it; "" if that is obvious.
    """

    def __init__(self, message: str, hint: str = ""):
        self.message, self.hint = message, hint
        super().__init__(f"{message}; {hint}" if hint else message)


def warn(message: str, hint: str = "") -> None:
    """Emit a `DdimWarning`, at the line of the caller of this package: a request was changed or partly shown out.

    Args:
        message: What was changed, and why.
        hint: The hint: how to avoid it, see `either`.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "ddim":
        frame, level = frame.f_back, level + 1
    warnings.warn(DdimWarning(message, hint), stacklevel=level)
