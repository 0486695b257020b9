"""Sampling throughput of cells: a batch size, a number of steps, and the variants compared in alternating runs.

Not all batch sizes, numbers of steps and variants fit into a few minutes, and not all are needed: a step's time
does not depend on S, so that S = 10 and 50 also give the cost of a run's start. Most time goes to torch.compile,
about a minute per batch size and library. The first cells, of batch 512 and 1, therefore compile nothing; the next
compile diffusers' best setting for these two sizes; then follow batch 64, our compiled variants, and the rest. A batch
size and S may occur in several rows, each measured separately.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.variants import (
    AGAINST_BEST,
    ALL,
    BEST,
    COMPILED,
    DEFAULT,
    FAST,
    GRAPHS,
    OURS_PLAIN,
    RATIOS,
    UNCOMPILED,
    WARM,
    Runner,
    Variant,
    runner,
)
from benchmarks.measuring import turns

BUILD = 4.0  # seconds to set up a variant, without its first steps
OVERHEAD = 0.02  # smallest assumed seconds per step before any was measured
SHARE = 0.05  # assumed fraction of the bfloat16 ceiling before any was measured
UNKNOWN = 1e14  # assumed ceiling in FLOP/s if it was not measured


RECORDING = 2  # cost of recording a plan's CUDA graph, in runs
SUFFIXES = {UNCOMPILED: ", not compiled", AGAINST_BEST: ", against diffusers' best", COMPILED: ", ours compiled"}


@dataclass(frozen=True)
class Cell:
    """Variants compared in alternating runs.

    Args:
        batch: Number of images.
        steps: S.
        rounds: Number of measured rounds.
        variants: The variants, in order of importance.
        warm: Number of warm-up rounds.
    """

    batch: int
    steps: int
    rounds: int
    variants: tuple[Variant, ...]
    warm: int = 0

    @property
    def name(self) -> str:
        """Display name."""
        return f"batch {self.batch}, S={self.steps}" + SUFFIXES.get(self.variants, "")


def cells(batches: Sequence[int], steps: Sequence[int]) -> dict[str, tuple[Cell, ...]]:
    """All cells in order of importance, in groups between which the other parts of the benchmark run."""
    one, few, many, most = batches
    s10, s20, s50, s100 = steps
    return {
        "first": (
            *(Cell(n, s, rounds, UNCOMPILED, 1) for n, rounds in ((many, 3), (one, 5)) for s in (s10, s50)),
            *(Cell(n, s, rounds, AGAINST_BEST, 1) for n, rounds in ((many, 3), (one, 10)) for s in (s50, s10)),
        ),
        "middle": (
            *(Cell(few, s, 5, UNCOMPILED, 1) for s in (s10, s50)),
            *(Cell(few, s, 5, AGAINST_BEST, 1) for s in (s50, s10)),
        ),
        "compiled": (
            Cell(many, s50, 3, COMPILED, 1),
            Cell(many, s10, 3, COMPILED, 1),
            Cell(one, s50, 10, (*COMPILED, OURS_PLAIN), 1),
        ),
        "latency": (
            Cell(one, s50, 10, (*GRAPHS, BEST, DEFAULT), 1),
            *(Cell(one, s, 5, ALL, 1) for s in (s10, s20, s100)),
        ),
        "last": (
            *(Cell(few, s, 5, ALL, 1) for s in (s50, s10, s20, s100)),
            Cell(most, s10, 3, ALL),
            Cell(many, s50, 3, ALL),
            Cell(many, s10, 3, ALL),
            Cell(many, s100, 3, FAST),
            Cell(most, s50, 3, FAST),
            Cell(many, s20, 3, FAST),
        ),
    }


def unplanned(planned: Mapping[str, Sequence[Cell]], batches: Sequence[int], steps: Sequence[int]) -> list[str]:
    """The combinations of batch size, steps and variants that are not planned."""
    all_cells = [cell for group in planned.values() for cell in group]
    planned_cells = {(cell.batch, cell.steps, variant) for cell in all_cells for variant in cell.variants}
    missing = []
    for n in batches:
        for s in steps:
            names = [variant.name for variant in ALL if (n, s, variant) not in planned_cells]
            if names:
                missing.append(f"batch {n}, S={s}: {'; '.join(names) if len(names) < len(ALL) else 'all'}")
    return missing


class Sampling:
    """Runs cells, and predicts the cost of each from earlier ones.

    Args:
        bench: The benchmark.
    """

    def __init__(self, bench: Bench):
        self.bench = bench
        self.runners: dict[tuple[Variant, int], Runner] = {}
        self.skipped: set[tuple[Variant, int]] = set()
        self.pace: dict[tuple[Variant, int], float] = {}  # seconds per step

    def guess(self, variant: Variant, n: int) -> float:
        """Expected seconds per step at batch n: measured, scaled from another batch, or estimated from the ceiling."""
        if (variant, n) in self.pace:
            return self.pace[variant, n]
        scaled = [pace * max(1.0, n / batch) for (other, batch), pace in self.pace.items() if other == variant]
        if scaled:
            return min(scaled)
        return max(OVERHEAD, n * self.bench.flops / (SHARE * (self.bench.ceiling or UNKNOWN)))

    def ready(self, variant: Variant, n: int) -> Runner | None:
        """A variant set up at batch n, after its first run; None if that did not fit."""
        key = (variant, n)
        if key not in self.runners and key not in self.skipped:
            cost = BUILD + 2 * WARM * self.guess(variant, n)
            if variant.compiled and not self.set_up(variant, n):
                cost += self.bench.compile_cost("inference")
            what = f"{variant.name}, batch {n} (setting up)"
            result = self.bench.deadline.attempt(what, cost, lambda: self._start(variant, n))
            if result is None:
                self.skipped.add(key)
                self.bench.free()
            else:
                self.runners[key] = result
        return self.runners.get(key)

    def set_up(self, variant: Variant, n: int) -> bool:
        """Whether the variant's network has run at batch n, in any variant."""
        return any(other.network == variant.network and batch == n for other, batch in self.runners)

    def _start(self, variant: Variant, n: int) -> Runner:
        result = runner(variant, n, self.bench)
        job = result.draw(WARM)
        first, second = self.bench.once(job), self.bench.once(job)
        self.pace[variant, n] = second / WARM
        if variant.compiled and not self.set_up(variant, n):
            self.bench.compiled["inference"] = max(first, self.bench.compiled.get("inference", 0.0))
        row = {"variant": variant.name, "batch": n, "first run (s)": first, f"{WARM} steps after it (s)": second}
        self.bench.add("start-up", row)
        return result

    def rounds(self, cell: Cell) -> int:
        """Number of measured rounds."""
        return min(cell.rounds, self.bench.sizes.rounds)

    def cell(self, cell: Cell) -> None:
        """Measure a cell: those of its variants that fit."""
        jobs, total = {}, 0.0
        ready = {variant: self.ready(variant, cell.batch) for variant in cell.variants}
        if missing := [variant.name for variant, prepared in ready.items() if prepared is None]:
            self.bench.deadline.leave(f"{cell.name}: {'; '.join(missing)}", "not set up at this batch size")
        for variant, prepared in ready.items():
            if prepared is None:
                continue
            runs = self.rounds(cell) + cell.warm + (RECORDING if variant.plan else 0)
            cost = runs * cell.steps * self.guess(variant, cell.batch)
            if self.bench.deadline.fits(f"{cell.name}: {variant.name}", total + cost):
                jobs[variant.name] = self.bench.synced(prepared.draw(cell.steps))
                total += cost
        if not jobs:
            return
        self.bench.sync()
        self._record(cell, turns(jobs, self.rounds(cell), cell.warm))

    def _record(self, cell: Cell, times: Mapping[str, Sequence[float]]) -> None:
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        for variant in cell.variants:
            if variant.name in median:
                self.pace[variant, cell.batch] = median[variant.name] / cell.steps
        spread = {name: (max(seconds) - min(seconds)) / median[name] for name, seconds in times.items()}
        row: dict[str, Any] = {"batch": cell.batch, "S": cell.steps, "rounds": self.rounds(cell)}
        row |= {f"{name} (img/s)": cell.batch / seconds for name, seconds in median.items()}
        row |= {f"spread of {name}": value for name, value in spread.items()}
        self.bench.add("sampling", row)
        ratios = {f"{a.name} / {b.name}": median[b.name] / median[a.name] for a, b in pairs(median)}
        if ratios:
            self.bench.add("ratios", {"batch": cell.batch, "S": cell.steps, **ratios})
        if cell.batch == 1 and cell.steps == self.bench.sizes.steps[2]:
            listed = {row["variant"] for row in self.bench.rows.get("latency", [])}
            for name in (name for name in median if name not in listed):
                row = {"variant": name, "S": cell.steps, "ms": 1e3 * median[name], "spread": spread[name]}
                self.bench.add("latency", row)


def pairs(median: Mapping[str, float]) -> list[tuple[Variant, Variant]]:
    """The pairs of `RATIOS` that were both measured."""
    return [(a, b) for a, b in RATIOS if a.name in median and b.name in median]
