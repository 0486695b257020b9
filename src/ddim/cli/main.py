"""`ddim`: the group of commands, and the one place where what goes wrong becomes a line and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import warnings
from typing import Any

import click

from ddim.cli.hints import translated
from ddim.errors import DdimError, DdimWarning

COMMANDS = {
    "train": "Train a model on pictures, or go on with a run that was stopped.",
    "sample": "Sample pictures into a folder, or complete a folder that was interrupted.",
    "encode": "Turn pictures into latents x_T.",
    "decode": "Turn latents back into pictures.",
    "reconstruct": "Encode and decode pictures and measure the error (the paper's Table 2).",
    "interpolate": "Walk between two latents, over a sheet between four, or blend any number.",
    "edit": "Make a picture anew: from a rough one, a part, a small or a grey one.",
    "likelihood": "Measure bits per dimension: the variational bound, or through the ODE.",
    "evaluate": "Measure samples of every S and eta against data (the paper's Table 1).",
    "reproduce": "Make the tables and figures of the paper's section 5 for a model, as one page.",
    "distance": "Measure the distance of two sets of pictures: FID, KID, precision and recall.",
    "statistics": "Write the feature statistics of a data set with their protocol.",
    "check": "Hold a model, a plan or a schedule against the theory and print what deviates.",
    "calibrate": "Measure a model's error at each time, for `--sigma optimal`.",
    "tune": "Find a better plan for a model and a number of network calls.",
    "plan": "Print the table of coefficients that a sampler runs.",
    "convert": "Bring a model of another code into ours, or ours into a diffusers folder.",
    "export": "Write a model's network, or a whole sampler, as ONNX or a torch.export program.",
    "info": "Show what a model is and where it comes from.",
    "demo": "Make three pictures and a table with the bundled model.",
}


class _Commands(click.Group):
    """Commands that are imported when they are called, so that `ddim --help` does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ddim.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ddim")
def cli() -> None:
    """Denoising Diffusion Implicit Models: train once, sample in 10-50 network calls, encode, decode, interpolate.

    \b
    First steps:
      ddim sample mnist --steps 20 -n 64 --out samples --sheet sheet.png
      ddim train ./photos --preset cifar10 --out runs/photos
    """


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input (one line on stderr), 130 or 143 stopped by a signal."""
    warnings.showwarning = _note  # type: ignore[assignment]
    warnings.filterwarnings("always", category=DdimWarning)
    logger = logging.getLogger("ddim")
    logger.handlers = [_Notes()]
    logger.setLevel(logging.INFO)
    try:
        code = cli.main(args=argv, obj=sys.argv[1:] if argv is None else argv, prog_name="ddim", standalone_mode=False)
    except DdimError as error:
        code = _complain(_line(error, sys.argv[1:] if argv is None else argv))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "ddim"
        code = _complain(f"{path}: {error.format_message().rstrip('.')}; see {path} --help")
    except click.ClickException as error:
        code = _complain(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _complain(f"{error.filename or 'system'}: {error.strerror or error}; check the place and try again")
    sys.exit(code if isinstance(code, int) else 0)


def _line(error: DdimError, words: list[str]) -> str:
    """An error in the words of the command that met it."""
    command = cli.get_command(click.Context(cli), words[0]) if words else None
    what, hint = translated(error.what, command), translated(error.mend, command)
    return f"{what}: {error.wrong}; {hint}" if hint else f"{what}: {error.wrong}"


def _complain(line: str) -> int:
    click.echo(f"error: {' '.join(line.split())}", err=True)
    return 2


class _Notes(logging.Handler):
    """What the library logs, such as that it compiles, on a line of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"note: {record.getMessage()}", err=True)


def _note(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """What was changed or left out, on a line of its own; other libraries' warnings stay out of the way."""
    if isinstance(message, DdimWarning):
        context = click.get_current_context(silent=True)
        command = context.command if context else None
        hint = translated(message.mend, command)
        click.echo(f"note: {message.message}; {hint}" if hint else f"note: {message.message}", err=True)


class Stopper:
    """Turns Ctrl-C and SIGTERM into a request to stop after the step at hand; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Stopper:
        self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return bool(self.signal)

    @property
    def code(self) -> int:
        """The exit code of a process stopped by that signal."""
        return 128 + self.signal
