"""Samplers (section 4 of the paper): functions from levels to a `Plan`, one file per family.

Imports `plan`, `process` and the packages below them.
"""

from ddim.samplers.categorical import DISCRETE, discrete, discrete_markov
from ddim.samplers.ddim import ddim
from ddim.samplers.multistep import adams_bashforth, deis, dpm_solver_pp, ipndm, unipc
from ddim.samplers.registry import ONE_EVALUATION, SAMPLERS, named, recommended
from ddim.samplers.reversible import bdia, ddim_target, o_belm
from ddim.samplers.runge_kutta import probability_flow, runge_kutta
from ddim.samplers.settings import SamplerSettings

__all__ = [
    "DISCRETE",
    "ONE_EVALUATION",
    "SAMPLERS",
    "SamplerSettings",
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
]
