"""Measures the default start, sampler and clipping for networks that predict eps.

    python scripts/eps_defaults.py                # measures what docs/results/eps_defaults.json lacks
    python scripts/eps_defaults.py --report       # only prints the tables of docs/solvers.md

Two data sets with exact denoisers, whose outputs get a smooth error: `digits`, 300 of scikit-learn's 8x8 digits
(`ddim.exact.EmpiricalData`), and `modes`, four Gaussians in 16 dimensions one of them bright with a tenth of the
weight (`ddim.exact.MixtureData`). The Frechet distance (FD) is computed on the data values, in float64. An
interrupted run resumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddim
from ddim._io.atomic import write_atomic
from ddim.data.pixels import to_float
from ddim.evaluation.moments import Moments, frechet, of
from ddim.exact import EmpiricalData, MixtureData
from ddim.plan.plan import Plan
from ddim.process import schedule as schedules
from ddim.process.parameterization import Denoiser, Prediction, predict, v_from_pair
from ddim.process.schedule import Level, Schedule
from ddim.process.start import start_time
from ddim.samplers.registry import Planner
from ddim.samplers.settings import SamplerSettings
from ddim.sampling.loop import run

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "eps_defaults.json"
SCHEDULES = ("linear", "scaled-linear", "cosine", "sigmoid")
TIMES = (10, 50, 1000, 4000)
STEPS = (5, 10, 20, 50)
ERROR = 0.02
SAMPLERS = ("ddim", "ipndm3", "ipndm4", "unipc2", "unipc3", "dpm++2m")
GRIDS = ("equal-angle", "quadratic", "log-snr", "angle-log-snr")
RATIOS = (20.0, 40.0, 60.0, 100.0, 200.0, math.inf)
ERRORS = (0.0, 0.02, 0.05, 0.1, 0.2)


def schedule(name: str, T: int) -> Schedule:
    """A schedule of T steps that ends as noisy as the one of 1000: betas scaled by 1000 / T, at most 0.999."""
    if name == "cosine":
        return schedules.cosine(T)
    first, last = (0.00085, 0.012) if name == "scaled-linear" else (1e-4, 0.02)
    return schedules.NAMED[name](T, *(min(0.999, 1000 / T * beta) for beta in (first, last)))


class Bed:
    """Data with an exact denoiser, a smooth error direction, and the x_T shared by all plans."""

    def __init__(self, name: str):
        generator = torch.Generator().manual_seed(1)
        self.name, self.modes = name, None
        if name == "digits":
            images = to_float(torch.from_numpy(ddim.data.load("digits").batch(np.arange(300)))).flatten(1).double()
            data, d, self.n = EmpiricalData(images), 64, 400
            self.denoise: Denoiser = data.denoise
            self.real: Moments = of(images)
            self.floor = frechet(of(data.sample(self.n, 5).double()), self.real)
        else:
            d, self.n = (64, 1000) if name == "bright" else (16, 1000)
            others = 0.6 * torch.sign(torch.randn(3, d, generator=generator, dtype=torch.float64))
            means = torch.cat([torch.full((1, d), 0.7, dtype=torch.float64), others])
            weights = torch.tensor([0.1, 0.3, 0.3, 0.3], dtype=torch.float64)
            if name == "bright":
                means, weights = 0.6 * torch.tensor([[1.0], [-1.0]]).double().expand(2, d), weights[:1]
                weights = torch.cat([weights, 1 - weights])
            width = 0.12**2 * torch.eye(d, dtype=torch.float64).expand(len(means), d, d)
            mixture = MixtureData(weights, means, width)
            self.denoise, self.modes, self.weights = mixture.denoise, means, weights
            self.real = of(mixture.sample(20_000, 3))
            self.floor = frechet(of(mixture.sample(self.n, 5)), self.real)
        self.error = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
        self.start = ddim.Noise(0, tuple(range(self.n)), (d,)).start().double()

    def network(self, predicts: Any, error: float) -> Denoiser:
        """The exact denoiser with a smooth error in eps or v."""

        def denoise(x: Tensor, level: Level, /) -> Prediction:
            pair = self.denoise(x, level)
            exact = pair.eps if predicts == "eps" else v_from_pair(pair.x0, pair.eps, level)
            return predict(exact + error * torch.tanh(x @ self.error), x, level, predicts)

        return denoise

    def measure(self, plan: Plan, predicts: Any, error: float = ERROR) -> tuple[float, float]:
        """FD, and the largest error of a mode's share in standard errors."""
        x = run(self.network(predicts, error), plan, self.start)
        if not x.isfinite().all():
            return math.inf, math.inf
        if self.modes is None:
            return frechet(of(x), self.real), 0.0
        share = torch.bincount(torch.cdist(x, self.modes).argmin(1), minlength=len(self.modes)).double() / self.n
        off = (share - self.weights).abs() / (self.weights * (1 - self.weights) / self.n).sqrt()
        return frechet(of(x), self.real), float(off.max())


