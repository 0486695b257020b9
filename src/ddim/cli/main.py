"""`ddim`: the command group, and the one place that turns exceptions into a line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ddim.cli._command import Command
from ddim.cli._hints import translated, translated_subject
from ddim.errors import DdimError, DdimWarning, printable, shorten

_IMPORTED = _started = time.monotonic()
LONGEST = 1500  # maximum characters of a printed line

COMMANDS = {
    "train": "Train a model on images or text, or resume a stopped run.",
    "sample": "Sample images or text into a folder, or resume an interrupted run.",
    "encode": "Encode images as latents x_T.",
    "decode": "Decode latents into images.",
    "reconstruct": "Encode and decode images and measure the error (the paper's Table 2).",
    "interpolate": "Interpolate between two or four latents, or blend any number.",
    "edit": "Edit an image: SDEdit, inpainting, super-resolution, colourisation.",
    "likelihood": "Measure bits per dimension: the variational bound, or the exact likelihood by the ODE.",
    "evaluate": "Measure sample quality for every S and eta (the paper's Table 1).",
    "reproduce": "Reproduce the tables and figures of the paper's section 5 for a model, as one page.",
    "distance": "Measure the distance between two sets of images: FID, KID, precision and recall.",
    "statistics": "Write the feature statistics of a data set, with their protocol.",
    "check": "Verify a model, plan or schedule against the theory.",
    "calibrate": "Measure a model's error at each timestep, for `--sigma optimal`.",
    "tune": "Tune a plan for a model and a number of network evaluations.",
    "plan": "Print a sampler's table of coefficients.",
    "show": "Plot noise schedules, or the paths of samplers with an exact denoiser.",
    "convert": "Convert checkpoints to and from other libraries.",
    "export": "Export a network, or a whole sampler, as ONNX or a torch.export program.",
    "info": "Show a model's configuration and provenance.",
    "runs": "List training runs and models.",
    "demo": "Make three figures and a table with the bundled model.",
}


class _Commands(click.Group):
    """A group that imports a command when it is called, so that `ddim --help` does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in COMMANDS and args[0][:1] != "-" and not ctx.resilient_parsing:
            raise DdimError("ddim", f"no such command: {args[0]}", _nearest(args[0], COMMANDS) or "see ddim --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@functools.cache
def _command(name: str) -> click.Command:
    command: click.Command = importlib.import_module(f"ddim.cli.{name}").command
    if isinstance(command, click.Group):
        for inner, plain in command.commands.items():
            command.commands[inner] = Command(plain)
        return command
    return Command(command)


def _nearest(name: str, names: Iterable[str]) -> str:
    """The hint that names the nearest of `names`; "" if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else ""


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ddim")
def cli() -> None:
    """Denoising Diffusion Implicit Models: train, sample in 10-50 network evaluations, encode, decode, interpolate.

    \b
    First steps:
      ddim sample mnist --steps 20 -n 64 --out samples --sheet sheet.png
      ddim train ./photos --preset photos --budget 30min --out runs/photos
    """


def process_age() -> float:
    """Seconds since this process was started; on systems other than Linux, since this module was imported."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        stat = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
        ticks = int(stat.rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return time.monotonic() - _IMPORTED


def started() -> float:
    """The start of the command, from `time.monotonic`: of the process, or of a call of `main` with arguments."""
    return _started


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input (one line on stderr), 130 or 143 stopped by a signal.

    An exception that no input should cause keeps its traceback and exits with 1.
    """
    global _started
    _started = time.monotonic() - (process_age() if argv is None else 0.0)
    warnings.showwarning = _print_warning  # type: ignore[assignment]
    warnings.filterwarnings("always", category=DdimWarning)
    threading.excepthook = _print_thread_error
    logger = logging.getLogger("ddim")
    logger.handlers = [_LogLines()]
    logger.setLevel(logging.INFO)
    try:
        code = cli.main(
            args=argv,
            obj=sys.argv[1:] if argv is None else argv,
            prog_name="ddim",
            standalone_mode=False,
            color=False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None,
        )
    except DdimError as error:
        code = _print_error(_line(error, sys.argv[1:] if argv is None else argv))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except click.NoSuchOption as error:
        path = error.ctx.command_path if error.ctx else "ddim"
        known = [name for option in error.ctx.command.params for name in option.opts] if error.ctx else []
        hint = _nearest(error.option_name, known) or f"see {path} --help"
        code = _print_error(f"{path}: no such option: {error.option_name}; {hint}")
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "ddim"
        code = _print_error(f"{path}: {error.format_message().rstrip('.')}; see {path} --help")
    except click.ClickException as error:
        code = _print_error(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        _close(sys.stdout)
        code = 1
    except OSError as error:
        path = os.fsdecode(error.filename) if isinstance(error.filename, bytes | str) else "system"
        code = _print_error(f"{path}: {error.strerror or error}; check it and try again")
    except (ArithmeticError, MemoryError, RecursionError, RuntimeError, UnicodeError) as error:
        reason = _reason(error)
        if not reason:
            raise
        code = _print_error(reason)
    code = code if isinstance(code, int) else 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _close(sys.stdout)
    except OSError as error:  # a full device
        code = _print_error(
            f"output: cannot be written ({error.strerror}); free some space, or write to another device"
        )
        _close(sys.stdout)
    sys.exit(code)


def _reason(error: Exception) -> str:
    """The message for an error of memory, size, encoding or device; "" for anything else, which is a bug."""
    first = shorten(str(error).partition("\n")[0])
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OF_MEMORY.search(str(error))):
        return f"memory: is insufficient ({first or 'MemoryError'}); reduce the batch, the size or the number"
    if isinstance(error, RecursionError):
        return "input: is nested too deeply; use a flatter one"
    if isinstance(error, OverflowError):
        return f"input: has a number that is too large ({first}); use a smaller one"
    if isinstance(error, UnicodeError):
        return f"input: has text that cannot be encoded ({first}); use plain Unicode text"
    if isinstance(error, RuntimeError) and _OF_DEVICE.search(str(error)):
        return f"device: cannot do this ({first}); leave --device out, or use cpu"
    return ""


_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory|size calculation overflowed", re.I)
_OF_DEVICE = re.compile(r"\b(CUDA|cuDNN|cuBLAS|NVIDIA|MPS|XPU|HIP) |meta tensor|device type|on device", re.I)


def _line(error: DdimError, arguments: list[str]) -> str:
    """An error as one line, with arguments written as options of the command that raised it."""
    command = cli.get_command(click.Context(cli), arguments[0]) if arguments else None
    subject, hint = translated_subject(error.subject, command), translated(error.hint, command)
    return f"{subject}: {error.problem}; {hint}" if hint else f"{subject}: {error.problem}"


def _print_error(line: str) -> int:
    _print_line(f"error: {line}")
    return 2


def _print_line(line: str) -> None:
    """Print one line on stderr; errors in writing it are ignored."""
    try:
        click.echo(shorten(printable(" ".join(line.split())), LONGEST), err=True)
    except (OSError, ValueError):
        _close(sys.stderr)


def _close(stream: Any) -> None:
    """Redirect a broken stream to the null device: flushing it at exit would fail and change the exit code."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_thread_error(args: Any) -> None:
    """Print the exception that ended a thread; the command itself handles it or does without the thread."""
    if args.exc_type is not SystemExit:
        _print_line(f"note: {getattr(args.thread, 'name', 'a thread')} ended: {args.exc_value}")


class _LogLines(logging.Handler):
    """Prints each log record of the library as a line, such as that it compiles."""

    def emit(self, record: logging.LogRecord) -> None:
        _print_line(f"note: {record.getMessage()}")


def _print_warning(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """Print a `DdimWarning` as one line; warnings of other libraries are not shown."""
    if isinstance(message, DdimWarning):
        context = click.get_current_context(silent=True)
        command = context.command if context else None
        hint = translated(message.hint, command)
        _print_line(f"note: {message.message}; {hint}" if hint else f"note: {message.message}")


class Stopper:
    """Turns Ctrl-C and SIGTERM into a request to stop, which is acknowledged; a second one stops at once.

    Args:
        message: The acknowledgement.
    """

    def __init__(self, message: str = "stopping after the current part; Ctrl-C again stops at once") -> None:
        self.signal, self.message = 0, message

    def __enter__(self) -> Stopper:
        self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a closed stream, or a write that is going on
            click.echo(self.message, err=True)

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return bool(self.signal)

    @property
    def code(self) -> int:
        """The exit code of a process stopped by that signal."""
        return 128 + self.signal
