"""What is to be measured: a bound on the likelihood of a plan, or the ODE's density."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ddim import bound, samplers, seeds, token_bound
from ddim.engine import Engine
from ddim.errors import DdimError, either
from ddim.mixture import CategoricalPlan
from ddim.model import Model
from ddim.plan import Plan
from ddim.table import Table
from ddim.token_model import TokenModel

_ROWS = 0x726F7773  # of the generator that chooses rows

Dequantize = Literal["decoder", "uniform"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be measured.

    Args:
        method: "bound", the variational bound J_sigma of eq. (11), or "ode", the probability flow's exact density.
        plan: The plan whose bound it is, or the rising plan along which the ODE is solved.
        last_sigma: sigma_1, the standard deviation of the discretised last step; None for uniform dequantisation.
        check: With "ode", a plan of half the steps, for the estimate of the solver's error.
        probes: With "ode", how many probes of the trace each picture has.
        seed: Of all draws; picture i's depend on (seed, i).
        draws: With "bound", how many of the plan's rows each micro-batch has: the last, and one drawn from each of as
            many equal parts of the others, counted for its part, so that the mean is right; 0 for all rows.
    """

    method: Literal["bound", "ode"]
    plan: Any
    last_sigma: float | None
    check: Plan | None = None
    probes: int = 1
    seed: int = 0
    draws: int = 0

    def __post_init__(self) -> None:
        if (self.method == "ode") != (self.check is not None) or (self.method == "bound" and self.last_sigma is None):
            raise ValueError("a bound needs last_sigma, the ODE a second plan: see `bound_request` and `ode_request`")

    @property
    def calls(self) -> int:
        """Network calls per picture; with "ode" nearly all of them with a pass backwards per probe."""
        rows: int = self.draws or len(self.plan)
        return rows if self.check is None else rows + self.check.calls + (2 if self.last_sigma else 0)

    def rows(self, first: int) -> list[tuple[int, int]]:
        """The rows that the micro-batch from sample `first` on has, each with the number of rows it counts for."""
        last = len(self.plan) - 1
        if not self.draws:
            return [(k, 1) for k in range(last + 1)]
        edges = [last * i // (self.draws - 1) for i in range(self.draws)]
        generator = seeds.generator("cpu", self.seed, first, _ROWS)
        u = torch.rand(self.draws - 1, generator=generator, dtype=torch.float64).tolist()
        parts = zip(u, itertools.pairwise(edges), strict=True)
        return [*((low + int(part * (high - low)), high - low) for part, (low, high) in parts), (last, 1)]


def bound_request(model: Model, plan: Plan, last_sigma: float | None = None, seed: int = 0, draws: int = 0) -> Request:
    """The bound of a plan for a model.

    Args:
        model: The model.
        plan: A plan of eq. (12) with noise at every step but the last.
        last_sigma: sigma_1; if None see `default_last_sigma`.
        seed: Of the draws.
        draws: See `Request`.

    Raises:
        DdimError: If the bound of the plan is infinite, or it is not one for this model.
    """
    _check_model(model, seed)
    model.check_plan(plan, to_clean=True)
    _check_draws(plan, draws)
    sigma = default_last_sigma(plan) if last_sigma is None else last_sigma
    bound.check_bound(plan, sigma)
    return Request("bound", plan, sigma, seed=seed, draws=draws)


def token_request(model: TokenModel, plan: CategoricalPlan, seed: int = 0, draws: int = 0) -> Request:
    """The bound of a plan for a model of categories, see `ddim.token_bound`; arguments as for `bound_request`."""
    _check_model(model, seed)
    model.check_plan(plan, to_clean=True)
    _check_draws(plan, draws)
    token_bound.check_bound(plan)
    return Request("bound", plan, 0.0, seed=seed, draws=draws)


def _check_draws(plan: Table[Any], draws: int) -> None:
    if draws and not 2 <= draws <= len(plan):
        raise DdimError(f"draws {draws}", f"is outside 2..{len(plan)}, the plan's steps", "leave it out for all")


def ode_request(
    model: Model,
    steps: int = 40,
    dequantize: Dequantize = "decoder",
    last_sigma: float | None = None,
    probes: int = 1,
    seed: int = 0,
) -> Request:
    """The exact likelihood through the ODE, from t = 1 up to T in Runge-Kutta steps of order 4, even in log-SNR.

    Args:
        model: The model.
        steps: Steps of four calls each, even, at least 2; half as many are run too, for the error estimate.
        dequantize: "decoder" or "uniform", see `ddim.likelihood.discrete_nats`.
        last_sigma: sigma_1 for "decoder"; the same default as the bound's at S = T.
        probes: Probes of the trace per picture.
        seed: Of the draws.

    Raises:
        DdimError: If a number is out of range, or the schedule has no signal at T.
    """
    if steps > model.schedule.T:
        raise DdimError(f"steps {steps}", f"is more than T = {model.schedule.T}", "give fewer; 40 is the default")
    if steps < 2 or steps % 2:
        raise DdimError(f"steps {steps}", "is not an even number >= 2", "half of them are run for the error estimate")
    if probes < 1:
        raise DdimError(f"probes {probes}", "is less than 1", "give 1 or more")
    _check_model(model, seed)
    schedule = model.schedule
    if schedule.T < 2:
        raise DdimError("the ODE", "has no way to go on a schedule of one time", "take a schedule of more")
    first, top = schedule.level(1), schedule.level(schedule.T)
    if not math.isfinite(top.log_snr):
        raise DdimError("the ODE", "has no start where there is no signal at T", "take the method bound")
    inner = [first.log_snr + (top.log_snr - first.log_snr) * i / steps for i in range(1, steps)]
    levels = schedule.levels([1.0, *(schedule.time_at_log_snr(value) for value in inner), float(schedule.T)])
    plan = samplers.runge_kutta(levels, schedule, about=f"even in log-SNR, {steps} steps")
    check = samplers.runge_kutta(levels[::2], schedule, about=f"even in log-SNR, {steps // 2} steps")
    if dequantize == "uniform":
        last_sigma = None
    elif last_sigma is None:
        last_sigma = default_last_sigma(samplers.ddim(schedule.levels([2, 1, 0]), eta=1.0))
    if last_sigma is not None:
        bound.check_last_sigma(last_sigma)
    return Request("ode", plan, last_sigma, check, probes, seed)


def _check_model(model: Engine, seed: int) -> None:
    """Refuse what would go wrong in the first block, before a folder is claimed for it."""
    model.noise(1, seed)
    if model.config.needs_label:
        raise DdimError("model", "was never trained without a label", "this likelihood is one without: take another")


def default_last_sigma(plan: Plan) -> float:
    """sigma_1 where none is given: the noise of the step before the last, as Ho et al. (2020) do.

    Raises:
        DdimError: If the plan has one step only.
    """
    if len(plan) < 2:
        raise DdimError(
            "plan",
            "has one step only, so no step before the last",
            either("take two steps or more", "say it with last_sigma=0.01"),
        )
    return plan.rows[-2].z
