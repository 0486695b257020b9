"""`--like`: the plan of another library, and the rows in which it differs from ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._options import make_plan
from ddim.errors import DdimError
from ddim.names import EMULATED

if TYPE_CHECKING:
    from ddim.plan.diff import Difference
    from ddim.plan.plan import Plan
    from ddim.process.schedule import Schedule

_CLIPPING = {"diffusers": "clip_sample", "openai": "clip_denoised"}


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
    defaults = diffusers.emulation(model.config) if name == "diffusers" else {}
    explicit, settings = settings, defaults | settings
    options = {"eta": eta, _CLIPPING.get(name, "clip"): clip_x0}
    for key, value in options.items():
        if value is not None and key in explicit:
            raise DdimError(f"--like {like}", f"and an option both set {key}", "set it once")
        settings |= {} if value is None else {key: value}
    count = min(20, model.schedule.T) if steps is None else steps
    return emulate.plan(name, model.schedule, count, **settings), settings


def comparison(model: Any, emulated: Plan, settings: Mapping[str, Any], steps: int | None, grid: str | None) -> str:
    """The output of --diff: the two tables, and the rows that differ with their differences.

    Args:
        model: The model, of images.
        emulated: The plan of --like.
        settings: The settings of `emulated`.
        steps: S of our plan, if `grid` is not None.
        grid: The timesteps of our plan; those of `emulated` if None.
    """
    from ddim.interop import emulate
    from ddim.plan.diff import clipping, differences

    eta = float(settings.get("eta", 0.0))
    sigma = "hat" if settings.get("sample_type") == "ddpm_noisy" else None
    if grid is None:
        plan = emulate.reference_plan(emulated, eta, sigma)
    else:
        plan = make_plan(
            model,
            steps,
            grid,
            "ddim",
            ({"sigma": sigma} if sigma else {"eta": eta}) | {"clip_x0": emulated.clip_x0},
        )
    differing = differences(emulated, plan)
    rows = max(emulated.nfe, plan.nfe)
    lines = [
        f"compared: {emulated.name} with {plan.name}, {'rows of one time' if grid is None else 'row after row'}",
        *(f"clipping differs: {text}" for text in [clipping(emulated, plan)] if text),
        f"rows that differ: {len(differing)} of {rows}"
        + (f", {emulated.sampler} less {plan.sampler}" if differing else ""),
        *(_table(differing, emulated, plan, model.schedule) if differing else []),
    ]
    return "\n".join([str(emulated), "", str(plan), "", *lines])


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


def _table(rows: list[Difference], emulated: Plan, plan: Plan, schedule: Schedule) -> list[str]:
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
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _number(value: float) -> str:
    if abs(value) < 1e-12:
        return "."
    return f"{value:+.6f}" if abs(value) >= 1e-6 else f"{value:+.1e}"
