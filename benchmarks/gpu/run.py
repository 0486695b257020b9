"""The order of the parts, the command line, and the end in time."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch._dynamo

from benchmarks.gpu import loop, network, parallel, report, training
from benchmarks.gpu.bench import Bench, ceilings
from benchmarks.gpu.deadline import END, Deadline
from benchmarks.gpu.sampling import Sampling, cells, unplanned
from benchmarks.measuring import RESULTS
from ddim.errors import DdimError

PARTS = ("sampling", "network", "loop", "parallel", "training")


class Task(NamedTuple):
    """A part of the run; `seconds` are those it takes beside what it predicts itself."""

    name: str
    seconds: float
    job: Callable[[], None]


def tasks(bench: Bench, only: Sequence[str] = PARTS) -> list[Task]:
    """What is done, in order of importance."""
    sampling, sizes = Sampling(bench), bench.sizes
    groups = {
        name: [Task(f"sampling, {cell.name}", 0.0, partial(sampling.cell, cell)) for cell in group]
        for name, group in cells(sizes.batches, sizes.steps).items()
    }
    small, large = (Task(f"training, batch {n}", 0.0, partial(training.measure, bench, n)) for n in sizes.training)
    order = [
        *groups["first"],
        *groups["middle"],
        *groups["compiled"],
        Task("network evaluations and profiles", 5.0, partial(network.measure, bench, sampling)),
        Task("loop", 5.0, partial(loop.measure, bench)),
        *groups["latency"],
        Task("parallel over time", 15.0, partial(parallel.measure, bench)),
        small,
        large,
        *groups["last"],
    ]
    chosen = [task for task in order if task.name.startswith(tuple(only))]
    return [Task("ceilings", 5.0, partial(ceilings, bench)), *chosen]


def run(bench: Bench, only: Sequence[str] = PARTS) -> None:
    """Do all that fits, and write what there is after each part."""
    leave, sizes = bench.deadline.leave, bench.sizes
    if "sampling" in only:
        for what in unplanned(cells(sizes.batches, sizes.steps), sizes.batches, sizes.steps):
            leave(f"sampling, {what}", "not planned, a step's time does not depend on S")
    for part in PARTS:
        if part not in only:
            leave(part, "not asked for")
    planned = tasks(bench, only)
    bench.todo = [task.name for task in planned]
    # One graph for each batch size, whoever calls torch.compile: else the second size would make a dynamic one. And a
    # function has more than 8 graphs here, after which torch would fall back to eager.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        for task in planned:
            bench.deadline.attempt(task.name, task.seconds, task.job)
            bench.todo.pop(0)
            bench.free()
            bench.write()
    bench.clocks["after"] = bench.smi()
    bench.write()


def cut_off(bench: Bench) -> None:
    """End the process in the midst of a part that takes longer than predicted; what there is, is written."""
    try:
        for what in bench.todo:
            bench.deadline.leave(what, "cut off, or not begun, when the time was over")
        bench.write()
        print(report.text(bench.results()), flush=True)
    finally:
        os._exit(1)  # a compiler or a kernel that does not come back would not let an exception through


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Speed on one GPU.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="within which all of it ends; the start counts")
    parser.add_argument("--out", type=Path, help="the results; benchmarks/results/gpu.json, nowhere with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a trial of the code, not a measurement")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--commit", help="what is measured, where the tree is a copy without git")
    return parser.parse_args(argv)


def prepared(given: argparse.Namespace, begun: float | None) -> Bench:
    """The run that was asked for.

    Raises:
        DdimError: If it cannot be.
    """
    if not 0 < given.minutes <= 1440:
        raise DdimError(f"--minutes {given.minutes:g}", "is out of range", "give some, such as 8")
    out = given.out or (None if given.tiny else RESULTS / "gpu.json")
    if out is not None and not out.parent.is_dir():
        raise DdimError(out.parent, "is not a folder", "make it, or give another --out")
    return Bench(given.device, given.tiny, Deadline(given.minutes * 60, begun=begun), out, given.commit)


def main(argv: Sequence[str] | None = None, begun: float | None = None) -> int:
    """Measure; 0 if all that was tried went well, else 1.

    Args:
        argv: The command line.
        begun: When the time began, on the clock time.monotonic; then the process ends when it is over. Now if left
            out, and the last part is waited for.
    """
    given = arguments(argv)
    try:
        bench = prepared(given, begun)
    except DdimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    left = bench.deadline.seconds - END / 2 - bench.deadline.spent()
    watch = threading.Timer(max(0.0, left), cut_off, (bench,))
    watch.daemon = True
    if begun is not None:
        watch.start()
    run(bench, given.only)
    watch.cancel()
    print(report.text(bench.results()))
    print(f"written: {bench.out}" if bench.out else "written nowhere: a trial without --out")
    return 1 if bench.deadline.failed else 0
