"""Overhead of a step on the device: this library's loop and diffusers' scheduler, with a constant network output.

Also the cost of the initial noise: one stream per sample here, one call on the device in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import ddim
from benchmarks.gpu.bench import Bench
from benchmarks.measuring import by_turns
from ddim.process.parameterization import Prediction, predict
from ddim.process.rng import Noise
from ddim.process.schedule import Level
from ddim.sampling.loop import run


def measure(bench: Bench) -> None:
    """Measure both for a small and a large batch."""
    for n in (bench.sizes.batches[0], bench.sizes.batches[2]):
        shape = (n, *bench.config.network.shape)
        ours, peer = loops(bench, shape)
        difference = (ours() - peer()).abs().max() / peer().abs().max()
        if not difference < 1e-3:
            raise ValueError(f"the results of the loops differ by {float(difference):.3g}")
        steps = bench.sizes.steps[2]
        jobs: dict[str, Callable[[], object]] = {"ours": bench.synced(ours), "diffusers": bench.synced(peer)}
        times = by_turns(jobs, bench.sizes.runs)
        row = {"state": "x".join(map(str, shape)), **{f"{k} (us/step)": s / steps * 1e6 for k, s in times.items()}}
        row["ratio"] = times["diffusers"] / times["ours"]
        noise = Noise(0, tuple(range(n)), shape[1:], bench.device)
        starts: dict[str, Callable[[], object]] = {
            "ours": bench.synced(noise.start),
            "diffusers": bench.synced(partial(bench.randn, *shape)),
        }
        row |= {f"start, {k} (ms)": s * 1e3 for k, s in by_turns(starts, 3).items()}
        bench.add("loop", row)


def loops(bench: Bench, shape: tuple[int, ...]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """This library's loop and diffusers', from the same state and network output; DDIM, eta = 0."""
    x, output = bench.randn(*shape), bench.randn(*shape, seed=1)
    steps = bench.sizes.steps[2]
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    timesteps = [*(int(t) + 1 for t in scheduler.timesteps), 0]
    plan = ddim.samplers.ddim(ddim.schedule.linear().levels(timesteps))

    def denoise(state: Tensor, level: Level) -> Prediction:
        return predict(output, state, level, "eps")

    @torch.no_grad()
    def peer() -> Tensor:
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(output, t, state).prev_sample
        return state

    return lambda: run(denoise, plan, x), peer
