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
    alternatives: Sequence[str] = text.alternatives if isinstance(text, Hint) else (text,)
    texts = [_ARGUMENT.sub(lambda match: _option(match, command), each) for each in alternatives]
    usable = [each for each in texts if not _ARGUMENT.search(each)] if isinstance(text, Hint) else texts
    return ", or ".join(usable)


def translated_subject(text: str, command: click.Command | None) -> str:
    """A subject written as an option, if it is one `name=value`; settings inside a plan's name are left as they are."""
    return translated(text, command) if _ARGUMENT.fullmatch(text) else text


def _option(match: re.Match[str], command: click.Command) -> str:
    """An argument and its value as an option; unchanged if the command has no such option."""
    for option in command.params:
        if isinstance(option, click.Option) and option.name == match[1]:
            names = option.opts if match[2] != "False" else option.secondary_opts
            if not names:
                break
            name = max(names, key=len)
            return name if option.is_flag else f"{name} {match[2].strip(chr(39) + chr(34))}"
    return match[0]
