"""Latency of one image sampled in parallel over time, and sequentially.

The number of rounds depends on the weights, which are random; the time per round carries over to trained models.
"""

from __future__ import annotations

from benchmarks import peers
from benchmarks.gpu.bench import Bench
from benchmarks.measuring import by_turns
from ddim.sampling import parallel
from ddim.sampling.loop import run

TOLERANCE = 1e-2  # bfloat16 does not converge to less


def measure(bench: Bench) -> None:
    """Measure both in bfloat16 without torch.compile, for the two larger numbers of steps."""
    model = peers.ours(bench.config, bench.network, bench.device, dtype="bfloat16", micro_batch=1)
    noise = model.noise(1)
    for steps in bench.sizes.steps[2:]:
        plan = peers.trailing(model, steps)
        states = [*parallel.rounds(model.denoise, plan, noise, tolerance=TOLERANCE)]
        difference = (states[-1].x - run(model.denoise, plan, noise)).square().mean().sqrt()
        jobs = {
            "after": bench.synced(lambda plan=plan: run(model.denoise, plan, noise)),
            "parallel": bench.synced(lambda plan=plan: parallel.run(model.denoise, plan, noise, tolerance=TOLERANCE)),
        }
        times = by_turns(jobs, min(5, bench.sizes.runs))
        row = {"S": steps, "one after the other (ms)": 1e3 * times["after"], "parallel (ms)": 1e3 * times["parallel"]}
        row |= {"rounds": len(states), "calls": sum(state.nfe for state in states), "apart (RMS)": float(difference)}
        bench.add("parallel", {**row, "ms a round": 1e3 * times["parallel"] / len(states)})
