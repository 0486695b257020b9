"""The example in 100 lines agrees with the library."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddim import samplers
from ddim.names import Predicts
from ddim.process import schedule, timesteps
from ddim.process.parameterization import Prediction, predict
from ddim.process.rng import Noise
from ddim.process.schedule import Level
from ddim.sampling.loop import run

PATH = Path(__file__).resolve().parents[1] / "examples" / "ddim_in_100_lines.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(PATH))


def test_schedule(example: dict[str, Any]) -> None:
    np.testing.assert_allclose(example["linear_schedule"](), schedule.linear().alpha_bar, rtol=1e-12, atol=0)
    np.testing.assert_allclose(example["linear_schedule"](50), schedule.linear(50).alpha_bar, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")  # quadratic spacing has duplicates, which `tau` warns of
@pytest.mark.parametrize("name", ["quadratic", "equal-angle"])
def test_timesteps(example: dict[str, Any], name: str) -> None:
    """Section 4.2: the same timesteps for every number of steps, including large ones."""
    make = example[f"{name.replace('-', '_')}_times"]
    for T in (40, 1000):
        abar = example["linear_schedule"](T)
        for steps in (*range(1, 41), *(S for S in (50, 100, 250, 500, 997, 1000) if S <= T)):
            assert make(abar, steps) == timesteps.tau(schedule.linear(T), name, steps), (T, steps)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_coefficients(example: dict[str, Any], eta: float) -> None:
    """Eqs. (12) and (16): the example's step has the coefficients of a plan's row."""
    levels = schedule.linear().levels([1000, 981, 500, 20, 2, 1, 0])
    for row in samplers.ddim(levels, eta).rows:
        got = example["coefficients"](example["linear_schedule"](), int(row.now.t), int(row.next.t), eta)
        assert got == pytest.approx((*row.x0, *row.eps, row.z), rel=0, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("predicts", ["eps", "v"])
@pytest.mark.parametrize("name", ["quadratic", "equal-angle"])
def test_samples(example: dict[str, Any], name: str, predicts: Predicts, eta: float) -> None:
    """Eqs. (9) and (12): the same samples in float64 for the same x_T and noise."""
    abar, table = example["linear_schedule"](), schedule.linear()
    exact, noise = example["exact_noise"](abar), Noise(3, tuple(range(64)), (2,))
    start = noise.start().double()

    def network(x: Tensor, t: int) -> Tensor:
        eps: Tensor = exact(x, t)
        if predicts == "eps":
            return eps
        signal, rest = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
        return (eps - rest * x) / signal  # v = signal eps - noise x_0, with x_0 = (x - noise eps) / signal

    def denoise(x: Tensor, level: Level) -> Prediction:
        return predict(network(x, int(level.t)), x, level, predicts)

    times = timesteps.tau(table, name, 10)
    plan = samplers.ddim(table.levels([*times[::-1], 0]), eta)
    rows = iter(range(len(plan)))
    got = example["sample"](
        network, start, abar, [int(t) for t in times], eta, lambda x: noise.row(next(rows)).double(), predicts
    )
    torch.testing.assert_close(got, run(denoise, plan, start, noise), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_the_script_converges_without_the_library() -> None:
    code = "import runpy, sys; sys.modules['ddim'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(PATH)], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["5", "10", "20", "50"]
    for column in (1, 2):
        distances = [float(row[column]) for row in rows]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < distances[0] / 3
    moments = [abs(float(row[3].rstrip("%"))) for row in rows]
    assert moments == sorted(moments, reverse=True)


def test_the_example_has_at_most_100_lines() -> None:
    assert len(PATH.read_text(encoding="utf-8").splitlines()) <= 100
