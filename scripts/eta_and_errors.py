"""Measures the best eta with the exact denoiser and with inexact ones, for docs/evaluation.md.

    python scripts/eta_and_errors.py

The data are the mixture of ten Gaussians fitted to scikit-learn's 8x8 digits, whose denoiser, mean and covariance are
known exactly. The inexact denoisers add to v a fixed smooth function of state and time, like the error of a network.
"""

from __future__ import annotations

import argparse
import runpy
import warnings
from pathlib import Path

import torch
from torch import Tensor

import ddim
from ddim import samplers
from ddim.evaluation import Moments, frechet
from ddim.evaluation.moments import of
from ddim.process import timesteps
from ddim.process.parameterization import Denoiser, Prediction, predict, v_from_pair
from ddim.process.schedule import Level
from ddim.sampling.loop import run

SOLVERS = runpy.run_path(str(Path(__file__).with_name("solvers.py")))


class Doubled:
    """The noise of samples, in float64."""

    def __init__(self, noise: ddim.Noise):
        self.noise = noise

    def row(self, k: int) -> Tensor:
        return self.noise.row(k).double()


def inexact(exact: Denoiser, size: float, dim: int) -> Denoiser:
    """The exact denoiser with a fixed error in v of root mean square `size` / sqrt(2) per dimension."""
    turn = torch.randn(dim, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / dim**0.5

    def denoise(x: Tensor, level: Level, /) -> Prediction:
        pair = exact(x, level)
        v = v_from_pair(pair.x0, pair.eps, level)
        return predict(v + size * torch.sin(3 * x @ turn + 5 * level.angle), x, level, "v")

    return denoise if size else exact


def main(samples: int, steps: list[int], sizes: list[float]) -> None:
    warnings.simplefilter("ignore", ddim.DdimWarning)
    data, schedule = SOLVERS["digits"](), ddim.schedule.linear()
    mean = (data.weights[:, None] * data.means).sum(0)
    offsets = data.means - mean
    within = data.covariances + offsets[:, :, None] * offsets[:, None, :]
    exact = Moments(len(mean), 2, mean, (data.weights[:, None, None] * within).sum(0))
    noise = ddim.Noise(0, tuple(range(samples)), (len(mean),))
    print(f"Frechet distance of {samples} samples to the mixture, in the space of the data\n")
    print("| error of v | eta | " + " | ".join(f"S = {s}" for s in steps) + " |\n|-|-|" + "-|" * len(steps))
    for size in sizes:
        for eta in ("0", "0.5", "1", "hat"):
            cells = []
            for s in steps:
                levels = schedule.levels([*reversed(timesteps.tau(schedule, "linear", s)), 0.0])
                settings = {"sigma": "hat", "clip_x0": False} if eta == "hat" else {"eta": float(eta)}
                plan = samplers.ddim(levels, **settings)
                x0 = run(inexact(data.denoise, size, len(mean)), plan, noise.start().double(), Doubled(noise))
                cells.append(f"{frechet(of(x0), exact):.3f}")
            print(f"| {size / 2**0.5:.2f} | {eta} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.0, 0.4, 1.0])
    arguments = parser.parse_args()
    main(arguments.samples, arguments.steps, arguments.sizes)
