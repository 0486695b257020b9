"""How far a sampler ends from the exact flow of Gaussian data, and how fast that falls with more steps."""

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

# Of the size of pictures in [-1, 1], with directions from wide to narrow.
DATA = GaussianData(mean=torch.tensor([0.0, 0.5, -0.5, 0.2]), variance=torch.tensor([1.0, 0.3, 0.1, 0.03]))
SAMPLES = 64
CLEAN = Level(0.0, math.inf)


def gaussian_error(plan: Plan) -> float:
    """Root mean square distance of a noiseless plan's end from the closed-form flow, x_0 not clipped."""
    clean = DATA.sample(SAMPLES, seed=0)
    start = DATA.flow(clean, CLEAN, plan.start)
    earlier = [DATA.flow(clean, CLEAN, level) for level in plan.before]
    reached = run(DATA.denoise, replace(plan, clip_x0=False), start, earlier=earlier)
    return float((reached - DATA.flow(clean, CLEAN, plan.end)).square().mean().sqrt())


def order(make: Callable[[Sequence[Level]], Plan], coarse: Sequence[Level], fine: Sequence[Level]) -> float:
    """By how many powers of 2 the error falls from one grid to the next, which has twice as many steps."""
    before, after = gaussian_error(make(coarse)), gaussian_error(make(fine))
    return math.log2(before / after) if before > 0 and after > 0 else math.nan


def refined(levels: Sequence[Level], parts: int) -> tuple[Level, ...]:
    """Levels with each step cut into so many equal rotations; no schedule is asked, so times are only about right."""
    out = [levels[0]]
    for now, following in itertools.pairwise(levels):
        for part in range(1, parts):
            weight = part / parts
            angle = (1 - weight) * now.angle + weight * following.angle
            out.append(Level((1 - weight) * now.t + weight * following.t, -2 * math.log(math.tan(angle))))
        out.append(following)
    return tuple(out)
