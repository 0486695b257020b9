"""Latency of one image run in parallel over time, beside one row after the other.

How many rounds it takes depends on the weights, and these are random: what a round takes is what carries over.
"""

from __future__ import annotations

from benchmarks import peers
from benchmarks.gpu.bench import Bench
from benchmarks.measuring import by_turns
from ddim.sampling import parallel
from ddim.sampling.loop import run

TOLERANCE = 1e-2  # bfloat16 does not stay put within less


def measure(bench: Bench) -> None:
    """Both, in bfloat16 without torch.compile, for the two larger numbers of steps."""
    model = peers.ours(bench.config, bench.network, bench.device, dtype="bfloat16", micro_batch=1)
    noise = model.noise(1)
    for steps in bench.sizes.steps[2:]:
        plan = peers.trailing(model, steps)
        made = [*parallel.rounds(model.denoise, plan, noise, tolerance=TOLERANCE)]
        far = (made[-1].x - run(model.denoise, plan, noise)).square().mean().sqrt()
        jobs = {
            "after": bench.synced(lambda plan=plan: run(model.denoise, plan, noise)),
            "parallel": bench.synced(lambda plan=plan: parallel.run(model.denoise, plan, noise, tolerance=TOLERANCE)),
        }
        times = by_turns(jobs, min(5, bench.sizes.runs))
        row = {"S": steps, "one after the other (ms)": 1e3 * times["after"], "parallel (ms)": 1e3 * times["parallel"]}
        row |= {"rounds": len(made), "calls": sum(one.nfe for one in made), "apart (RMS)": float(far)}
        bench.add("parallel", {**row, "ms a round": 1e3 * times["parallel"] / len(made)})
