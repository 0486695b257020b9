"""Progress bars, and running a generator with one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ddim.cli._command import enabled
from ddim.cli.main import Stopper

if TYPE_CHECKING:
    from rich.progress import Progress

    from ddim.evaluation.sample_folder import SampleProgress

Step = TypeVar("Step")
Result = TypeVar("Result")


def counted(n: int, noun: str) -> str:
    """A count and its noun, such as "1 image" or "2 images".

    Args:
        n: The number.
        noun: The plural of the noun, formed with an s.
    """
    return f"{n} {noun.removesuffix('s') if n == 1 else noun}"


def run_with_progress(
    steps: Generator[Step, None, Result],
    title: str,
    total: int,
    status: Callable[[Step, float], tuple[int, str]],
    stopped: Callable[[int], str],
    transient: bool = True,
) -> Result:
    """Run a generator with a progress bar; on a signal, stop after the current step and exit with its code.

    Args:
        steps: The generator; it is closed at the end, which releases the folder it works in.
        title: The text before the bar.
        total: The total of the counts.
        status: From a step and the seconds since the start, the count that is done and the text after the bar.
        stopped: From the count that is done, the message after a signal.
        transient: Whether the bar is removed when done.

    Returns:
        The generator's return value.
    """
    started, done = time.monotonic(), 0
    with contextlib.closing(steps), Stopper() as stopper, progress_bar(transient) as bar:
        task = bar.add_task(title, total=total, rate="")
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                result: Result = end.value
                return result
            done, text = status(step, max(time.monotonic() - started, 1e-9))
            bar.update(task, completed=done, rate=text)
            if stopper() and done < total:
                break
    click.echo(f"stopped: {stopped(done)}", err=True)
    raise SystemExit(stopper.code)


def last_step(steps: Generator[Step, None, Any]) -> Generator[Step, None, Step]:
    """The same steps; the last one is returned."""
    with contextlib.closing(steps):
        for step in steps:
            yield step
    return step


def run_sampling(
    steps: Generator[SampleProgress, None, None], title: str, total: int, noun: str, out: Path, unit: str = "images"
) -> SampleProgress:
    """Run a bulk sampling or decoding with a progress bar; on a signal, stop and exit with its code.

    Args:
        steps: The generator of `ddim.evaluation.sample_folder`.
        title: The text before the bar.
        total: The number of samples requested.
        noun: The plural noun for samples in messages.
        out: The folder.
        unit: The unit of the rate, per second.

    Returns:
        The last step, when all samples are written.
    """

    def status(progress: SampleProgress, seconds: float) -> tuple[int, str]:
        return progress.done, f"{(progress.done - progress.existing) / seconds:.1f} {unit}/s"

    def stopped(done: int) -> str:
        return f"{done} of {counted(total, noun)} in {out}; run the same command to resume"

    return run_with_progress(last_step(steps), title, total, status, stopped, transient=False)


@contextmanager
def progress_bar(transient: bool = False) -> Iterator[Progress]:
    """A progress bar with count, rate and remaining time, on stderr; without a terminal, one line at the end.

    With -q, nothing is printed.

    Args:
        transient: Whether the bar is removed when done; it is always removed after an exception.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, quiet=enabled("quiet"))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )
    if not console.is_interactive:
        yield bar
        if not transient:
            console.print(bar.get_renderable())
        return
    with bar:
        try:
            yield bar
        except BaseException:
            bar.live.transient = True
            raise
