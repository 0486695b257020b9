"""`--like`: the plan of another library, and what differs from ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from ddim._io.terminal import table, terminal_width, wrapped
from ddim.cli._options import make_plan
from ddim.errors import DdimError
from ddim.names import EMULATED

if TYPE_CHECKING:
    from ddim.plan.diff import Difference
    from ddim.plan.plan import Plan
    from ddim.process.schedule import Schedule

_CLIPPING = {"diffusers": "clip_sample", "diffusers-ddpm": "clip_sample", "openai": "clip_denoised"}


def like_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --like."""
    text = f"Emulate another library's sampler, quirks included: {', '.join(EMULATED)} (official is the DDIM authors' "
    text += "code). Settings follow a colon, as in diffusers:spacing=trailing,steps_offset=1; see ddim.emulate."
    return click.option("--like", metavar="NAME", help=text)(function)


def make_like(
    model: Any,
    like: str,
    steps: int | None,
    eta: float | None,
    clip_x0: bool | None,
    others: Mapping[str, Any],
) -> tuple[Plan, dict[str, Any]]:
    """The plan of --like, and its settings.

    Args:
        model: A model of any modality.
        like: The value of --like.
        steps: S; 20 if None, or T if that is smaller.
        eta: The value of --eta.
        clip_x0: The value of --clip.
        others: Options that cannot be combined with --like; None for those not passed.

    Raises:
        DdimError: If one of `others` was passed, the model is of discrete data, or a setting does not exist in that
            library.
    """
    from ddim.interop import emulate
    from ddim.model.importers import diffusers

    for option in (name for name, value in others.items() if value is not None):
        hint = "leave the other out; settings follow a colon, such as diffusers:spacing=linspace"
        raise DdimError(f"--like and --{option.replace('_', '-')}", "cannot be combined", hint)
    if model.config.categorical is not None:
        raise DdimError("--like", "applies to real-valued images, the data are discrete", "leave it out")
    name, settings = _parsed(like)
    recorded = diffusers.emulation(model.config) if name in ("diffusers", "diffusers-ddpm") else {}
    defaults = {key: value for key, value in recorded.items() if key in emulate.defaults(name)}
    explicit, settings = settings, defaults | settings
    options = {"eta": eta, _CLIPPING.get(name, "clip"): clip_x0}
    for key, value in options.items():
        if value is not None and key in explicit:
            raise DdimError(f"--like {like}", f"and an option both set {key}", "set it once")
        settings |= {} if value is None else {key: value}
    count = min(20, model.schedule.T) if steps is None else steps
    return emulate.plan(name, model.schedule, count, **settings), settings


def counterpart(model: Any, emulated: Plan, settings: Mapping[str, Any], steps: int | None, grid: str | None) -> Plan:
    """The plan of this library to compare with that of --like.

    Args:
        model: The model, of images.
        emulated: The plan of --like.
        settings: The settings of `emulated`.
        steps: S of our plan, if `grid` is not None.
        grid: The timesteps of our plan; those of `emulated` if None.
    """
    from ddim.interop import emulate

    hats = {"ddpm_noisy": "hat", "fixed_large": "hat", "learned_range": "learned"}
    sigma = hats.get(settings.get("sample_type", settings.get("variance_type")))
    eta = float(settings.get("eta", emulated.sampler == "diffusers-ddpm" and sigma is None))
    if grid is None:
        return emulate.reference_plan(emulated, eta, sigma)
    noise = {"sigma": sigma} if sigma else {"eta": eta}
    plan: Plan = make_plan(model, steps, grid, "ddim", noise | {"clip_x0": emulated.clip_x0})
    return plan


