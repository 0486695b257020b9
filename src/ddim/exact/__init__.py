"""Data whose ideal denoiser, score, density and flow are known: instruments that measure samplers and models.

It imports `plan`, `process` and what is below.
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
