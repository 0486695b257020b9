"""A folder of pictures being filled: the bar, the stop in between, and what is said of it."""

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
    from ddim.evaluation.sample_folder import Made

if TYPE_CHECKING:
    from rich.progress import Progress


def fill(
    steps: Generator[Made, None, None], title: str, total: int, what: str, out: Path, unit: str = "images"
) -> Made:
    """Go through a bulk sampling or decoding, and exit with a signal's code where one asks to stop.

    Args:
        steps: What `ddim.evaluation.sample_folder` yields.
        title: What is being done.
        total: How many pictures are asked for.
        what: What they are called.
        out: The folder.
        unit: What is counted per second.

    Returns:
        The last step, when all are there.
    """
    made, begun = None, time.monotonic()
    with contextlib.closing(steps), Stopper() as stopper, progress_bar() as bar:  # closed, it lets go of the folder
        task = bar.add_task(title, total=total, rate="")
        for made in steps:
            rate = (made.done - made.found) / max(time.monotonic() - begun, 1e-9)
            bar.update(task, completed=made.done, rate=f"{rate:.1f} {unit}/s")
            if stopper() and made.done < made.total:
                break
    assert made is not None
    if made.done < made.total:
        told = f"stopped: {made.done} of {made.total} {what} in {out}; run the same command to make the rest"
        click.echo(told, err=True)
        raise SystemExit(stopper.code)
    return made


@contextmanager
def progress_bar(transient: bool = False) -> Iterator[Progress]:
    """A bar with count, rate and time left, on stderr; where that is no terminal, one line at the end.

    Args:
        transient: Whether it vanishes when done, as it always does when something goes wrong.
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
