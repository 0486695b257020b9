"""DDIM, DDPM and everything between: one state, one prediction, eq. (12)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ddim.errors import DdimError
from ddim.gaussian import posterior_weights, sigma_hat
from ddim.gaussian import sigma as sigma_of_eta
from ddim.plan import Plan, Row
from ddim.schedule import Level


def ddim(
    levels: Sequence[Level],
    eta: float = 0.0,
    sigma: Sequence[float] | str | None = None,
    clip_x0: bool | None = None,
    clean_as: Level | None = None,
    about: str = "",
) -> Plan:
    """Eq. (12): x_next = signal_next f_theta + sqrt(1 - abar_next - sigma^2) eps_theta + sigma z, over any levels.

    Falling levels sample; rising levels encode, which is eq. (13) run backwards (then eta must be 0).

    Args:
        levels: S + 1 levels, the start first; falling, or rising to encode.
        eta: sigma = eta times the posterior's, eq. (16): 0 is DDIM, 1 is DDPM.
        sigma: Instead of eta: S legal standard deviations, one per step, or "hat" for the paper's sigma-hat
            (mean as for eta = 1, larger noise, none at the last step, x_0 clipped as in the authors' code).
        clip_x0: Whether x_0 is clipped to [-1, 1]; by default only with "hat".
        clean_as: The level the network is told for clean data, when encoding starts at t = 0, a time it was never
            trained on; the next level if None.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If there are no steps, levels do not fall or rise, or eta or sigma is not legal.
    """
    steps = list(itertools.pairwise(levels))
    if not steps:
        raise DdimError("levels", "hold no step", "give at least two levels")
    rising = levels[-1].log_snr < levels[0].log_snr
    for now, following in steps:
        if (following.log_snr < now.log_snr) != rising or following.log_snr == now.log_snr:
            raise DdimError(f"level t = {following.t:g}", "breaks the order", "give levels that only fall or only rise")
    if not (math.isfinite(eta) and eta >= 0):
        raise DdimError(f"eta {eta}", "is not a number >= 0", "use 0 for DDIM, 1 for DDPM")
    hat = isinstance(sigma, str) and sigma == "hat"
    if isinstance(sigma, str) and not hat:
        raise DdimError(f"sigma {sigma!r}", "is unknown", "give 'hat' or one number per step")
    if sigma is not None and eta:
        raise DdimError("eta and sigma", "are both given", "give one of them")
    if rising and (eta or sigma is not None):
        raise DdimError("encoding", "cannot add noise", "use eta 0 with rising levels")
    if rising:
        rows = [_rising(now, following, clean_as) for now, following in steps]
        return Plan("ddim", tuple(rows), bool(clip_x0), about=_join(about, "encode")).check()

    if hat:
        sigmas = [sigma_of_eta(*step) for step in steps]
        added = [sigma_hat(*step) if step[1].t > 0 else 0.0 for step in steps]
    elif sigma is not None:
        sigmas = added = _legal(sigma, steps)
    else:
        sigmas = added = [sigma_of_eta(*step, eta) if eta else 0.0 for step in steps]
        _legal(sigmas, steps)
    rows = [_row(*step, s, z) for step, s, z in zip(steps, sigmas, added, strict=True)]
    name, setting = ("ddpm", "sigma-hat") if hat else ("ddim", "sigma given" if sigma is not None else f"eta={eta:g}")
    clip = hat if clip_x0 is None else clip_x0
    return Plan(name, tuple(rows), clip, keeps_marginals=not hat, about=_join(about, setting)).check()


def _row(now: Level, following: Level, sigma: float, added: float) -> Row:
    signal, direction = posterior_weights(now, following, sigma)
    return Row(now, following, x0=(signal,), eps=(direction,), z=added, sigma=sigma)


def _rising(now: Level, following: Level, clean_as: Level | None) -> Row:
    """From clean data the state itself is x_0: only eps is asked, at the level the network is told."""
    if now.t > 0:
        return _row(now, following, 0.0, 0.0)
    return Row(now, following, x=(following.signal,), eps=(following.noise,), at=clean_as or following)


def _legal(sigma: Sequence[float] | str, steps: list[tuple[Level, Level]]) -> list[float]:
    values = [float(s) for s in sigma]
    if len(values) != len(steps):
        raise DdimError("sigma", f"holds {len(values)} numbers for {len(steps)} steps", "give one per step")
    for value, (now, following) in zip(values, steps, strict=True):
        if not (value >= 0 and value**2 <= following.variance * (1 + 1e-12)):
            where = f"the step from t = {now.t:g} to {following.t:g}"
            raise DdimError(where, f"sigma = {value:.6g} is outside 0..{following.noise:.6g}", "lower eta or sigma")
    return values


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
