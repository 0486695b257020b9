"""Fitting a plan's weights to a reference solution of the same samples with many network evaluations."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.parameterization import Denoiser, Prediction
from ddim.process.schedule import Level, Schedule
from ddim.samplers import ddim, unipc
from ddim.sampling.loop import Step, trajectory

NODES = 60  # levels of the reference solution
MEMORY = 3  # predictions that a fitted row combines
RIDGE = 1e-6  # relative to columns of unit norm


class CachedDenoiser:
    """A denoiser evaluated in batches, with a cache: plans that share their first rows evaluate those only once.

    Args:
        denoiser: The denoiser.
        size: Samples per batch.
        cache_bytes: Size of the cache in bytes; the least recently used predictions are evicted first.
    """

    def __init__(self, denoiser: Denoiser, size: int, cache_bytes: int = 2**29):
        self.denoiser, self.size, self.cache_bytes = denoiser, size, cache_bytes
        self.cache: OrderedDict[tuple[float, float, bytes], Prediction] = OrderedDict()

    def __call__(self, x: Tensor, level: Level, /) -> Prediction:
        """The prediction, computed or from the cache."""
        key = (level.t, level.log_snr, hashlib.blake2b(x.cpu().numpy().tobytes(), digest_size=16).digest())
        if key not in self.cache:
            parts = [self.denoiser(part, level) for part in torch.split(x, self.size)]
            pair = (torch.cat([part.x0 for part in parts]), torch.cat([part.eps for part in parts]))
            self.cache[key] = Prediction(*pair)
        self.cache.move_to_end(key)
        while len(self.cache) > 1 and len(self.cache) * 2 * x.nbytes > self.cache_bytes:
            self.cache.popitem(last=False)
        return self.cache[key]


class ReferenceSolution:
    """Calibration samples solved with many network evaluations, and their states at any level.

    Args:
        schedule: The schedule.
        nodes: Network evaluations.
        top: The first time; T if None.
    """

    def __init__(self, schedule: Schedule, nodes: int = NODES, top: int | None = None):
        last = schedule.T if top is None else top
        bottom, noisiest = schedule.level(1), schedule.level(last)
        finite = noisiest if math.isfinite(noisiest.log_snr) else schedule.level(last - 1)
        even = np.linspace(finite.log_snr, bottom.log_snr, nodes - (finite is not noisiest))
        inner = [schedule.time_at_log_snr(float(value)) for value in even[1:-1]]
        first = [noisiest.t] if finite is noisiest else [noisiest.t, finite.t]
        self.levels = schedule.levels([*first, *inner, 1.0, 0.0])
        self.plan = unipc(self.levels, 3)
        self.steps: list[Step[Row]] = []

    def solve(self, denoise: Denoiser, start: Tensor, path: bool = True) -> Iterator[Step[Row]]:
        """Solve the calibration samples and yield each step; without `path` only the last step is stored."""
        self.start = start
        self.steps = []
        for step in trajectory(denoise, self.plan, start):
            if not path:
                self.steps.clear()
            self.steps.append(step)
            yield step

    @property
    def states(self) -> list[Tensor]:
        """The state at each of `levels`."""
        return [self.start, *(step.x for step in self.steps)]

    @property
    def end(self) -> Tensor:
        """The state at t = 0."""
        return self.steps[-1].x

    def at(self, level: Level) -> Tensor:
        """The state at a level, by cubic interpolation in the log-SNR of the four nearest states."""
        if level.t == 0:
            return self.end
        points = [(node.log_snr, state) for node, state in zip(self.levels, self.states, strict=True)]
        points = [(value, state) for value, state in points if math.isfinite(value)]
        first = int(np.searchsorted([value for value, _ in points], level.log_snr)) - 2
        near = points[min(max(first, 0), len(points) - 4) :][:4]
        out = torch.zeros_like(self.start)
        for value, state in near:
            others = [other for other, _ in near if other != value]
            out += state * math.prod((level.log_snr - other) / (value - other) for other in others)
        return out


def fitted(
    denoise: Denoiser, levels: Sequence[Level], start: Tensor, target: Callable[[Level], Tensor], memory: int = MEMORY
) -> Plan:
    """A plan whose weights are fitted by least squares to target states.

    Multiples of eps_j - eps and x0_j - x0, where j is an older prediction, are added to each DDIM row; such terms keep
    a row exact on straight lines. The rows are fitted in order, over all samples and dimensions, each starting from
    the states that the fitted rows before it reach.

    Args:
        denoise: The denoiser; evaluated once per row.
        levels: S + 1 falling levels.
        start: The first state of the samples, (N, ...).
        target: The target state (N, ...) at each level.
        memory: Predictions that a row combines.

    Returns:
        A checked plan of S rows.
    """
    rows: list[Row] = []
    predictions: list[Prediction] = []
    for base in ddim(levels).rows:
        cached = iter([*predictions])

        def replay(x: Tensor, level: Level, /) -> Prediction:
            return next(cached, None) or denoise(x, level)  # noqa: B023

        steps = [*trajectory(replay, Plan("fitted", (*rows, base)), start)]
        predictions.append(Prediction(steps[-1].x0, steps[-1].eps))
        rows.append(_fit(base, steps[::-1][:memory], target(base.next)))
    return Plan("fitted", tuple(rows)).check()


def _fit(base: Row, steps: Sequence[Step[Row]], target: Tensor) -> Row:
    """The row with fitted weights on older predictions; `steps` is newest first and starts with the unfitted row."""
    newest, older = steps[0], steps[1:]
    columns = [step.eps - newest.eps for step in older] + [step.x0 - newest.x0 for step in older]
    if not columns:
        return base
    side = torch.stack([column.flatten().double() for column in columns], 1)
    size = side.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    normal = (side / size).T @ (side / size) + RIDGE * torch.eye(len(columns), dtype=torch.float64, device=side.device)
    remainder = (target - newest.x).flatten().double()
    weights = (torch.linalg.solve(normal, (side / size).T @ remainder) / size).tolist()
    of_eps, of_x0 = weights[: len(older)], weights[len(older) :]
    x0 = (base.x0[0] - math.fsum(of_x0), *of_x0)
    return replace(base, x0=x0, eps=(base.eps[0] - math.fsum(of_eps), *of_eps))


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square difference over all samples and dimensions."""
    return float((a.double() - b.double()).square().mean().sqrt())
