"""Creates the tables and the figure of docs/ode.md: solvers of DDIM's ODE from the same latents.

    python scripts/discretisations.py

Writes docs/results/discretisations.json and docs/images/discretisations.png, and prints the tables. The bundled model
`mnist` in float32, samples 0..7 of seed 0; takes a few minutes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import ddim
from ddim._io.atomic import write_atomic
from ddim._io.png import labelled_rows, save_png
from ddim.data.pixels import to_uint8
from ddim.model.model import Model

DOCS = Path(__file__).resolve().parents[1] / "docs"
STEPS = (5, 10, 20, 50, 100, 1000)
SAMPLES = 8
RUNGE_KUTTA_STEPS = 10


def rms(difference: Tensor) -> float:
    """The root of the mean square."""
    return float(difference.double().square().mean().sqrt())


def runge_kutta(model: Model, fine: Tensor) -> Iterator[dict[str, Any]]:
    """Each order with two spacings, and eq. (13) with equal NFE and spacing."""
    for grid in ("log-snr", "equal-angle"):
        for order in (2, 4):
            plan = ddim.samplers.runge_kutta(model.levels(grid, RUNGE_KUTTA_STEPS), model.schedule, order)
            euler = ddim.samplers.ddim(model.levels(grid, plan.nfe))
            gaps = [rms(model.sample(SAMPLES, seed=0, plan=p) - fine) for p in (plan, euler)]
            yield {"grid": grid, "order": order, "calls": plan.nfe, "to_fine": gaps[0], "eq13_to_fine": gaps[1]}


def main() -> None:
    model = ddim.load("mnist", device="cpu", dtype="float32")
    by_13, by_15 = {}, {}
    for steps in STEPS:
        levels = model.levels("linear", steps)
        by_13[steps] = model.sample(SAMPLES, seed=0, plan=ddim.samplers.ddim(levels))
        by_15[steps] = model.sample(SAMPLES, seed=0, plan=ddim.samplers.probability_flow(levels))
    fine = by_13[STEPS[-1]]
    rows = [
        {
            "steps": steps,
            "between": rms(by_15[steps] - by_13[steps]),
            "eq13_to_fine": rms(by_13[steps] - fine),
            "eq15_to_fine": rms(by_15[steps] - fine),
        }
        for steps in STEPS
    ]
    body: dict[str, Any] = {
        "command": "python scripts/discretisations.py",
        "model": {"name": "mnist", "sha256": model.config.sha256},
        "latents": f"samples 0..{SAMPLES - 1} of seed 0",
        "grid": "linear",
        "dtype": "float32",
        "error": "root mean square difference per dimension, images nominally in [-1, 1], not clipped",
        "fine": f"eq. (13) at S = {STEPS[-1]}",
        "rows": rows,
        "runge_kutta": list(runge_kutta(model, fine)),
    }
    write_atomic(DOCS / "results" / "discretisations.json", (json.dumps(body, indent=1) + "\n").encode())
    both = (("eq. (13)", by_13), ("eq. (15)", by_15))
    labelled = [(f"S={steps}  {name}", to_uint8(samples[steps])) for steps in STEPS for name, samples in both]
    save_png(DOCS / "images" / "discretisations.png", labelled_rows(labelled, zoom=2))
    print("| S | between the two | eq. (13) to fine | eq. (15) to fine |\n|-|-|-|-|")
    for row in rows:
        print(f"| {row['steps']} | {row['between']:.3g} | {row['eq13_to_fine']:.3g} | {row['eq15_to_fine']:.3g} |")
    print("\n| spacing | order | NFE | Runge-Kutta to fine | eq. (13) to fine |\n|-|-|-|-|-|")
    for row in body["runge_kutta"]:
        gaps = f"{row['to_fine']:.3g} | {row['eq13_to_fine']:.3g}"
        print(f"| {row['grid']} | {row['order']} | {row['calls']} | {gaps} |")


if __name__ == "__main__":
    main()
