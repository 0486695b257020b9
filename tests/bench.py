"""Shared by the tests: lists of all samplers, spacings and schedules, and data with closed forms.

A new sampler is added to `SAMPLERS`, or to `DISCRETE` where it is one of categories, and so comes under all generic
tests; grids and schedules are taken from the library's own tables.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ddim import exact, samplers
from ddim.errors import DdimWarning
from ddim.plan.base import BasePlan
from ddim.plan.categorical import CategoricalPlan
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process import schedule, timesteps
from ddim.process.categorical import Alphabet
from ddim.process.parameterization import AnyDenoiser, TokenPrediction
from ddim.process.rng import Noise, TokenNoise
from ddim.process.schedule import Level, Schedule
from ddim.sampling.inversion import encoding
from ddim.sampling.loop import run

Levels = Sequence[Level]

SAMPLERS: dict[str, Callable[..., Plan]] = {
    "eta 0": samplers.ddim,
    "eta 0.3": lambda levels: samplers.ddim(levels, eta=0.3),
    "eta 1": lambda levels: samplers.ddim(levels, eta=1.0),
    "sigma given": lambda levels: samplers.ddim(levels, sigma=[level.noise / 2 for level in levels[1:]]),
    "sigma-hat": lambda levels: samplers.ddim(levels, sigma="hat"),
    "eq. (15)": lambda levels: samplers.probability_flow(with_signal(levels)),
    "Runge-Kutta 2": lambda levels, clean_as=None: runge_kutta(levels, 2, clean_as),
    "Runge-Kutta 4": lambda levels, clean_as=None: runge_kutta(levels, 4, clean_as),
    **{
        f"Adams-Bashforth {order} {quantity}": partial(samplers.adams_bashforth, order=order, quantity=quantity)
        for quantity in ("eps", "v", "x0")
        for order in (2, 3, 4)
    },
    "Adams-Bashforth 3 eps in angle": partial(samplers.adams_bashforth, order=3, coordinate="angle"),
    "Adams-Bashforth 3 x0 in angle": partial(samplers.adams_bashforth, order=3, quantity="x0", coordinate="angle"),
    "DEIS 3": partial(samplers.deis, order=3),
    "DPM++ 2M": partial(samplers.dpm_solver_pp, order=2),
    "DPM++ 3M": partial(samplers.dpm_solver_pp, order=3),
    "UniPC 2": partial(samplers.unipc, order=2),
    "UniPC 3": partial(samplers.unipc, order=3),
    "iPNDM 2": partial(samplers.ipndm, order=2),
    "iPNDM 3": partial(samplers.ipndm, order=3),
    "iPNDM 4": partial(samplers.ipndm, order=4),
    "BDIA, gamma 1": lambda levels: two_step(partial(samplers.bdia, gamma=1), levels),
    "O-BELM": lambda levels: two_step(samplers.o_belm, with_signal(levels)),
}

ALPHABETS = {"uniform": Alphabet.uniform(3), "mask": Alphabet.masked(2)}

DISCRETE: dict[str, Callable[[Levels], CategoricalPlan]] = {
    f"{name}, {noise}": partial(make, alphabet=alphabet)
    for noise, alphabet in ALPHABETS.items()
    for name, make in {
        "eta 0": samplers.discrete,
        "eta 0.3": partial(samplers.discrete, eta=0.3),
        "eta 1": partial(samplers.discrete, eta=1.0),
        "temperature 1.5, top-p 0.95": partial(samplers.discrete, temperature=1.5, top_p=0.95),
        "markov": samplers.discrete_markov,
    }.items()
}

ALL_SAMPLERS: dict[str, Callable[[Levels], BasePlan[Any]]] = {**SAMPLERS, **DISCRETE}

# The order of convergence of each deterministic sampler.
ORDERS = {"eta 0": 1, "eq. (15)": 1, "Runge-Kutta 2": 2, "Runge-Kutta 4": 4, "DEIS 3": 3, "DPM++ 2M": 2, "DPM++ 3M": 3}
ORDERS |= {"BDIA, gamma 1": 2, "O-BELM": 2}
ORDERS |= {"UniPC 2": 3, "UniPC 3": 4, "iPNDM 2": 2, "iPNDM 3": 2, "iPNDM 4": 2}
ORDERS |= {name: int(name.split()[1]) for name in SAMPLERS if name.startswith("Adams-Bashforth")}

SCHEDULES: dict[str, Schedule] = {name: make() for name, make in schedule.NAMED.items()}
SCHEDULES |= {
    f"{name}+zero-terminal-snr": schedule.zero_terminal_snr(noise_schedule)
    for name, noise_schedule in SCHEDULES.items()
}

GRIDS = list(timesteps.NAMED)


def falling(noise_schedule: Schedule, times: Sequence[float]) -> tuple[Level, ...]:
    """The levels of increasing timesteps, from the noisiest to clean data."""
    return noise_schedule.levels([*reversed(times), 0])


def levels_of(noise_schedule: Schedule, name: str, steps: int) -> tuple[Level, ...]:
    """The levels of a named spacing, with its warnings ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DdimWarning)
        return falling(noise_schedule, timesteps.tau(noise_schedule, name, steps))


def with_signal(levels: Levels) -> Levels:
    """For solvers in v = noise / signal: without zero terminal SNR, where v is infinite."""
    return [level for level in levels if level.signal]


def runge_kutta(levels: Levels, order: int, clean_as: Level | None) -> Plan:
    """The library's function, which also takes the schedule."""
    return samplers.runge_kutta(with_signal(levels), schedule_of(levels), order, clean_as)


