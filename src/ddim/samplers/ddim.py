"""The samplers of eq. (12), from DDIM to DDPM: each step uses one state and one prediction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.gaussian import posterior_weights, sigma_hat, weight_of_x0
from ddim.process.gaussian import sigma as sigma_of_eta
from ddim.process.schedule import Level

Error = Callable[[Level], float]

LARGEST_ETA = 1e6
"""The largest eta accepted: beyond it sigma^2 can overflow before its range is checked."""


def ddim(
    levels: Sequence[Level],
    eta: float = 0.0,
    sigma: Sequence[float] | str | None = None,
    clip_x0: bool | None = None,
    clean_as: Level | None = None,
    about: str = "",
    error: Error | None = None,
    noise_at_end: bool = False,
) -> Plan:
    """Eq. (12): x_next = signal_next f_theta + sqrt(1 - abar_next - sigma^2) eps_theta + sigma z, over any levels.

    Falling levels sample; rising levels encode, which is eq. (13) run backwards (then eta must be 0).

    Args:
        levels: S + 1 levels, the start first; falling, or rising to encode.
        eta: sigma is eta times the posterior's standard deviation, eq. (16): 0 is DDIM, 1 is DDPM.
        sigma: Instead of eta: S standard deviations, one per step; "hat" for the paper's sigma-hat (the mean of
            eta = 1, larger noise, x_0 clipped as in the authors' code); or "learned" for the mean of eta = 1 with a
            variance that the network predicts for each element, between those of the posterior and of sigma-hat
            (Nichol & Dhariwal 2021). Together with eta: "optimal", the mean of eta with the noise of `sigma_optimal`.
        clip_x0: Whether x_0 is clipped to [-1, 1]; by default only with "hat".
        clean_as: The level passed to the network for clean data when encoding starts at t = 0, a timestep that it was
            never trained on; the next level if None.
        about: Settings to add to the plan's name.
        error: For "optimal", E ||eps - eps_theta||^2 / d at a level.
        noise_at_end: Whether "hat" and "optimal" also add noise at the step to clean data, as in theory.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If there are no steps, levels neither fall nor rise throughout, or eta, sigma or the error is out of
            range.
    """
    steps = list(itertools.pairwise(levels))
    named = sigma if isinstance(sigma, str) else None
    rising = _rises(steps)
    _check_settings(eta, sigma, rising)
    if rising:
        rows = [_rising(now, following, clean_as) for now, following in steps]
        return Plan("ddim", tuple(rows), bool(clip_x0), about=_join(about, "encode")).check()

    name, setting, mean_as = "ddim", f"eta={eta:g}", 1.0 if named in ("hat", "learned") else eta
    sigmas = [sigma_of_eta(*step, mean_as) if mean_as else 0.0 for step in steps]
    if sigma is not None and not named:
        sigmas, setting = [float(value) for value in sigma], "custom sigma"
    added = _check_sigmas(sigmas, steps)
    if named == "hat":
        name, setting, added = "ddpm", "sigma-hat", [sigma_hat(*step) for step in steps]
    elif named == "learned":
        name, setting = "ddpm", "sigma learned"
    elif named:
        setting, added = f"sigma optimal, {setting}", _optimal(steps, sigmas, error, noise_at_end)
    if named and not noise_at_end:  # for "learned" the posterior variance is 0 at the last step anyway
        added = [z if following.t > 0 else 0.0 for z, (_, following) in zip(added, steps, strict=True)]
    rows = [_row(*step, s, z) for step, s, z in zip(steps, sigmas, added, strict=True)]
    if named == "learned":
        rows = [replace(row, z_high=sigma_hat(row.now, row.next)) if row.z else row for row in rows]
    clip = named == "hat" if clip_x0 is None else clip_x0
    return Plan(name, tuple(rows), clip, keeps_marginals=not named, about=_join(about, setting)).check()


def sigma_optimal(now: Level, next: Level, error: float, sigma: float = 0.0) -> float:
    """The noise that corrects a step's variance: sigma*^2 = sigma^2 + k^2 error (Bao et al. 2022, theorem 1).

    A step uses the predicted eps and so misses the variance of eps - eps_theta, which is `error`. eps enters both terms
    of eq. (12), with the total weight k = sqrt(1 - abar_next - sigma^2) - sqrt(abar_next) noise_now / signal_now. If
    the network is ideal and its error isotropic, x_next has the covariance of the true marginal.

    Args:
        now: The level at the start of the step, with signal.
        next: The cleaner level at its end.
        error: E ||eps - eps_theta||^2 / d at `now`, in 0..1.
        sigma: The sigma in the mean of eq. (12), 0 <= sigma^2 <= 1 - alpha_bar_next.

    Raises:
        DdimError: If the error is outside 0..1 or there is no signal at `now`.
    """
    if not 0 <= error <= 1:
        problem = f"the error in eps is {error:.6g}, outside 0..1"
        raise DdimError(f"sigma optimal at t = {now.t:g}", problem, "train longer, or omit such timesteps")
    if now.signal == 0:
        problem = "there is no signal, so eps does not determine x_0"
        raise DdimError(f"sigma optimal at t = {now.t:g}", problem, "start the grid at a lower timestep")
    return math.hypot(sigma, weight_of_x0(now, next, sigma) * now.ratio * math.sqrt(error))


def _rises(steps: list[tuple[Level, Level]]) -> bool:
    """Whether the levels rise; raises a DdimError unless they rise throughout or fall throughout."""
    if not steps:
        raise DdimError("levels", "have no step", "pass at least two levels")
    rising = steps[-1][1].log_snr < steps[0][0].log_snr
    for now, following in steps:
        if (following.log_snr < now.log_snr) != rising or following.log_snr == now.log_snr:
            raise DdimError(f"level t = {following.t:g}", "is out of order", "pass levels that only fall or only rise")
    return rising


def _check_settings(eta: float, sigma: Sequence[float] | str | None, rising: bool) -> None:
    """Raise a DdimError for invalid or incompatible settings."""
    if not 0 <= eta <= LARGEST_ETA:
        raise DdimError(f"eta {eta}", f"is not a number in 0..{LARGEST_ETA:g}", "use 0 for DDIM, 1 for DDPM")
    if isinstance(sigma, str) and sigma not in ("hat", "optimal", "learned"):
        raise DdimError(f"sigma {sigma!r}", "is unknown", "use 'hat', 'optimal', 'learned' or one number per step")
    if sigma is not None and eta and not (isinstance(sigma, str) and sigma == "optimal"):
        raise DdimError("eta and sigma", "are both given", "use one of them")
    if rising and (eta or sigma is not None):
        raise DdimError("encoding", "cannot add noise", "use eta 0 with rising levels")


def _optimal(steps: list[tuple[Level, Level]], sigmas: list[float], error: Error | None, at_end: bool) -> list[float]:
    if error is None:
        raise DdimError("sigma 'optimal'", "needs the network's error", "pass `error`, or use Model.plan")
    return [
        sigma_optimal(*step, error(step[0]), s) if step[1].t > 0 or at_end else 0.0
        for step, s in zip(steps, sigmas, strict=True)
    ]


def _row(now: Level, following: Level, sigma: float, added: float) -> Row:
    signal, direction = posterior_weights(now, following, sigma)
    return Row(now, following, x0=(signal,), eps=(direction,), z=added, sigma=sigma)


def _rising(now: Level, following: Level, clean_as: Level | None) -> Row:
    """A step of encoding. From clean data the state itself is x_0, so only eps is predicted, at level `clean_as`."""
    if now.t > 0:
        return _row(now, following, 0.0, 0.0)
    return Row(now, following, x=(following.signal,), eps=(following.noise,), at=clean_as or following)


def _check_sigmas(values: list[float], steps: list[tuple[Level, Level]]) -> list[float]:
    if len(values) != len(steps):
        raise DdimError("sigma", f"has {len(values)} values for {len(steps)} steps", "pass one per step")
    for value, (now, following) in zip(values, steps, strict=True):
        if not (value >= 0 and value**2 <= following.variance * (1 + 1e-12)):
            where = f"the step from t = {now.t:g} to {following.t:g}"
            raise DdimError(where, f"sigma = {value:.6g} is outside 0..{following.noise:.6g}", "lower eta or sigma")
    return values


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
