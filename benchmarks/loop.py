"""Overhead of a step without the network: the sampling loop against DDIMScheduler.step, with a constant network output.

`python -m benchmarks.loop`
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import ddim
from benchmarks.measuring import by_turns, write
from ddim.process.parameterization import Prediction, predict
from ddim.process.schedule import Level
from ddim.sampling.loop import run

STEPS = 50


def main(shapes: tuple[tuple[int, ...], ...] = ((1, 3, 32, 32), (512, 3, 8, 8), (512, 3, 32, 32))) -> None:
    """Measure and write results/loop.json."""
    rows = []
    schedule = ddim.schedule.linear()
    times = [*(1 + 20 * k for k in reversed(range(STEPS))), 0]
    plan = ddim.samplers.ddim(schedule.levels(times))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        x, output = (torch.randn(shape, generator=generator) for _ in range(2))

        def denoise(state: Tensor, level: Level, output: Tensor = output) -> Prediction:
            return predict(output, state, level, "eps")

        def peer(x: Tensor = x, output: Tensor = output) -> Tensor:
            for t in scheduler.timesteps:
                x = scheduler.step(output, t, x).prev_sample
            return x

        def ours(x: Tensor = x, denoise=denoise) -> Tensor:  # type: ignore[no-untyped-def]
            return run(denoise, plan, x)

        assert (ours() - peer()).abs().max() < 1e-3 * peer().abs().max()
        seconds = by_turns({"ours": ours, "diffusers": peer}, 15)
        row = {"state": "x".join(map(str, shape)), **{f"{k} (us/step)": v / STEPS * 1e6 for k, v in seconds.items()}}
        rows.append({**row, "ratio": seconds["diffusers"] / seconds["ours"]})
    write("loop", rows, f"microseconds per step of a DDIM run of {STEPS} steps, with a constant network output")


if __name__ == "__main__":
    main()
