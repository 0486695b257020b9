"""Samplers of discrete data: the family of Appendix A, and the reverse Markov chain, which is not a member of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ddim.errors import DdimError
from ddim.plan.categorical import CategoricalPlan, CategoricalRow, Kernel
from ddim.process.categorical import Alphabet, markov_weights, mixture_weights, sigma_largest
from ddim.process.schedule import Level

DISCRETE = ("ddim", "markov")
"""The names of the samplers of discrete data."""


def discrete(
    levels: Sequence[Level],
    alphabet: Alphabet,
    eta: float = 0.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    about: str = "",
) -> CategoricalPlan:
    """The sampler of Appendix A over any levels: sigma = (1 - eta) (1 - abar_next) / (1 - abar_now), see eq. (18).

    As for `ddim.samplers.ddim`, eta = 0 is the least random member. For discrete data it has the largest sigma, which
    draws no fresh noise; with a mask it is absorbing diffusion, and eta > 0 remasks tokens (Wang et al. 2025, ReMDM).
    eta = 1 is sigma = 0: every token is redrawn at every step.

    Args:
        levels: S + 1 falling levels, the noisiest first.
        alphabet: The categories and the noise distribution.
        eta: 0..1.
        temperature: See `ddim.categorical.sharpen`, which is applied to each predicted x_0.
        top_p: See `ddim.categorical.sharpen`.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If levels do not fall, or a setting is out of range.
    """
    if not 0 <= eta <= 1:
        raise DdimError(f"eta {eta}", "is outside 0..1", "use 0 for the least random kernel, 1 for the most")
    rows = []
    for now, next in _steps(levels):
        sigma = 0.0 if eta == 1 else (1 - eta) * sigma_largest(now, next)
        rows.append(CategoricalRow(now, next, *mixture_weights(now, next, sigma)))
    return _plan("discrete-ddim", "ddim", rows, alphabet, (temperature, top_p), about, f"eta={eta:g}")


def discrete_markov(
    levels: Sequence[Level],
    alphabet: Alphabet,
    temperature: float = 1.0,
    top_p: float = 1.0,
    about: str = "",
) -> CategoricalPlan:
    """The reverse Markov chain, `ddim.categorical.markov_posterior`: multinomial diffusion and D3PM.

    Args:
        levels: As for `discrete`.
        alphabet: As for `discrete`.
        temperature: As for `discrete`.
        top_p: As for `discrete`.
        about: As for `discrete`.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: As for `discrete`.
    """
    rows = [CategoricalRow(now, next, *markov_weights(now, next)) for now, next in _steps(levels)]
    return _plan("markov", "markov", rows, alphabet, (temperature, top_p), about)


def _plan(
    name: str,
    kernel: Kernel,
    rows: list[CategoricalRow],
    alphabet: Alphabet,
    sharpening: tuple[float, float],
    *about: str,
) -> CategoricalPlan:
    settings = [part for part in about if part]
    settings += [
        f"{label}={value:g}" for label, value in zip(("temperature", "top-p"), sharpening, strict=True) if value != 1
    ]
    return CategoricalPlan(name, tuple(rows), alphabet.weights, kernel, *sharpening, about=", ".join(settings)).check()


def _steps(levels: Sequence[Level]) -> list[tuple[Level, Level]]:
    steps = list(itertools.pairwise(levels))
    if not steps:
        raise DdimError("levels", "have no step", "pass at least two levels")
    for now, following in steps:
        if not following.log_snr > now.log_snr:
            raise DdimError(f"level t = {following.t:g}", "is not cleaner than the one before", "pass falling levels")
    return steps