def cells() -> Iterator[tuple[str, int, int, str]]:
    """Schedule, T, S, and what the network predicts."""
    for steps, T, name, predicts in itertools.product(STEPS, TIMES, SCHEDULES, ("eps", "v")):
        if steps <= start_time(schedule(name, T), "eps"):
            yield name, T, steps, predicts


def defaults(bed: Bed, name: str, T: int, steps: int, predicts: Any) -> dict[str, Any]:
    """FD of the default plan, with and without clipping for eps, and of the best of all plans."""
    planner = Planner(schedule(name, T), predicts)
    default = planner.plan(SamplerSettings(steps=steps))
    plans = {default.name: default}
    for sampler, grid in itertools.product(SAMPLERS, GRIDS):
        plan = planner.plan(SamplerSettings(steps=steps, grid=grid, sampler=sampler))
        if plan.nfe == steps:
            plans[f"{sampler}/{grid}"] = plan
    distances = {label: bed.measure(plan, predicts)[0] for label, plan in plans.items() if plan is not default}
    best = min(distances, key=lambda label: distances[label])
    clip = predicts == "eps"
    fd, off = bed.measure(replace(default, clip_x0=clip), predicts)
    result = {"fd": fd, "off": off, "best": distances[best], "best_plan": best, "plan": default.name}
    return result | {"unclipped": bed.measure(default, predicts)[0] if clip else fd, "start": default.start.ratio}


def starts(bed: Bed, name: str, error: float) -> dict[str, Any]:
    """The default plan of 10 steps from several starts, with clipping and without."""
    levels, planner, results = schedule(name, 1000), Planner(schedule(name, 1000), "eps"), {}
    for ratio in RATIOS:
        top = 1 + int(np.argmin(np.abs(levels.log_snr / 2 + math.log(ratio)))) if math.isfinite(ratio) else 1000
        plan = planner.plan(SamplerSettings(steps=10, grid="angle-log-snr", top=top, sampler="unipc2"))
        measured = [bed.measure(replace(plan, clip_x0=clip), "eps", error) for clip in (False, True)]
        results[f"{ratio:g}"] = {"at": plan.start.ratio, "fd": [fd for fd, _ in measured]}
    return results


def bright(name: str, T: int, steps: int) -> dict[str, float]:
    """The share of bright samples of an exact network of eps, with the default plan, and with DDIM from 0.85 T."""
    bed, planner = Bed("bright"), Planner(schedule(name, T), "eps")
    assert bed.modes is not None
    plans = {
        "default": planner.plan(SamplerSettings(steps=steps)),
        "0.85 T": planner.plan(SamplerSettings(steps=steps, grid="equal-angle", top=round(0.85 * T), sampler="ddim")),
    }
    return {
        label: float((run(bed.network("eps", 0.0), plan, bed.start).mean(1) > 0).double().mean())
        for label, plan in plans.items()
    }


