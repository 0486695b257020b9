"""Progress bars, and running a generator that fills a folder with samples."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddim.cli.main import Stopper

if TYPE_CHECKING:
    from ddim.evaluation.sample_folder import SampleProgress

if TYPE_CHECKING:
    from rich.progress import Progress


def fill(
    steps: Generator[SampleProgress, None, None], title: str, total: int, what: str, out: Path, unit: str = "images"
) -> SampleProgress:
    """Run a bulk sampling or decoding with a progress bar; on a signal, stop and exit with its code.

    Args:
        steps: The generator of `ddim.evaluation.sample_folder`.
        title: The text before the bar.
        total: The number of samples requested.
        what: The noun for samples in messages.
        out: The folder.
        unit: The unit of the rate, per second.

    Returns:
        The last step, when all samples are written.
    """
    progress, started = None, time.monotonic()
    with contextlib.closing(steps), Stopper() as stopper, progress_bar() as bar:  # closing releases the folder
        task = bar.add_task(title, total=total, rate="")
        for progress in steps:
            rate = (progress.done - progress.existing) / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=progress.done, rate=f"{rate:.1f} {unit}/s")
            if stopper() and progress.done < progress.total:
                break
    assert progress is not None
    if progress.done < progress.total:
        message = f"stopped: {progress.done} of {progress.total} {what} in {out}; run the same command to make the rest"
        click.echo(message, err=True)
        raise SystemExit(stopper.code)
    return progress


@contextmanager
def progress_bar(transient: bool = False) -> Iterator[Progress]:
    """A progress bar with count, rate and time left, on stderr; without a terminal, one line at the end.

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

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
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
