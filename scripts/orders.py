"""Measures the solvers' orders of convergence on a mixture with an exact denoiser.

    python scripts/orders.py

Writes docs/results/orders.json and prints the table, in about a minute. The plans go from t = 600 to t = 50 of the
linear schedule, in S steps of equal ratios of noise / signal; a Runge-Kutta step of order p takes p evaluations. The
first step is halved ten times towards its start, which adds ten steps, so that the lower order of a multistep plan's
first steps does not matter. The last column shows their effect: the order in encoding, from t = 50, with an ordinary
first step. The two-state plans use equal rotations without halving; they are not run in reverse.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim import samplers
from ddim._io.atomic import write_atomic
from ddim.exact import MixtureData
from ddim.plan.plan import Plan
from ddim.process import schedule
from ddim.process.schedule import Level
from ddim.sampling.loop import run

DOCS = Path(__file__).resolve().parents[1] / "docs"
STEPS = (50, 100, 200, 400, 800)
TOP, BOTTOM, HALVES, SAMPLES = 600, 50, 10, 4
LINEAR = schedule.linear()
Sampler = Callable[[Sequence[Level]], Plan]

# Name, declared order, sampler.
SAMPLERS: tuple[tuple[str, int, Sampler], ...] = (
    ("ddim", 1, samplers.ddim),
    ("probability_flow", 1, samplers.probability_flow),
    ("runge_kutta 2", 2, partial(samplers.runge_kutta, schedule=LINEAR, order=2)),
    ("runge_kutta 4", 4, partial(samplers.runge_kutta, schedule=LINEAR, order=4)),
    *(
        (f"adams_bashforth {order} {what}", order, partial(samplers.adams_bashforth, order=order, quantity=what))
        for what in ("eps", "v", "x0")
        for order in (2, 3, 4)
    ),
    *((f"deis {order}", order, partial(samplers.deis, order=order)) for order in (2, 3, 4)),
    *((f"dpm_solver_pp {order}", order, partial(samplers.dpm_solver_pp, order=order)) for order in (2, 3)),
    *((f"unipc {order}", order + 1, partial(samplers.unipc, order=order)) for order in (2, 3)),
    *((f"ipndm {order}", 2, partial(samplers.ipndm, order=order)) for order in (2, 3, 4)),
)
TWO_STEP: tuple[tuple[str, int, Sampler], ...] = (
    ("bdia gamma=1", 2, partial(samplers.bdia, gamma=1.0)),
    ("o_belm", 2, samplers.o_belm),
)


def mixture(components: int = 5, dimensions: int = 3) -> MixtureData:
    """Components several standard deviations apart, with covariances of different size and direction."""
    size = (components, dimensions, dimensions + 1)
    drawn = np.random.Generator(np.random.Philox(key=[11, 12])).standard_normal(size)
    shape, means = torch.from_numpy(drawn[..., :-1].copy()), torch.from_numpy(drawn[..., -1].copy())
    width = 0.05 + 0.1 * torch.arange(components, dtype=torch.float64)[:, None, None] / components
    covariances = width**2 * (shape @ shape.mT + 0.3 * torch.eye(dimensions, dtype=torch.float64))
    weights = torch.arange(1, components + 1, dtype=torch.float64)
    return MixtureData(weights / weights.sum(), means, covariances)


DATA = mixture()


def equal_ratios(steps: int) -> list[Level]:
    """Levels from TOP down to BOTTOM, with the same factor of noise / signal at each step."""
    first, last = LINEAR.level(TOP).log_snr, LINEAR.level(BOTTOM).log_snr
    inner = [LINEAR.time_at_log_snr(first + (last - first) * k / steps) for k in range(1, steps)]
    return [*LINEAR.levels([TOP, *inner, BOTTOM])]


def equal_angles(steps: int) -> list[Level]:
    """Levels from TOP down to BOTTOM in equal rotations."""
    first, last = LINEAR.level(TOP).angle, LINEAR.level(BOTTOM).angle
    inner = [LINEAR.time_at_angle(first + (last - first) * k / steps) for k in range(1, steps)]
    return [*LINEAR.levels([TOP, *inner, BOTTOM])]


def eased_in(levels: list[Level]) -> list[Level]:
    """The levels with the first step halved towards its start."""
    first, last = levels[0].log_snr, levels[1].log_snr
    times = [LINEAR.time_at_log_snr(first + (last - first) / 2**part) for part in range(HALVES, 0, -1)]
    return [levels[0], *LINEAR.levels(times), *levels[1:]]


def errors(make: Sampler, grids: Sequence[Sequence[Level]], start: Tensor, end: Tensor) -> list[float]:
    """The largest error of a coordinate of a sample, for each list of levels."""
    return [float((run(DATA.denoise, make(levels), start) - end).abs().max()) for levels in grids]


def orders(errors: Sequence[float]) -> list[float]:
    """Orders of convergence: log2 of the ratios of successive errors."""
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def main() -> None:
    top, bottom = LINEAR.level(TOP), LINEAR.level(BOTTOM)
    noisy = DATA.reference(DATA.sample(SAMPLES, seed=0), LINEAR.level(0), top, 1000)
    clean = DATA.reference(noisy, top, bottom, 1000)
    eased = [eased_in(equal_ratios(steps)) for steps in STEPS]
    plain = [equal_ratios(steps)[::-1] for steps in STEPS[-2:]]
    turns = [equal_angles(steps) for steps in STEPS]
    rows: list[dict[str, Any]] = []
    for name, order, make in SAMPLERS:
        sizes, [back] = errors(make, eased, noisy, clean), orders(errors(make, plain, clean, noisy))
        rows.append({"sampler": name, "order": order, "errors": sizes, "observed": orders(sizes), "encoding": back})
    for name, order, make in TWO_STEP:
        sizes = errors(make, turns, noisy, clean)
        rows.append({"sampler": name, "order": order, "errors": sizes, "observed": orders(sizes)})
    body = {
        "command": "python scripts/orders.py",
        "data": "mixture of 5 Gaussians in 3 dimensions, exact denoiser, float64",
        "schedule": "linear",
        "times": [TOP, BOTTOM],
        "steps": STEPS,
        "error": f"largest of a coordinate of {SAMPLES} samples, against the ODE solved to about 1e-11",
        "rows": rows,
    }
    write_atomic(DOCS / "results" / "orders.json", (json.dumps(body, indent=1) + "\n").encode())
    print(f"| sampler | order | {' | '.join(f'S = {steps}' for steps in STEPS)} | observed | plain, encoding |")
    print("|-" * (len(STEPS) + 4) + "|")
    for row in rows:
        sizes = " | ".join(f"{error:.1e}" for error in row["errors"])
        seen = ", ".join(f"{value:.2f}" for value in row["observed"])
        back = f"{row['encoding']:.2f}" if "encoding" in row else "-"
        print(f"| {row['sampler']} | {row['order']} | {sizes} | {seen} | {back} |")


if __name__ == "__main__":
    main()