def measure(results: dict[str, Any]) -> None:
    """Measure what is missing."""
    beds = {name: Bed(name) for name in ("digits", "modes")}
    results["floor"] = {name: bed.floor for name, bed in beds.items()}
    jobs: list[tuple[str, Callable[[], Any]]] = []
    for bed, name, error in itertools.product(beds.values(), ("linear", "cosine"), ERRORS):
        jobs.append((f"start {bed.name} {name} {error:g}", lambda b=bed, n=name, e=error: starts(b, n, e)))
    for name, steps in itertools.product(SCHEDULES, (10, 20, 50)):
        jobs.append((f"bright {name} 1000 {steps}", lambda n=name, s=steps: bright(n, 1000, s)))
    for (name, T, steps, predicts), bed in itertools.product(cells(), beds.values()):
        key = f"{bed.name} {predicts} {steps} {name} {T}"
        jobs.append((key, lambda b=bed, c=(name, T, steps, predicts): defaults(b, *c)))
    for key, job in jobs:
        if key not in results:
            results[key] = job()
            print(key, results[key], flush=True)
            write_atomic(RESULTS, (json.dumps(results, indent=1) + "\n").encode(), sync=False)


def report(results: dict[str, Any]) -> Iterator[str]:
    """The tables of docs/solvers.md."""
    for bed in ("digits", "modes"):
        floor = results["floor"][bed]
        yield f"\nFD of the default / of the best plan, `{bed}` (equally many true samples: {floor:.2g}):\n"
        yield "| schedule | T | " + " | ".join(f"{p} S={s}" for p in ("eps", "v") for s in STEPS) + " |"
        yield "|-|-|" + "-|" * 2 * len(STEPS)
        for name, T in itertools.product(SCHEDULES, TIMES):
            line = []
            for predicts, steps in itertools.product(("eps", "v"), STEPS):
                cell = results.get(f"{bed} {predicts} {steps} {name} {T}")
                line.append("-" if cell is None else _cell(cell, floor))
            yield f"| {name} | {T} | " + " | ".join(line) + " |"
    yield "\nStarts and clipping, 10 steps, FD without / with clipping (cosine):\n"
    yield "| data | error in eps | " + " | ".join(f"from {r:g}" if r < math.inf else "from T" for r in RATIOS) + " |"
    yield "|-|-|" + "-|" * len(RATIOS)
    for bed, error in itertools.product(("digits", "modes"), ERRORS):
        row = results[f"start {bed} cosine {error:g}"]
        shown = [" / ".join(f"{fd:.2g}" for fd in row[f"{ratio:g}"]["fd"]) for ratio in RATIOS]
        yield f"| {bed} | {error:.0%} | " + " | ".join(shown) + " |"
    yield "\nBright samples in percent, exact network (correct: 10, standard error 0.95):\n"
    yield (
        "| schedule, T = 1000 | "
        + " | ".join(f"{w}, S={s}" for w in ("default", "0.85 T") for s in (10, 20, 50))
        + " |"
    )
    yield "|-|" + "-|" * 6
    for name in SCHEDULES:
        shares = [100 * results[f"bright {name} 1000 {s}"][w] for w in ("default", "0.85 T") for s in (10, 20, 50)]
        yield f"| {name} | " + " | ".join(f"{share:.1f}" for share in shares) + " |"
    every = [cell for key, cell in results.items() if key.split()[0] in ("digits", "modes")]
    most = max((cell["off"] for cell in every), default=0.0)
    yield f"\nLargest difference of a mode's share from its weight with the default: {most:.1f} standard errors."


def _cell(cell: dict[str, Any], floor: float) -> str:
    """Default / best; a star if it exceeds both 1.5 times the best and the FD of true samples."""
    star = "" if cell["fd"] <= max(1.5 * cell["best"], floor) else " *"
    return f"{cell['fd']:.2g} / {cell['best']:.2g}{star}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="Only print the tables of what is measured.")
    only = parser.parse_args().report
    warnings.simplefilter("ignore", ddim.DdimWarning)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not only:
        measure(results)
    print("\n".join(report(results)))


if __name__ == "__main__":
    main()
