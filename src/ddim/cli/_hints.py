"""Translation of hints, which name Python arguments, into options of the command that prints them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from ddim.errors import Hint

_ARGUMENT = re.compile(r"(?<![\w.])([a-z_]\w*)=('[^']*'|\"[^\"]*\"|[\w.]+)")


def translated(text: str, command: click.Command | None) -> str:
    """A message with `name=value` written as an option, if the command has one of that name.

    Args:
        text: The message, or a part of it. From a `ddim.errors.Hint`, alternatives are dropped that name an argument
            for which the command has no option; the result is "" if none is left.
        command: The command; None outside the command line, where the text is returned unchanged.
    """
    if command is None:
        return text
    ways: Sequence[str] = text.ways if isinstance(text, Hint) else (text,)
    texts = [_ARGUMENT.sub(lambda found: _option(found, command), way) for way in ways]
    usable = [way for way in texts if not _ARGUMENT.search(way)] if isinstance(text, Hint) else texts
    return ", or ".join(usable)


def _option(found: re.Match[str], command: click.Command) -> str:
    """An argument and its value as an option; unchanged if the command has no such option."""
    for option in command.params:
        if isinstance(option, click.Option) and option.name == found[1]:
            names = option.opts if found[2] != "False" else option.secondary_opts
            if not names:
                break
            name = max(names, key=len)
            return name if option.is_flag else f"{name} {found[2].strip(chr(39) + chr(34))}"
    return found[0]
