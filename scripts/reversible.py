"""Measures the errors of the reversible plans and of DDIM against the converged solution, for docs/inversion.md.

    python scripts/reversible.py

The bundled model `mnist` in float32, samples 0 to 23 of seed 0; writes docs/results/reversible.json in a few minutes.
"""

from __future__ import annotations

import json

from solvers import REFERENCE, ROOT, Bed, each

from ddim import samplers
from ddim._io.atomic import write_atomic
from ddim.process import timesteps
from ddim.sampling.fitting import CachedDenoiser
from ddim.sampling.loop import run

SAMPLES, STEPS, GRIDS = 24, (10, 20, 30), ("equal-angle", "linear")
PLANS = {
    "ddim": lambda levels: samplers.ddim(levels),
    "reversible (BDIA, default gamma)": lambda levels: samplers.bdia(levels),
    "BDIA, gamma 1 (as lossless)": lambda levels: samplers.bdia(levels, 1.0),
    "O-BELM": lambda levels: samplers.o_belm(levels),
}


def main() -> None:
    bed = Bed("mnist", SAMPLES)
    reference, cached, rows = bed.converged(REFERENCE), CachedDenoiser(bed.denoise, bed.size), []
    print("| plan | spacing | " + " | ".join(f"S = {steps}" for steps in STEPS) + " |\n|-|-|" + "-|" * len(STEPS))
    for name, make in PLANS.items():
        for grid in GRIDS:
            errors = []
            for steps in STEPS:
                levels = bed.schedule.levels([*reversed(timesteps.tau(bed.schedule, grid, steps)), 0.0])
                errors.append(each(run(cached, make(levels), bed.start), reference)["rms"])
                rows.append({"plan": name, "grid": grid, "steps": steps, "rms": errors[-1]})
            print(f"| {name} | {grid} | " + " | ".join(f"{value:.4f}" for value in errors) + " |", flush=True)
    about = {"command": "python scripts/reversible.py", "model": "mnist, float32", "samples": SAMPLES}
    text = json.dumps({**about, "error": "root mean square to the converged solution", "rows": rows}, indent=1)
    write_atomic(ROOT / "docs" / "results" / "reversible.json", (text + "\n").encode())


if __name__ == "__main__":
    main()
