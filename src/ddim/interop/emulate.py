"""Plans that reproduce the samplers of other libraries, including their quirks, to find the rows where results differ.

| name      | library                                      | differences                                              |
|-----------|----------------------------------------------|----------------------------------------------------------|
| diffusers | `DDIMScheduler`                              | steps to t - T // S, whatever its next timestep is;      |
|           |                                              | clips x_0 without changing eps                           |
| diffusers-ddpm | `DDPMScheduler`                         | with "fixed_large", adds noise in a last step from t > 1 |
| official  | the DDIM authors' `generalized_steps` and    | more than S steps where T // S does not divide T;        |
|           | `ddpm_steps`                                 | "quad" ends at 0.8 T and may repeat timesteps            |
| openai    | `ddim_sample` of improved-diffusion and      | needs an integer stride of exactly S entries ("ddimS"),  |
|           | guided-diffusion, over a respaced process    | or a fractional one; clips x_0 and derives eps again     |

Timesteps are t = 1..T, as everywhere in this package; these libraries count t - 1. The plans are float64 and do not
reproduce the libraries' float32 arithmetic, nor the timesteps that they feed their networks.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from ddim import samplers
from ddim.errors import DdimError, warn
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process import gaussian, timesteps
from ddim.process.schedule import Level, Schedule

LIBRARIES = {
    "diffusers": "diffusers",
    "diffusers-ddpm": "diffusers",
    "official": "the authors' code",
    "openai": "openai's code",
}
Spacing = Literal["leading", "trailing", "linspace"]
SkipType = Literal["uniform", "quad"]
SampleType = Literal["generalized", "ddpm_noisy"]
Respacing = Literal["ddim", "fractional"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]


def plan(name: str, schedule: Schedule, steps: int, **settings: Any) -> Plan:
    """The plan that another library runs.

    Args:
        name: One of `NAMES`.
        schedule: The noise schedule, with the library's T.
        steps: S, the requested number of steps, 1..T; the plan may have more.
        settings: See `diffusers`, `diffusers_ddpm`, `official` and `openai`; the defaults are those of the library.

    Returns:
        A plan whose `emulates` names the library. Each row starts at the level of one network evaluation and ends at
        the level of the next, but its weights step to the level that the library steps to; see `Plan.check`.

    Raises:
        DdimError: For an unknown name or setting, or where the library itself fails.

    Warns:
        DdimWarning: If the plan has another number of steps.
    """
    choices = defaults(name)
    for key in settings:
        if key not in choices:
            raise DdimError(f"{name} {key}", "is not a setting", f"choose from {', '.join(choices)}")
    result = PRESETS[name](schedule, steps, **settings)
    if result.nfe != steps:
        warn(f"{name}: {steps} steps requested, it runs {result.nfe}")
    return result


def defaults(name: str) -> dict[str, Any]:
    """A preset's settings and their defaults.

    Raises:
        DdimError: If there is no such preset.
    """
    if name not in PRESETS:
        raise DdimError(f"emulation {name!r}", "is unknown", f"choose one of {', '.join(NAMES)}")
    parameters = inspect.signature(PRESETS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def diffusers(
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    clip_sample: bool = True,
    use_clipped_model_output: bool = False,
    eta: float = 0.0,
) -> Plan:
    """diffusers' `DDIMScheduler`: every step goes to t - T // S, or to the final level if that is below 1.

    Args:
        schedule: The noise schedule.
        steps: S.
        spacing: Its `timestep_spacing`.
        steps_offset: Added to "leading" timesteps.
        set_alpha_to_one: Whether the last step goes to clean data; otherwise to diffusers' timestep 0, t = 1.
        clip_sample: Whether x_0 is clipped to [-1, 1] (`clip_sample_range` 1).
        use_clipped_model_output: Whether eps is derived again from the clipped x_0.
        eta: Multiplies the standard deviation of a step to t - T // S.

    Raises:
        DdimError: If a setting is unknown, eta is too large, or the scheduler would index outside its table.
    """
    times, about = _spaced("diffusers", schedule, steps, spacing, steps_offset)
    final, stride = schedule.level(0 if set_alpha_to_one else 1), schedule.T // steps
    rows = [
        _row(schedule.level(t), schedule.level(after), schedule.level(t - stride) if t > stride else final, eta)
        for t, after in itertools.pairwise([*times, 0])
    ]
    about.insert(2, f"eta={eta:g}")
    about += [] if set_alpha_to_one else ["to alpha_0"]
    return _checked_plan("diffusers", rows, clip_sample, about, eps_kept=clip_sample and not use_clipped_model_output)


def diffusers_ddpm(
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    clip_sample: bool = True,
    variance_type: VarianceType = "fixed_small",
) -> Plan:
    """diffusers' `DDPMScheduler`: ancestral steps to its next timestep, finally to clean data.

    Args:
        schedule: The noise schedule.
        steps: S.
        spacing: Its `timestep_spacing`.
        steps_offset: Added to "leading" timesteps.
        clip_sample: Whether x_0 is clipped to [-1, 1] (`clip_sample_range` 1), and the mean computed from it.
        variance_type: "fixed_small" is sigma at eta 1, "fixed_large" the paper's sigma-hat, "learned_range" the
            network's own between the two.

    Raises:
        DdimError: If a setting is unknown, or the scheduler would index outside its table.
    """
    times, about = _spaced("diffusers-ddpm", schedule, steps, spacing, steps_offset)
    return ddpm_at(schedule, times, clip_sample, variance_type, about)


def ddpm_at(
    schedule: Schedule, times: Sequence[float], clip_sample: bool, variance_type: VarianceType, about: Sequence[str]
) -> Plan:
    """The plan of diffusers' `DDPMScheduler` at falling timesteps; see `diffusers_ddpm` for the other arguments."""
    _choice("diffusers-ddpm variance_type", variance_type, VarianceType)
    rows = []
    for t, after in itertools.pairwise([*times, 0]):
        now, following = schedule.level(t), schedule.level(after)
        row = _row(now, following, following, 1.0)
        if variance_type not in ("fixed_small", "fixed_small_log"):
            hat = abs(gaussian.sigma_hat(now, following)) if t > 1 else 0.0
            small = max(row.sigma, 1e-10) if hat else 0.0  # its lower bound of the variance, of which it takes the log
            row = replace(row, z=small, z_high=hat) if variance_type == "learned_range" else replace(row, z=hat)
        rows.append(row)
    fixed_small = all(row.z == row.sigma for row in rows)
    return _checked_plan("diffusers-ddpm", rows, clip_sample, [*about, variance_type], hat=not fixed_small)


