"""Error of a sampler against the exact flow of Gaussian data, and its order of convergence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ddim.exact import GaussianData
from ddim.plan.plan import Plan
from ddim.process.schedule import Level
from ddim.sampling.loop import run

# On the scale of images in [-1, 1], with variances from wide to narrow.
DATA = GaussianData(mean=torch.tensor([0.0, 0.5, -0.5, 0.2]), variance=torch.tensor([1.0, 0.3, 0.1, 0.03]))
SAMPLES = 64
CLEAN = Level(0.0, math.inf)


def gaussian_error(plan: Plan) -> float:
    """RMS distance between the final state of a noiseless plan and the closed-form flow; x_0 is not clipped."""
    clean = DATA.sample(SAMPLES, seed=0)
    start = DATA.flow(clean, CLEAN, plan.start)
    earlier = [DATA.flow(clean, CLEAN, level) for level in plan.before]
    reached = run(DATA.denoise, replace(plan, clip_x0=False), start, earlier=earlier)
    return float((reached - DATA.flow(clean, CLEAN, plan.end)).square().mean().sqrt())


def order(make: Callable[[Sequence[Level]], Plan], coarse: Sequence[Level], fine: Sequence[Level]) -> float:
    """Order of convergence: log2 of the error ratio between `coarse` and `fine`, which has twice as many steps."""
    before, after = gaussian_error(make(coarse)), gaussian_error(make(fine))
    return math.log2(before / after) if before > 0 and after > 0 else math.nan


def refined(levels: Sequence[Level], parts: int) -> tuple[Level, ...]:
    """Split each step into `parts` equal rotations. Times are interpolated without a schedule and only approximate."""
    out = [levels[0]]
    for now, following in itertools.pairwise(levels):
        for part in range(1, parts):
            weight = part / parts
            angle = (1 - weight) * now.angle + weight * following.angle
            out.append(Level((1 - weight) * now.t + weight * following.t, -2 * math.log(math.tan(angle))))
        out.append(following)
    return tuple(out)
