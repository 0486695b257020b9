"""Sampling throughput against diffusers' DDIMPipeline, with the same weights and steps, in alternating runs.

`python -m benchmarks.sampling`
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import peers
from benchmarks.measuring import by_turns, write

STEPS = 2
BATCHES = {"cifar10": (1, 8, 16, 64), "mnist": (1, 8, 16, 64)}
BEST = (16,)  # batch sizes for which diffusers is compiled too, which takes a minute each


def main(batches: dict[str, tuple[int, ...]] = BATCHES, best: tuple[int, ...] = BEST, steps: int = STEPS) -> None:
    """Measure and write results/sampling.json."""
    rows = []
    for name, sizes in batches.items():
        config, network = peers.NETWORKS[name]()
        model, plain = peers.ours(config, network), peers.ours(config, network, dtype="float32")
        default = peers.diffusers(config, network)
        fastest = peers.diffusers(config, network, best=True) if best else None
        plan = peers.trailing(model, steps)
        for n in sizes:
            jobs: dict[str, Any] = {
                "ours": partial(model.sample, n, plan=plan),
                "diffusers": partial(peers.draw, default, n, steps),
            }
            if n <= 16:
                jobs["ours, float32"] = partial(plain.sample, n, plan=plan)
            if n in best and fastest is not None:
                jobs["diffusers, best"] = partial(peers.draw, fastest, n, steps)
            times = by_turns(jobs)
            row = {"network": name, "batch": n, "S": steps, "ours": model.compute.name}
            row |= {f"{job} (img*step/s)": n * steps / seconds for job, seconds in times.items()}
            row |= {f"ratio to {job}": times[job] / times["ours"] for job in times if job.startswith("diffusers")}
            rows.append(row)
            print(row, flush=True)
    dtype = str(peers.fast_dtype("cpu")).removeprefix("torch.")
    about = f"images times steps per second; diffusers' best: channels-last, torch.compile, {dtype}"
    write("sampling", rows, about)


if __name__ == "__main__":
    main()