def official(
    schedule: Schedule,
    steps: int,
    *,
    skip_type: SkipType = "uniform",
    sample_type: SampleType = "generalized",
    eta: float = 0.0,
) -> Plan:
    """The DDIM authors' code: steps to its next timestep, finally to alpha_bar = 1, without clipping.

    Args:
        schedule: The noise schedule.
        steps: S; "uniform" has more steps where T // S does not divide T.
        skip_type: "uniform" is range(0, T, T // S), "quad" is linspace(0, sqrt(0.8 T), S)^2 truncated; where two
            entries are truncated to one timestep, the step between them changes nothing.
        sample_type: "ddpm_noisy" is the paper's sigma-hat, with x_0 clipped and without eta.
        eta: Multiplies sigma, eq. (16).

    Raises:
        DdimError: If a setting is unknown or eta is too large.
    """
    _choice("official skip_type", skip_type, SkipType)
    _choice("official sample_type", sample_type, SampleType)
    _whole("official", steps, schedule.T)
    noisy = sample_type == "ddpm_noisy"
    if noisy and eta:
        raise DdimError("official ddpm_noisy", "has no eta", "remove eta, or use generalized")
    name = {"uniform": "official-linear", "quad": "official-quadratic"}[skip_type]
    times = sorted(timesteps.NAMED[name](schedule, steps, schedule.T), reverse=True)
    rows = []
    for t, after in itertools.pairwise([*times, 0]):
        now, following = schedule.level(t), schedule.level(after)
        hat = abs(gaussian.sigma_hat(now, following)) if noisy and t > 1 else 0.0
        rows.append(_row(now, following, following, 1.0 if noisy else eta, hat if noisy else None))
    about = [skip_type, f"S={steps}", "sigma-hat" if noisy else f"eta={eta:g}"]
    return _checked_plan("official", rows, noisy, about, hat=noisy)


def openai(
    schedule: Schedule,
    steps: int,
    *,
    respacing: Respacing = "ddim",
    clip_denoised: bool = True,
    eta: float = 0.0,
) -> Plan:
    """improved-diffusion's and guided-diffusion's `ddim_sample`, over the respaced process.

    The respaced betas have the alpha_bar of the selected timesteps, so every step goes to the next of them.

    Args:
        schedule: The noise schedule.
        steps: S.
        respacing: "ddim" is their "ddimS", the first integer stride with exactly S entries; "fractional" is their "S",
            the stride (T - 1) / (S - 1), rounded.
        clip_denoised: Whether x_0 is clipped to [-1, 1], and eps derived from the clipped x_0.
        eta: Multiplies sigma, eq. (16).

    Raises:
        DdimError: If a setting is unknown, eta is too large, or no integer stride has S entries.
    """
    _choice("openai respacing", respacing, Respacing)
    _whole("openai", steps, schedule.T)
    times = sorted((t + 1 for t in _respaced(schedule.T, steps, respacing)), reverse=True)
    rows = [
        _row(schedule.level(t), schedule.level(after), schedule.level(after), eta)
        for t, after in itertools.pairwise([*times, 0])
    ]
    about = [f"{respacing} stride", f"S={steps}", f"eta={eta:g}"]
    return _checked_plan("openai", rows, clip_denoised, about)