def two_step(make: Callable[[Levels], Plan], levels: Levels) -> Plan:
    """A plan to clean data, or for increasing levels its inverse."""
    if levels[-1].log_snr > levels[0].log_snr:
        return make(levels)
    plan = make(levels[::-1])
    return encoding(plan, levels[1]) if len(plan) > 1 else samplers.ddim(levels)


def schedule_of(levels: Levels) -> Schedule:
    """The first of `SCHEDULES` that the levels come from."""
    return next(
        noise_schedule
        for noise_schedule in SCHEDULES.values()
        if all(noise_schedule.level(level.t) == level for level in levels)
    )


def equal_angles(noise_schedule: Schedule, steps: int) -> tuple[Level, ...]:
    """Exactly equal rotations at fractional times, on which an order can be observed."""
    top = noise_schedule.level(noise_schedule.T).angle
    return falling(noise_schedule, [noise_schedule.time_at_angle(top * i / steps) for i in range(1, steps + 1)])


def equal_ratios(noise_schedule: Schedule, steps: int, top: float = 1000, bottom: float = 10) -> tuple[Level, ...]:
    """Levels between two times above 0 with the same factor of noise / signal at each step, on which any order can be
    observed."""
    first, last = noise_schedule.level(top).log_snr, noise_schedule.level(bottom).log_snr
    return noise_schedule.levels(
        [noise_schedule.time_at_log_snr(first + (last - first) * i / steps) for i in range(steps + 1)]
    )


def eased_in(levels: Levels, noise_schedule: Schedule, parts: int = 10) -> tuple[Level, ...]:
    """Levels whose first step is repeatedly halved towards its start, so that the lower order of a multistep plan's
    first steps does not matter."""
    first, last = levels[0].log_snr, levels[1].log_snr
    times = [noise_schedule.time_at_log_snr(first + (last - first) / 2**part) for part in range(parts, 0, -1)]
    return (levels[0], *noise_schedule.levels(times), *levels[1:])


def apply(row: Row, states: Sequence[Tensor], x0: Sequence[Tensor], eps: Sequence[Tensor]) -> Tensor:
    """The mean of a row's update, written out; all sequences newest first."""
    out = torch.zeros_like(states[0])
    for weights, tensors in ((row.x, states), (row.x0, x0), (row.eps, eps)):
        for weight, tensor in zip(weights, tensors, strict=False):
            out = out + weight * tensor
    return out


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers from a separate generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


GAUSSIAN = exact.GaussianData(
    mean=torch.tensor([0.0, 0.5, -1.0, 0.2], dtype=torch.float64),
    variance=torch.tensor([1.0, 0.04, 4.0, 0.5], dtype=torch.float64),
)


def mixture(components: int = 5, dimensions: int = 3) -> exact.MixtureData:
    """Components several standard deviations apart, with covariances of different size and direction."""
    shape = randn(components, dimensions, dimensions, seed=11)
    width = 0.05 + 0.1 * torch.arange(components, dtype=torch.float64)[:, None, None] / components
    covariances = width**2 * (shape @ shape.mT + 0.3 * torch.eye(dimensions, dtype=torch.float64))
    weights = torch.arange(1, components + 1, dtype=torch.float64)
    return exact.MixtureData(weights / weights.sum(), randn(components, dimensions, seed=12), covariances)


MIXTURE = mixture()


@cache
def mixture_path(now: Level, end: Level) -> tuple[Tensor, Tensor]:
    """Four samples of the mixture at two levels of the same ODE paths."""
    start = MIXTURE.reference(MIXTURE.sample(4, seed=0), Level(0.0, math.inf), now, 500)
    return start, MIXTURE.reference(start, now, end, 800)


def observed_order(make: Callable[[Levels], Plan], coarse: Levels, fine: Levels) -> float:
    """Observed order: log2 of the ratio of the errors on the mixture's ODE when the number of steps doubles."""
    start, end = mixture_path(coarse[0], coarse[-1])
    before, after = ((run(MIXTURE.denoise, make(levels), start) - end).abs().max().item() for levels in (coarse, fine))
    return math.log2(before / after)


def chain(alphabet: Alphabet) -> exact.MarkovTokens:
    """Sequences of two or three tokens; no token of the data is a mask."""
    size = alphabet.size - (alphabet.mask is not None)
    moves = torch.zeros(alphabet.size, alphabet.size, dtype=torch.float64)
    moves[:, :size] = torch.softmax(2 * randn(alphabet.size, size, seed=13), -1)
    return exact.MarkovTokens(moves[0], moves, alphabet.pi)


CHAINS = {alphabet.weights: chain(alphabet) for alphabet in ALPHABETS.values()}


def tokens_denoiser(plan: CategoricalPlan) -> AnyDenoiser:
    """The exact denoiser of the chain with the plan's noise."""
    data = CHAINS[plan.pi]
    return lambda x, level: TokenPrediction(data.predict(x, level))


def surroundings(plan: BasePlan[Any], seed: int = 1, indices: Sequence[int] = (0, 5, 2)) -> tuple[AnyDenoiser, Noise]:
    """Inputs of a run: the exact denoiser of Gaussian data or of a chain of tokens, and noise for a batch."""
    if isinstance(plan, CategoricalPlan):
        return tokens_denoiser(plan), TokenNoise(seed, tuple(indices), (6,), pi=CHAINS[plan.pi].pi)
    return GAUSSIAN.denoise, Noise(seed, tuple(indices), (4,))