def comparison(model: Any, emulated: Plan, plan: Plan, same_times: bool) -> str:
    """The output of --diff: what differs in one line, how it differs, and the rows whose weights differ.

    Args:
        model: The model, of images.
        emulated: The plan of --like.
        plan: Our plan, see `counterpart`.
        same_times: Whether both have the same timesteps, so that rows of one time are compared.
    """
    from ddim.plan.diff import clipping, differences

    differing, rows, width = differences(emulated, plan), max(emulated.nfe, plan.nfe), terminal_width()
    fast = model.conditions["dtype"]
    about = {
        "clipping": clipping(emulated, plan),
        "noise": f"{emulated.emulates} {_noise_of(emulated)}, `ddim sample` from one Philox stream per sample",
        "precision": ""
        if fast == "float32"
        else f"{emulated.emulates} computes in float32, `ddim sample` on a CPU in {fast}",
    }
    hints = {
        "noise": "`ddim sample --noise torch:SEED` draws as it does" if emulated.emulates == "diffusers" else "",
        "precision": "`ddim sample --precision float32` is equal",
    }
    first = [f"coefficients differ in {len(differing)} of {rows} rows" if differing else "same coefficients"]
    lines = [
        "; ".join(first + [f"{what} differs" if text else f"same {what}" for what, text in about.items()]),
        f"compared: {emulated.name} with {plan.name}, {'rows of one time' if same_times else 'row after row'}",
        *(f"{what}: {text}" + (f"; {hints[what]}" if hints.get(what) else "") for what, text in about.items() if text),
        f"sampler: {_default_sampler(model, emulated)}",
    ]
    lines = [line for text in lines for line in wrapped(text, width, again="  ")]
    if differing:
        lines += [f"rows that differ, {emulated.sampler} less {plan.sampler}:"]
        lines += table(_columns(differing, emulated, plan, model.schedule), width)
    return "\n".join(lines)


def _noise_of(emulated: Plan) -> str:
    """How a library draws its noise."""
    if emulated.emulates == "diffusers":
        return "draws a whole batch at once from a torch.Generator"
    return "draws a whole batch at once from torch's global generator of the device"


def _default_sampler(model: Any, emulated: Plan) -> str:
    """What `ddim sample` runs without --like."""
    from ddim.samplers import recommended

    name, spacing = recommended(emulated.nfe, model.schedule, model.config.predicts)
    return f"without --like and --sampler, `ddim sample` runs {name} at {spacing} timesteps, not ddim at these"


def _parsed(like: str) -> tuple[str, dict[str, Any]]:
    """The library's name and the settings in `name:key=value,...`."""
    from ddim.interop import emulate

    name, _, rest = like.partition(":")
    defaults, settings = emulate.defaults(name), {}
    for part in rest.split(",") if rest else []:
        key, equals, text = part.partition("=")
        if not equals or key not in defaults:
            raise DdimError(
                f"--like {like}", f"{part!r} is not a setting of {name}", f"use {', '.join(defaults)} as key=value"
            )
        settings[key] = _value(f"--like {like}", key, text, type(defaults[key]))
    return name, settings


def _value(subject: str, key: str, text: str, kind: type) -> Any:
    if kind is bool and text in ("true", "false"):
        return text == "true"
    try:
        if kind is not bool:
            return kind(text)
    except ValueError:
        pass
    words = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise DdimError(subject, f"{key} is not {words}", f"write {key}={'true' if kind is bool else 1}")


def _columns(rows: list[Difference], emulated: Plan, plan: Plan, schedule: Schedule) -> list[tuple[str, list[str]]]:
    lines: list[tuple[str, ...]] = [("row", "from", "to", "target", "x0", "eps", "z")]
    for difference in rows:
        plan_row = None if difference.second is None else plan.rows[difference.second]
        if difference.first is None:
            assert plan_row is not None
            lines.append(
                (
                    str(difference.second),
                    f"{plan_row.now.t:g}",
                    f"{plan_row.next.t:g}",
                    f"only in {plan.sampler}",
                    *"...",
                )
            )
            continue
        row, number = emulated.rows[difference.first], str(difference.first)
        if plan_row is None:
            lines.append((number, f"{row.now.t:g}", f"{row.next.t:g}", f"only in {emulated.sampler}", *"..."))
            continue
        times = [
            f"{a.t:g}" if a == b else f"{a.t:g} / {b.t:g}"
            for a, b in ((row.now, plan_row.now), (row.next, plan_row.next))
        ]
        signal, _ = emulated.mean_weights(difference.first)
        target_time = schedule.time_at_angle(math.acos(min(signal, 1.0)))
        lines.append(
            (
                number,
                *times,
                f"{round(target_time, 2):g}",
                *(_number(value) for value in (difference.x0, difference.eps, difference.z)),
            )
        )
    return [(head, cells) for head, *cells in map(list, zip(*lines, strict=True))]


def _number(value: float) -> str:
    if abs(value) < 1e-12:
        return "."
    return f"{value:+.6f}" if abs(value) >= 1e-6 else f"{value:+.1e}"
