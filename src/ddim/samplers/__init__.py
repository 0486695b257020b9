"""Samplers: functions from levels to a `Plan`, one file per family."""

from ddim.samplers.ddim import ddim
from ddim.samplers.discrete import DISCRETE, discrete, discrete_markov
from ddim.samplers.multistep import adams_bashforth, deis, dpm_solver_pp, ipndm, unipc
from ddim.samplers.named import NAMED, ONE_CALL, named, recommended
from ddim.samplers.ode import probability_flow, runge_kutta
from ddim.samplers.reversible import bdia, ddim_target, o_belm
from ddim.samplers.walk import walk

__all__ = [
    "DISCRETE",
    "NAMED",
    "ONE_CALL",
    "adams_bashforth",
    "bdia",
    "ddim",
    "ddim_target",
    "deis",
    "discrete",
    "discrete_markov",
    "dpm_solver_pp",
    "ipndm",
    "named",
    "o_belm",
    "probability_flow",
    "recommended",
    "runge_kutta",
    "unipc",
    "walk",
]
