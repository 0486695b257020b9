"""Samplers: functions from levels to a `Plan`, one file per family."""

from ddim.samplers.ddim import ddim

__all__ = ["ddim"]
