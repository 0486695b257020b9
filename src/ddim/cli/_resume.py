"""`ddim train --resume`: run the command that started a run again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ddim.errors import DdimError

ADDABLE = ("steps", "budget", "checkpoint_every", "keep", "preview_every", "log_every", "device")
"""Options that can be added when a run is resumed: its length, intervals, and the device."""


def resumed(run: Path) -> dict[str, Any]:
    """Run the command that is recorded in a run, with the run's folder and the options of this command added.

    Raises:
        DdimError: If the folder is not a run with a recorded command, or another option was passed.
    """
    ctx = click.get_current_context()
    added: list[str] = []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        explicit = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if not explicit or name == "resume" or not parameter.expose_value:
            continue
        option = parameter.opts[0] if isinstance(parameter, click.Option) else "DATA"
        if name not in ADDABLE:
            raise DdimError(f"--resume and {option}", "cannot be combined", "a run keeps its settings; leave it out")
        value = ctx.params[name]
        added += [option, f"{value}s" if name == "budget" else str(value)]
    words = [*_recorded(run), *added]
    common = {**ctx.meta}
    inner = ctx.command.make_context("train", [*words[2:], "--out", str(run)], parent=ctx.parent, obj=words[1:])
    ctx.meta.update(common)  # -q, -v and --json are those of this command
    callback: Any = ctx.command.callback
    with inner:
        results: dict[str, Any] = inner.invoke(callback, **inner.params)
    return results


def _recorded(run: Path) -> list[str]:
    """The words of the command that started a run."""
    from ddim.model.checkpoint import CONFIG, find, read_config

    if not (run / "run.json").is_file():
        problem = "is not a training run" if run.exists() else "no such folder"
        raise DdimError(run, problem, "use the folder of a run; `ddim runs` lists them")
    try:
        folder = find(run / "model")
    except DdimError:
        hint = "run the command that started it again"
        raise DdimError(run, "has no checkpoint yet, which its command is recorded in", hint) from None
    try:
        words = shlex.split(read_config(folder / CONFIG).provenance.command)
    except ValueError as error:
        if isinstance(error, DdimError):
            raise
        words = []
    if words[:2] != ["ddim", "train"] or "--resume" in words:
        raise DdimError(run, "was not started by `ddim train`", "resume it as it was started")
    return words
