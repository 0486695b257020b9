"""Figures of plans, noise schedules, and the paths of samplers through the exact mixture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim._io.atomic import write_atomic
from ddim._io.sheets import check_suffix
from ddim.evaluation.report.figures import COLOURS, FAINT, INK, encoded, need, panels_of
from ddim.exact.mixture import MixtureData
from ddim.plan.base import BasePlan
from ddim.plan.plan import Plan
from ddim.process.rng import Noise
from ddim.process.schedule import Schedule
from ddim.sampling.loop import trajectory

SUFFIXES = (".png", ".svg")
MIXTURE = MixtureData(
    weights=torch.tensor([0.3, 0.45, 0.25], dtype=torch.float64),
    means=torch.tensor([[-1.6], [0.3], [1.8]], dtype=torch.float64),
    covariances=torch.tensor([[[0.03]], [[0.06]], [[0.02]]], dtype=torch.float64),
)
"""The data of `trajectories`: a mixture of three Gaussians over one number, whose denoiser is known."""


def check_plot(path: Path) -> None:
    """Check that a figure can be drawn into this file.

    Raises:
        DdimError: If the suffix is not one of `SUFFIXES`, or matplotlib is not installed.
    """
    check_suffix(path, SUFFIXES)
    need(path)


def plans(path: Path, drawn: Sequence[BasePlan[Any]]) -> None:
    """Plot alpha_bar, the timestep and the added noise of plans along their network evaluations, overlaid.

    Args:
        path: The file, with one of `SUFFIXES`.
        drawn: The plans.

    Raises:
        DdimError: See `check_plot`.
    """
    check_plot(path)
    figure, panels = panels_of(3)
    for number, plan in enumerate(drawn):
        levels = [*(row.now for row in plan.rows), plan.end]
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": "o",
            "ms": 6 - 1.5 * (number % 3),
            "lw": 1.6,
        }
        panels[0].plot([level.alpha_bar for level in levels], label=plan.name, **style)
        panels[1].plot([level.t for level in levels], **style)
        if isinstance(plan, Plan):
            noise = [row.z for row in plan.rows]
            panels[2].plot([row.now.t for row in plan.rows], noise, **style)
            if learned := [row for row in plan.rows if row.z_high]:
                low, high = [row.z for row in learned], [row.z_high for row in learned]
                panels[2].fill_between([row.now.t for row in learned], low, high, color=style["color"], alpha=0.3)
    panels[0].set(xlabel="network evaluations", title="alpha_bar")
    panels[1].set(xlabel="network evaluations", title="timestep t")
    panels[2].set(xlabel="t before the step", title="sigma, standard deviation of the added noise")
    panels[2].invert_xaxis()
    for axes in panels:
        axes.title.set_size(10)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=1 if len(drawn) < 3 else 2)
    write_atomic(path, encoded(figure, path.suffix.lower() == ".png"))


def schedules(path: Path, drawn: Mapping[str, Schedule]) -> None:
    """Plot alpha_bar, log-SNR and beta of noise schedules over t / T, overlaid.

    Args:
        path: The file, with one of `SUFFIXES`.
        drawn: The schedules by name.

    Raises:
        DdimError: See `check_plot`.
    """
    check_plot(path)
    figure, panels = panels_of(3)
    for colour, (name, schedule) in zip(COLOURS * (1 + len(drawn)), drawn.items(), strict=False):
        levels = [schedule.level(t) for t in range(1, schedule.T + 1)]
        time = np.arange(1, schedule.T + 1) / schedule.T
        alpha_bar = np.array([1.0, *(level.alpha_bar for level in levels)])
        beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
        panels[0].plot(time, alpha_bar[1:], color=colour, lw=1.8, label=f"{name}, T = {schedule.T}")
        log_snr = [level.log_snr if math.isfinite(level.log_snr) else math.nan for level in levels]
        panels[1].plot(time, log_snr, color=colour, lw=1.8)
        panels[2].plot(time, beta, color=colour, lw=1.8)
    panels[2].set_yscale("log")
    for axes, title in zip(panels, ("alpha_bar", "log-SNR", "beta, log scale"), strict=True):
        axes.set(xlabel="t / T", title=title)
        axes.title.set_size(10)
    panels[0].legend(fontsize=8, frameon=False)
    write_atomic(path, encoded(figure, path.suffix.lower() == ".png"))


def trajectories(path: Path, drawn: Mapping[str, Plan], schedule: Schedule, n: int = 16, seed: int = 0) -> None:
    """Plot the paths of samplers from the same starts x_T through `MIXTURE`, whose denoiser is exact.

    The background is the density of x_t. Dashed lines are the solutions of the ODE (14), which deterministic samplers
    approximate; the error is that of their last states, root mean square.

    Args:
        path: The file, with one of `SUFFIXES`.
        drawn: Plans of this schedule by title, one panel each.
        schedule: The schedule.
        n: The number of paths.
        seed: The seed of the noise.

    Raises:
        DdimError: See `check_plot`.
    """
    check_plot(path)
    figure, panels = panels_of(min(2, len(drawn)), 3.6, rows=-(-len(drawn) // 2))
    quantiles = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    start = torch.special.ndtri(quantiles)[:, None]
    times = np.linspace(0, schedule.T, 161)
    levels = [schedule.level(t) for t in times]
    x = torch.linspace(-3.2, 3.2, 241, dtype=torch.float64)[:, None]
    # Each column is scaled to a maximum of 1: near t = 0 the density is far higher than elsewhere.
    columns = [MIXTURE.log_density(x, level).exp() for level in levels]
    density = torch.stack([column / column.max() for column in columns], 1).numpy()
    colours = [COLOURS[i % len(COLOURS)] for i in range(n)]
    for axes, (title, plan) in zip(panels, drawn.items(), strict=False):
        axes.imshow(density, extent=(0, schedule.T, -3.2, 3.2), origin="lower", aspect="auto", cmap="Greys", vmax=2.2)
        steps = list(trajectory(MIXTURE.denoise, plan, start, Noise(seed, tuple(range(n)), (1,))))
        states = torch.stack([start, *(step.x for step in steps)])[:, :, 0].numpy()
        at = [plan.start.t, *(step.row.next.t for step in steps)]
        if not plan.stochastic:
            exact = [start]
            down = schedule.levels([*np.linspace(plan.start.t, 0, 41)])
            for now, following in itertools.pairwise(down):
                exact.append(MIXTURE.reference(exact[-1], now, following, 8))
            lines = torch.stack(exact)[:, :, 0].numpy()
            axes.plot([level.t for level in down], lines, color=INK, lw=0.8, ls="--", alpha=0.6)
            error = float(((states[-1] - lines[-1]) ** 2).mean() ** 0.5)
            title += f": error {error:.2g}"
        for path_of_one, colour in zip(states.T, colours, strict=True):
            axes.plot(at, path_of_one, color=colour, lw=1.3, marker="o", ms=2.5)
        axes.set(xlim=(schedule.T, 0), ylim=(-3.2, 3.2), xlabel="t", title=title)
        axes.title.set_size(10)
        axes.grid(color=FAINT, linewidth=0.3)
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes in panels[::2]:
        axes.set_ylabel("x_t")
    write_atomic(path, encoded(figure, path.suffix.lower() == ".png"))
