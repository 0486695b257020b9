"""Data distributions with a closed-form denoiser, score, density and flow, for measuring samplers and models.

This package imports `plan`, `process` and lower layers.
"""

from ddim.exact.empirical import EmpiricalData
from ddim.exact.gaussian import GaussianData
from ddim.exact.mixture import MixtureData
from ddim.exact.tokens import IidTokens, MarkovTokens

__all__ = [
    "EmpiricalData",
    "GaussianData",
    "IidTokens",
    "MarkovTokens",
    "MixtureData",
]
