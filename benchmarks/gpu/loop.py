"""What a step costs beside the network, on the device: our loop and diffusers' scheduler, the network's output given.

And what a run's start costs: our noise is drawn on the host, one stream per sample; diffusers' on the device at once.
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
    """Both, for a small and a large batch."""
    for n in (bench.sizes.batches[0], bench.sizes.batches[2]):
        shape = (n, *bench.config.network.shape)
        ours, theirs = loops(bench, shape)
        far = (ours() - theirs()).abs().max() / theirs().abs().max()
        if not far < 1e-3:
            raise ValueError(f"the loops end {float(far):.3g} apart")
        steps = bench.sizes.steps[2]
        jobs: dict[str, Callable[[], object]] = {"ours": bench.synced(ours), "diffusers": bench.synced(theirs)}
        made = by_turns(jobs, bench.sizes.runs)
        row = {"state": "x".join(map(str, shape)), **{f"{k} (us/step)": s / steps * 1e6 for k, s in made.items()}}
        row["ratio"] = made["diffusers"] / made["ours"]
        noise = Noise(0, tuple(range(n)), shape[1:], bench.device)
        starts: dict[str, Callable[[], object]] = {
            "ours": bench.synced(noise.start),
            "diffusers": bench.synced(partial(bench.randn, *shape)),
        }
        row |= {f"start, {k} (ms)": s * 1e3 for k, s in by_turns(starts, 3).items()}
        bench.add("loop", row)


def loops(bench: Bench, shape: tuple[int, ...]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Our loop and diffusers', from one state, with one output of the network; DDIM, eta = 0."""
    x, output = bench.randn(*shape), bench.randn(*shape, seed=1)
    steps = bench.sizes.steps[2]
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    times = [*(int(t) + 1 for t in scheduler.timesteps), 0]
    plan = ddim.samplers.ddim(ddim.schedule.linear().levels(times))

    def denoise(state: Tensor, level: Level) -> Prediction:
        return predict(output, state, level, "eps")

    @torch.no_grad()
    def theirs() -> Tensor:
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(output, t, state).prev_sample
        return state

    return lambda: run(denoise, plan, x), theirs
