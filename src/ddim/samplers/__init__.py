"""Samplers: functions from levels to a `Plan`, one file per family."""

from ddim.samplers.ddim import ddim
from ddim.samplers.ode import probability_flow, runge_kutta
from ddim.samplers.walk import walk

__all__ = ["ddim", "probability_flow", "runge_kutta", "walk"]