def _respaced(T: int, steps: int, respacing: Respacing) -> set[int]:
    if respacing == "fractional":
        # Accumulated and rounded as in their code, so that floating-point rounding and ties agree.
        stride = (T - 1) / max(steps - 1, 1)
        return {round(place) for place in itertools.accumulate([0.0, *[stride] * (steps - 1)])}
    for whole in range(1, T):
        if len(range(0, T, whole)) == steps:
            return set(range(0, T, whole))
    problem = f"no integer stride has exactly {steps} entries in 0..{T - 1}"
    raise DdimError(f"openai ddim{steps}", problem, "choose another S, or respacing fractional")


PRESETS: dict[str, Callable[..., Plan]] = {
    "diffusers": diffusers,
    "diffusers-ddpm": diffusers_ddpm,
    "official": official,
    "openai": openai,
}
NAMES = tuple(PRESETS)


def reference_plan(emulated: Plan, eta: float = 0.0, sigma: str | None = None) -> Plan:
    """This package's DDIM at the timesteps of another library's plan, to compare the two.

    Args:
        emulated: A plan from `plan`.
        eta: Its eta.
        sigma: "hat" if it uses sigma-hat.

    Returns:
        A checked plan with each timestep once; it clips x_0 if that plan does, and derives eps from the clipped x_0.
    """
    visited = {row.now.t: row.now for row in emulated.rows}
    levels = [*sorted(visited.values(), key=lambda level: level.log_snr), emulated.end]
    return samplers.ddim(levels, eta, sigma, emulated.clip_x0, about=f"the same timesteps, S={len(levels) - 1}")


def _spaced(
    name: str, schedule: Schedule, steps: int, spacing: Spacing, steps_offset: int
) -> tuple[list[int], list[str]]:
    """The falling timesteps of a scheduler of diffusers, and their description."""
    _choice(f"{name} spacing", spacing, Spacing)
    _whole(name, steps, schedule.T)
    shift = steps_offset if spacing == "leading" else 0
    times = sorted((t + shift for t in timesteps.NAMED[spacing](schedule, steps, schedule.T)), reverse=True)
    outside = [t for t in times if not 1 <= t <= schedule.T]
    if outside:
        problem = f"uses timestep {outside[0] - 1}, outside 0..{schedule.T - 1}"
        raise DdimError(f"{name} {spacing}, S = {steps}", problem, "choose another S, or steps_offset 0")
    return times, [spacing, f"S={steps}", *([f"offset {shift}"] if shift else [])]


def _row(now: Level, following: Level, aim: Level, eta: float, z: float | None = None) -> Row:
    """A step of eq. (12) to the level `aim`, whose result is then used as the state at `following`."""
    if not (math.isfinite(eta) and eta >= 0):
        raise DdimError(f"eta {eta}", "is not a number >= 0", "use 0 for DDIM, 1 for DDPM")
    sigma = abs(gaussian.sigma(now, aim, eta))
    if sigma**2 > aim.variance * (1 + 1e-12):
        where = f"the step from t = {now.t:g} to {aim.t:g}"
        raise DdimError(where, f"sigma = {sigma:.6g} is outside 0..{aim.noise:.6g}", "lower eta")
    signal, direction = gaussian.posterior_weights(now, aim, sigma)
    return Row(now, following, x0=(signal,), eps=(direction,), z=sigma if z is None else z, sigma=sigma)


def _checked_plan(
    name: str, rows: list[Row], clip: bool, about: list[str], hat: bool = False, eps_kept: bool = False
) -> Plan:
    result = Plan(name, tuple(rows), clip, not hat, ", ".join(about), emulates=LIBRARIES[name], eps_kept=eps_kept)
    return result.check()


def _choice(what: str, value: object, kind: Any) -> None:
    if value not in get_args(kind):
        raise DdimError(f"{what} {value!r}", "is unknown", f"choose one of {', '.join(get_args(kind))}")


def _whole(name: str, steps: int, top: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= top:
        raise DdimError(f"{name}: steps {steps}", f"is not a whole number in 1..{top}", "choose one in that range")
