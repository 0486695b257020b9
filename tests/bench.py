"""The instruments that the tests share: every sampler, grid and schedule in one list each, and data with closed forms.

A new sampler is added to `SAMPLERS` and so comes under all generic tests; grids and schedules are taken from the
library's own tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddim import exact, grid, samplers, schedule
from ddim.errors import DdimWarning
from ddim.plan import Plan, Row
from ddim.schedule import Level, Schedule

Levels = Sequence[Level]

SAMPLERS: dict[str, Callable[[Levels], Plan]] = {
    "eta 0": lambda levels: samplers.ddim(levels),
    "eta 0.3": lambda levels: samplers.ddim(levels, eta=0.3),
    "eta 1": lambda levels: samplers.ddim(levels, eta=1.0),
    "sigma given": lambda levels: samplers.ddim(levels, sigma=[level.noise / 2 for level in levels[1:]]),
    "sigma-hat": lambda levels: samplers.ddim(levels, sigma="hat"),
    "eq. (15)": lambda levels: samplers.probability_flow(with_signal(levels)),
    "Runge-Kutta 2": lambda levels: samplers.runge_kutta(with_signal(levels), schedule_of(levels), 2),
    "Runge-Kutta 4": lambda levels: samplers.runge_kutta(with_signal(levels), schedule_of(levels), 4),
}

# The order of convergence of each deterministic sampler.
ORDERS = {"eta 0": 1, "eq. (15)": 1, "Runge-Kutta 2": 2, "Runge-Kutta 4": 4}

SCHEDULES: dict[str, Schedule] = {name: make() for name, make in schedule.NAMED.items()}
SCHEDULES |= {f"{name}+zero-terminal-snr": schedule.zero_terminal_snr(made) for name, made in SCHEDULES.items()}

GRIDS = list(grid.NAMED)


def falling(made: Schedule, times: Sequence[float]) -> tuple[Level, ...]:
    """The levels of rising times, from the noisiest to clean data."""
    return made.levels([*reversed(times), 0])


def levels_of(made: Schedule, name: str, steps: int) -> tuple[Level, ...]:
    """A named grid's levels, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DdimWarning)
        return falling(made, grid.tau(made, name, steps))


def with_signal(levels: Levels) -> Levels:
    """For solvers in v = noise / signal: zero terminal SNR, where v is infinite, is left out."""
    return [level for level in levels if level.signal]


def schedule_of(levels: Levels) -> Schedule:
    """The first of `SCHEDULES` that the levels come from."""
    return next(made for made in SCHEDULES.values() if all(made.level(level.t) == level for level in levels))


def equal_angles(made: Schedule, steps: int) -> tuple[Level, ...]:
    """Exactly equal rotations, at times that are not whole: the grid on which an order can be observed."""
    top = made.level(made.T).angle
    return falling(made, [made.time_at_angle(top * i / steps) for i in range(1, steps + 1)])


def equal_ratios(made: Schedule, steps: int, top: float = 1000, bottom: float = 10) -> tuple[Level, ...]:
    """Falling levels between two times above 0, noise / signal falling by the same factor at each step: the grid on
    which any order can be observed."""
    first, last = made.level(top).log_snr, made.level(bottom).log_snr
    return made.levels([made.time_at_log_snr(first + (last - first) * i / steps) for i in range(steps + 1)])


def apply(row: Row, states: Sequence[Tensor], x0: Sequence[Tensor], eps: Sequence[Tensor]) -> Tensor:
    """The mean of a row's update, written out; all sequences newest first."""
    out = torch.zeros_like(states[0])
    for weights, tensors in ((row.x, states), (row.x0, x0), (row.eps, eps)):
        for weight, tensor in zip(weights, tensors, strict=False):
            out = out + weight * tensor
    return out


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


GAUSSIAN = exact.GaussianData(
    mean=torch.tensor([0.0, 0.5, -1.0, 0.2], dtype=torch.float64),
    variance=torch.tensor([1.0, 0.04, 4.0, 0.5], dtype=torch.float64),
)


def mixture(components: int = 5, dimensions: int = 3) -> exact.MixtureData:
    """Components apart by several of their standard deviations, which differ in size and direction."""
    shape = randn(components, dimensions, dimensions, seed=11)
    width = 0.05 + 0.1 * torch.arange(components, dtype=torch.float64)[:, None, None] / components
    covariances = width**2 * (shape @ shape.mT + 0.3 * torch.eye(dimensions, dtype=torch.float64))
    weights = torch.arange(1, components + 1, dtype=torch.float64)
    return exact.MixtureData(weights / weights.sum(), randn(components, dimensions, seed=12), covariances)


MIXTURE = mixture()
