"""What the fast paths change in a picture: the trained `mnist`, S = 50, against float64, and the quality beside it.

`python -m benchmarks.precision`
"""

from __future__ import annotations

import torch

import ddim
from benchmarks.measuring import write
from ddim.model.model import Model
from ddim.sampling.loop import run


def main(n: int = 32, steps: int = 50) -> None:
    """Measure and write results/precision.json."""
    reference = ddim.load("mnist", "cpu", dtype="float32")
    plan = reference.plan(steps)
    exact = _double(reference, plan, n)
    rows = []
    for dtype in ("float32", "float32-fast", "bfloat16"):
        try:
            made = ddim.load("mnist", "cpu", dtype=dtype).sample(n, plan=plan).double()
        except (ddim.DdimError, RuntimeError) as error:
            print(f"{dtype}: {error}")
            continue
        error = (made.clamp(-1, 1) - exact.clamp(-1, 1)).flatten(1)
        psnr = 10 * torch.log10(4 / error.square().mean(1).clamp_min(1e-30))
        rows.append(
            {
                "precision": dtype,
                "largest difference": float((made - exact).abs().max()),
                "mean difference": float((made - exact).abs().mean()),
                "PSNR median (dB)": float(psnr.median()),
                "PSNR least (dB)": float(psnr.min()),
            }
        )
    write("precision", rows, f"{n} pictures of mnist in [-1, 1], {plan.name}, against the same run in float64")


def _double(model: Model, plan: ddim.Plan, n: int) -> torch.Tensor:
    """The run in float64, network and state."""
    from ddim.model.denoisers import NetworkDenoiser, image_output

    network = model.network.double()
    start = model.noise(n).start().double()
    made = [run(NetworkDenoiser(network, image_output("v")), plan, part) for part in start.split(8)]
    return torch.cat(made)


if __name__ == "__main__":
    main()
