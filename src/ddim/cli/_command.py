"""What all commands have in common: the options -q, -v and --json, and options listed in groups."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import platform
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import click

from ddim.errors import DdimError, DdimWarning

COMMON = ("quiet", "verbose", "json_result", "as_json")
_GROUPS = {
    "Data": "data split against_split test_split limit size fit label_column images mnist",
    "Sampler": "steps sampler samplers method grid eta sigma clip_x0 temperature top_p plan_file like any_model encode "
    "diff solver nfe draws dequantize last_sigma probes start_at",
    "Labels and guidance": "label guidance cfg_plus_plus",
    "Feature space": "extractor inception_weights any_protocol",
    "Device": "device dtype compile_ batch micro_batch",
}
_TRAINING = {
    "Recipe": "preset_name settings config_file save_config show",
    "Run": "out resume source device",
    "Data": "split limit skip_unreadable label_column labels tokenizer length size fit channels flip",
    "Model and objective [default: the preset's, see --show]": "predicts gamma",
    "Optimiser [default: the preset's, see --show]": "steps budget batch accumulate lr warmup decay ema seed precision "
    "compile_",
    "Checkpoints and logs [default: the preset's, see --show]": "checkpoint_every keep preview_every log_every",
}
"""The parameters of each group of options, by title; those in none are listed first."""


class Command(click.Command):
    """A command with -q, -v and --json, and with its options in groups.

    A command returns its results as a dictionary, which --json prints as the only output on stdout. A command that has
    its own --json keeps it.

    Args:
        plain: The command to extend.
    """

    def __init__(self, plain: click.Command):
        options = [
            click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, help="Print errors and results only."),
            click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, help="Also print details."),
        ]
        self.own_json = any("--json" in parameter.opts for parameter in plain.params)
        if not self.own_json:
            text = "Print the results as one JSON object, and nothing else on stdout."
            options.append(click.Option(["--json", "json_result"], is_flag=True, expose_value=False, help=text))
        for option in options:
            option.callback = _remember
        super().__init__(plain.name, params=[*plain.params, *options], callback=plain.callback, help=plain.help)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with -q, -v and --json applied."""
        if enabled("quiet") and enabled("verbose"):
            raise DdimError("--quiet and --verbose", "cannot be combined", "use one of them")
        started, as_json = time.monotonic(), enabled("json_result")
        with contextlib.ExitStack() as stack:
            if enabled("quiet"):
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", DdimWarning)
                logger = logging.getLogger("ddim")
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.WARNING)
            output = stack.enter_context(contextlib.redirect_stdout(io.StringIO())) if as_json else None
            result = super().invoke(ctx)
        detail(f"{_versions()}; {time.monotonic() - started:.2f} s")
        if output is not None:
            results = result if isinstance(result, Mapping) else {"text": output.getvalue()}
            click.echo(json.dumps(json_value({"command": self.name, **results}), indent=1))
        return result

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in their groups."""
        groups = _TRAINING if self.name == "train" else _GROUPS
        title_of = {name: title for title, names in groups.items() for name in names.split()}
        title_of |= dict.fromkeys(COMMON, "Common options")
        help_option = self.get_help_option(ctx)
        records: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *groups, "Common options")}
        for parameter in self.get_params(ctx):
            record = None if isinstance(parameter, click.Argument) else parameter.get_help_record(ctx)
            if record is not None:
                title = "Common options" if parameter is help_option else title_of.get(str(parameter.name), "Options")
                records[title].append(record)
        for title, rows in records.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def enabled(name: str) -> bool:
    """Whether the running command has the option "quiet", "verbose" or "json_result"."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(f"{__name__}.{name}"))


def note(text: str) -> None:
    """Print a line on stderr, unless -q was passed."""
    if not enabled("quiet"):
        click.echo(text, err=True)


def detail(text: str) -> None:
    """Print a line on stderr if -v was passed."""
    if enabled("verbose"):
        click.echo(text, err=True)


def json_value(value: Any) -> Any:
    """A value that JSON can hold: numbers that are not finite, paths and the like become strings."""
    if isinstance(value, Mapping):
        return {str(key): json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta[f"{__name__}.{parameter.name}"] = value


def _versions() -> str:
    """The versions of this library, Python, and torch if it is in use."""
    from ddim import __version__

    torch = sys.modules.get("torch")
    threads = 0 if torch is None else torch.get_num_threads()
    used = "" if torch is None else f", torch {torch.__version__} with {threads} thread{'s' * (threads > 1)}"
    return f"ddim {__version__}, Python {platform.python_version()}{used}"
