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
    """A part of the run; `seconds` is its cost without what it predicts itself."""

    name: str
    seconds: float
    job: Callable[[], None]


def tasks(bench: Bench, only: Sequence[str] = PARTS) -> list[Task]:
    """The parts of the run, in order of importance."""
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
    """Run all parts that fit, and write the results after each."""
    leave, sizes = bench.deadline.leave, bench.sizes
    if "sampling" in only:
        for what in unplanned(cells(sizes.batches, sizes.steps), sizes.batches, sizes.steps):
            leave(f"sampling, {what}", "not planned, since the time per step does not depend on S")
    for part in PARTS:
        if part not in only:
            leave(part, "not requested")
    planned = tasks(bench, only)
    bench.todo = [task.name for task in planned]
    # One static graph per batch size: otherwise the second size would compile a dynamic one. The default limit of 8
    # graphs per function, after which torch falls back to eager, is too small here.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        for task in planned:
            bench.deadline.attempt(task.name, task.seconds, task.job)
            bench.todo.pop(0)
            bench.free()
            bench.write()
    bench.clocks["after"] = bench.smi()
    bench.write()


def cut_off(bench: Bench) -> None:
    """End the process in a part that takes longer than predicted, after writing the results so far."""
    try:
        for what in bench.todo:
            bench.deadline.leave(what, "cut off, or not started, when the time was over")
        bench.write()
        print(report.text(bench.results()), flush=True)
    finally:
        os._exit(1)  # an exception would not stop a compiler or kernel that hangs


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Speed on one GPU.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the process")
    parser.add_argument("--out", type=Path, help="results file; default benchmarks/results/gpu.json, none with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: try the code without measuring")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--commit", help="the commit that is measured, for a copy without git")
    return parser.parse_args(argv)


def prepare(options: argparse.Namespace, started: float | None) -> Bench:
    """Set up the run.

    Raises:
        DdimError: If an argument is invalid.
    """
    if not 0 < options.minutes <= 1440:
        raise DdimError(f"--minutes {options.minutes:g}", "is outside 0..1440", "use --minutes 8")
    out = options.out or (None if options.tiny else RESULTS / "gpu.json")
    if out is not None and not out.parent.is_dir():
        raise DdimError(out.parent, "is not a folder", "create it, or use another --out")
    return Bench(options.device, options.tiny, Deadline(options.minutes * 60, started=started), out, options.commit)


def main(argv: Sequence[str] | None = None, started: float | None = None) -> int:
    """Run the benchmark; returns 0 if no part failed, otherwise 1.

    Args:
        argv: The command line.
        started: Start of the time limit on the clock time.monotonic, at which the process is ended. None to start
            now and wait for the last part.
    """
    options = arguments(argv)
    try:
        bench = prepare(options, started)
    except DdimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    left = bench.deadline.seconds - END / 2 - bench.deadline.spent()
    watch = threading.Timer(max(0.0, left), cut_off, (bench,))
    watch.daemon = True
    if started is not None:
        watch.start()
    run(bench, options.only)
    watch.cancel()
    print(report.text(bench.results()))
    print(f"written: {bench.out}" if bench.out else "not written: --tiny without --out")
    return 1 if bench.deadline.failed else 0
