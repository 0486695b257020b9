"""Error of the fast dtypes: samples of the trained `mnist` with S = 50, compared with float64.

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
    plan = reference.plan(steps, sampler="ddim")
    exact = _double(reference, plan, n)
    rows = []
    for dtype in ("float32", "float32-fast", "bfloat16"):
        try:
            images = ddim.load("mnist", "cpu", dtype=dtype).sample(n, plan=plan).double()
        except (ddim.DdimError, RuntimeError) as error:
            print(f"{dtype}: {error}")
            continue
        error = (images.clamp(-1, 1) - exact.clamp(-1, 1)).flatten(1)
        psnr = 10 * torch.log10(4 / error.square().mean(1).clamp_min(1e-30))
        rows.append(
            {
                "precision": dtype,
                "largest difference": float((images - exact).abs().max()),
                "mean difference": float((images - exact).abs().mean()),
                "PSNR median (dB)": float(psnr.median()),
                "PSNR least (dB)": float(psnr.min()),
            }
        )
    write("precision", rows, f"{n} images of mnist in [-1, 1], {plan.name}, against the same run in float64")


def _double(model: Model, plan: ddim.Plan, n: int) -> torch.Tensor:
    """The run with network and state in float64."""
    from ddim.model.denoisers import NetworkDenoiser, image_output

    network = model.network.double()
    start = model.noise(n).start().double()
    parts = [run(NetworkDenoiser(network, image_output("v")), plan, part) for part in start.split(8)]
    return torch.cat(parts)


if __name__ == "__main__":
    main()
