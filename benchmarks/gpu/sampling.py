"""Sampling throughput, cell by cell: a batch size, a number of steps, and the variants that are compared by turns.

All of 4 batch sizes, 4 numbers of steps and all variants do not fit into a few minutes, and need not: a step's time
does not depend on how many there are, so S = 10 and 50 tell what the start of a run costs. torch.compile is what takes
long: every batch size is compiled anew, at about a minute for each side. So the first cells, of batch 512 and 1,
compile nothing; the next compile diffusers' best setting for these two sizes; batch 64 comes after, then what of ours
is compiled, and the rest last. So a batch and number of steps may stand in several rows, each by turns of its own.
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

BUILD = 4.0  # seconds to set a variant up, beside its first steps
OVERHEAD = 0.02  # seconds of a step at the least, before any was measured
SHARE = 0.05  # of the ceiling of bfloat16 products, reached in a network evaluation, before any was measured
UNKNOWN = 1e14  # that ceiling in FLOP/s, if it was not measured either


RECORDING = 2  # runs of a plan that recording its CUDA graph takes
KINDS = {UNCOMPILED: ", not compiled", AGAINST_BEST: ", against diffusers' best", COMPILED: ", ours compiled"}


@dataclass(frozen=True)
class Cell:
    """What is compared by turns.

    Args:
        batch: Pictures.
        steps: S.
        rounds: Rounds that count.
        variants: Which, in order of importance.
        warm: Rounds before them that do not.
    """

    batch: int
    steps: int
    rounds: int
    variants: tuple[Variant, ...]
    warm: int = 0

    @property
    def name(self) -> str:
        """As it is listed."""
        return f"batch {self.batch}, S={self.steps}" + KINDS.get(self.variants, "")


def cells(batches: Sequence[int], steps: Sequence[int]) -> dict[str, tuple[Cell, ...]]:
    """All cells, in order of importance, in groups between which the other parts of the benchmark stand."""
    one, some, many, most = batches
    s10, s20, s50, s100 = steps
    return {
        "first": (
            *(Cell(n, s, rounds, UNCOMPILED, 1) for n, rounds in ((many, 3), (one, 5)) for s in (s10, s50)),
            *(Cell(n, s, rounds, AGAINST_BEST, 1) for n, rounds in ((many, 3), (one, 10)) for s in (s50, s10)),
        ),
        "middle": (
            *(Cell(some, s, 5, UNCOMPILED, 1) for s in (s10, s50)),
            *(Cell(some, s, 5, AGAINST_BEST, 1) for s in (s50, s10)),
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
            *(Cell(some, s, 5, ALL, 1) for s in (s50, s10, s20, s100)),
            Cell(most, s10, 3, ALL),
            Cell(many, s50, 3, ALL),
            Cell(many, s10, 3, ALL),
            Cell(many, s100, 3, FAST),
            Cell(most, s50, 3, FAST),
            Cell(many, s20, 3, FAST),
        ),
    }


def unplanned(planned: Mapping[str, Sequence[Cell]], batches: Sequence[int], steps: Sequence[int]) -> list[str]:
    """What the plan itself leaves out of all batches, steps and variants."""
    all_cells = [cell for group in planned.values() for cell in group]
    there = {(cell.batch, cell.steps, variant) for cell in all_cells for variant in cell.variants}
    missing = []
    for n in batches:
        for s in steps:
            names = [variant.name for variant in ALL if (n, s, variant) not in there]
            if names:
                missing.append(f"batch {n}, S={s}: {'; '.join(names) if len(names) < len(ALL) else 'all'}")
    return missing


class Sampling:
    """Runs cells; knows what each variant took so far.

    Args:
        bench: The run.
    """

    def __init__(self, bench: Bench):
        self.bench = bench
        self.runners: dict[tuple[Variant, int], Runner] = {}
        self.refused: set[tuple[Variant, int]] = set()
        self.pace: dict[tuple[Variant, int], float] = {}  # seconds a step

    def guess(self, variant: Variant, n: int) -> float:
        """Seconds of a step at batch n: as measured, else scaled from another batch, else from the ceiling."""
        if (variant, n) in self.pace:
            return self.pace[variant, n]
        known = [pace * max(1.0, n / batch) for (other, batch), pace in self.pace.items() if other == variant]
        if known:
            return min(known)
        return max(OVERHEAD, n * self.bench.flops / (SHARE * (self.bench.ceiling or UNKNOWN)))

    def ready(self, variant: Variant, n: int) -> Runner | None:
        """A variant set up at batch n, its first run behind it; None if that did not fit."""
        place = (variant, n)
        if place not in self.runners and place not in self.refused:
            cost = BUILD + 2 * WARM * self.guess(variant, n)
            if variant.compiled and not self.set_up(variant, n):
                cost += self.bench.compile_cost("inference")
            what = f"{variant.name}, batch {n} (setting up)"
            made = self.bench.deadline.attempt(what, cost, lambda: self._start(variant, n))
            if made is None:
                self.refused.add(place)
                self.bench.free()
            else:
                self.runners[place] = made
        return self.runners.get(place)

    def set_up(self, variant: Variant, n: int) -> bool:
        """Whether the variant's network has run at batch n, in this variant or another."""
        return any(known.network == variant.network and batch == n for known, batch in self.runners)

    def _start(self, variant: Variant, n: int) -> Runner:
        made = runner(variant, n, self.bench)
        job = made.draw(WARM)
        first, second = self.bench.once(job), self.bench.once(job)
        self.pace[variant, n] = second / WARM
        if variant.compiled and not self.set_up(variant, n):
            self.bench.compiled["inference"] = max(first, self.bench.compiled.get("inference", 0.0))
        row = {"variant": variant.name, "batch": n, "first run (s)": first, f"{WARM} steps after it (s)": second}
        self.bench.add("start-up", row)
        return made

    def rounds(self, cell: Cell) -> int:
        """Rounds that count."""
        return min(cell.rounds, self.bench.sizes.rounds)

    def cell(self, cell: Cell) -> None:
        """Measure a cell: as many of its variants as fit."""
        jobs, total = {}, 0.0
        ready = {variant: self.ready(variant, cell.batch) for variant in cell.variants}
        if missing := [variant.name for variant, made in ready.items() if made is None]:
            self.bench.deadline.leave(f"{cell.name}: {'; '.join(missing)}", "not set up at this batch size")
        for variant, made in ready.items():
            if made is None:
                continue
            runs = self.rounds(cell) + cell.warm + (RECORDING if variant.plan else 0)
            cost = runs * cell.steps * self.guess(variant, cell.batch)
            if self.bench.deadline.fits(f"{cell.name}: {variant.name}", total + cost):
                jobs[variant.name] = self.bench.synced(made.draw(cell.steps))
                total += cost
        if not jobs:
            return
        self.bench.sync()
        self._keep(cell, turns(jobs, self.rounds(cell), cell.warm))

    def _keep(self, cell: Cell, times: Mapping[str, Sequence[float]]) -> None:
        median = {name: statistics.median(some) for name, some in times.items()}
        for variant in cell.variants:
            if variant.name in median:
                self.pace[variant, cell.batch] = median[variant.name] / cell.steps
        spread = {name: (max(some) - min(some)) / median[name] for name, some in times.items()}
        row: dict[str, Any] = {"batch": cell.batch, "S": cell.steps, "rounds": self.rounds(cell)}
        row |= {f"{name} (img/s)": cell.batch / seconds for name, seconds in median.items()}
        row |= {f"spread of {name}": value for name, value in spread.items()}
        self.bench.add("sampling", row)
        ratios = {f"{a.name} / {b.name}": median[b.name] / median[a.name] for a, b in pairs(median)}
        if ratios:
            self.bench.add("ratios", {"batch": cell.batch, "S": cell.steps, **ratios})
        if cell.batch == 1 and cell.steps == self.bench.sizes.steps[2]:
            known = {row["variant"] for row in self.bench.rows.get("latency", [])}
            for name in (name for name in median if name not in known):
                row = {"variant": name, "S": cell.steps, "ms": 1e3 * median[name], "spread": spread[name]}
                self.bench.add("latency", row)


def pairs(known: Mapping[str, float]) -> list[tuple[Variant, Variant]]:
    """Those of `RATIOS` of which both are known."""
    return [(a, b) for a, b in RATIOS if a.name in known and b.name in known]
