"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim._io.reading import JSON_BYTES, read_text
from ddim._io.temporary import remove_parts
from ddim.cli._clipping import clip_option
from ddim.errors import DdimError
from ddim.names import SAMPLER_NAMES, SPACINGS

if TYPE_CHECKING:
    from ddim.model.base import ModelBase
    from ddim.model.image import Model
    from ddim.model.tokens import TokenModel
    from ddim.plan.base import BasePlan
    from ddim.plan.plan import Plan

_GRID_HELP = f"Times at which the network is called: {', '.join(SPACINGS)}, or rising times such as 1,250,1000."

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def device_options(function: Callable[..., Any], dtype: str = "auto") -> Callable[..., Any]:
    """--device, --dtype, --compile."""
    for option in (
        click.option("--compile", "compile_", is_flag=True, help="Run the network through torch.compile."),
        click.option(
            "--precision",
            "--dtype",
            "dtype",
            type=click.Choice(["auto", "float32", "float32-fast", "bfloat16"]),
            default=dtype,
            show_default=True,
            help="What the network computes in; auto is bfloat16 where the device has matrix units for it, else "
            "float32-fast, by kernels of our own (to 1e-5), where that can be had; float32 is without approximations.",
        ),
        click.option("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one."),
    ):
        function = option(function)
    return function


def label_of(text: str | None) -> Any:
    """What --label says: a number, "each", or nothing."""
    if text is None or text == "each" or text.lstrip("-").isdigit():
        return text if text in (None, "each") else int(text)
    raise DdimError(f"--label {text}", "is no label", "give a number, or each for the labels in turn")


def exact_device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--device, --dtype, --compile for encoding, where the network's rounding would limit what comes back."""
    return device_options(function, "float32")


def grid_option(*names: str, default: str = SPACINGS[0]) -> Decorator:
    """--grid, or another name where that one is taken; None where it is left out."""
    return click.option(*(names or ("--grid",)), "grid", help=f"{_GRID_HELP} [default: {default}]")


def steps_option(default: int) -> Decorator:
    """--steps; left out with a grid that is a list of times."""
    text = "S, the number of network calls; left out with a list of times. "
    text += f"[default: {default}, or as many as the model has times]"
    return click.option("--steps", type=int, help=text)


def sampler_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--sampler."""
    text = "auto: what docs/solvers.md recommends at so many steps, where nothing else is said; else ddim, which alone "
    text += f"adds noise. One of auto, {', '.join(SAMPLER_NAMES)}."
    return click.option("--sampler", default="auto", show_default=True, help=text)(function)


def noise_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--eta, --sigma, --clip."""
    function = clip_option(function)
    for option in (
        click.option(
            "--sigma",
            help="'hat' for the paper's larger noise; 'learned' for the network's own; 'optimal' for the variance that "
            "fits the model's own error, with the mean of --eta; or one standard deviation per step. All but 'optimal' "
            "instead of --eta.",
        ),
        click.option("--eta", type=float, help="0 is DDIM, 1 is DDPM. [default: 0]"),
    ):
        function = option(function)
    return function


def sharpness_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--temperature, --top-p."""
    for option in (
        click.option("--top-p", type=float, help="Categories: only the likeliest, up to this sum. [default: 1]"),
        click.option("--temperature", type=float, help="Categories: below 1 the prediction is sharper. [default: 1]"),
    ):
        function = option(function)
    return function


def load_any(name: str, device: str | None, dtype: str, compile_: bool, **settings: Any) -> Model | TokenModel:
    """The model of a command's MODEL argument, whatever its data."""
    from ddim.model.load import load

    check_device(device)
    model = load(name, device, dtype=dtype, compile=compile_, **settings)
    for note in model.notes:
        click.echo(f"note: {note}", err=True)
    return model


def load_model(name: str, device: str | None, dtype: str, compile_: bool, **settings: Any) -> Model:
    """The model of a command's MODEL argument, which must be one of real-valued pictures."""
    from ddim.model.image import Model

    model = load_any(name, device, dtype, compile_, **settings)
    if not isinstance(model, Model):
        raise DdimError(name, "is a model of categories", "this command needs one of real-valued pictures")
    return model


def check_device(device: str | None) -> None:
    """Refuse a device that is not there."""
    from ddim.model.devices import usable

    if device is not None:
        usable(device, f"--device {device}")


def make_any_plan(
    model: Model | TokenModel, steps: int | None, grid: str | None, sampler: str, **settings: Any
) -> BasePlan[Any]:
    """The plan that a command's options ask for, of a model of either kind; options left out are None."""
    from ddim.model.image import Model

    settings = {key: value for key, value in settings.items() if value is not None}
    for name in settings.keys() - model.SETTINGS:
        kind = "real-valued data" if isinstance(model, Model) else "categories"
        option = f"--{name.removesuffix('_x0').replace('_', '-')}"
        raise DdimError(option, f"is not a setting of samplers over {kind}", "leave it out")
    if isinstance(model, Model):
        return make_plan(model, steps, grid, sampler=sampler, **settings)
    times = numbers(grid, "--grid") if grid and grid[:1].isdigit() else grid
    return model.plan(steps, times, sampler=sampler, **settings)


def make_plan(
    model: Model,
    steps: int | None,
    grid: str | None,
    eta: float | None = None,
    sigma: str | None = None,
    clip_x0: bool | None = None,
    encode: bool = False,
    default: int = 20,
    sampler: str = "ddim",
    top: int | None = None,
) -> Plan:
    """The plan that a command's options ask for; `default` is its number of steps where none is given."""
    if eta is not None and sigma not in (None, "optimal"):
        raise DdimError("--eta and --sigma", "are both given", "give one of them")
    sigmas = sigma if sigma in (None, "hat", "optimal", "learned") else numbers(sigma, "--sigma")
    times = numbers(grid, "--grid") if grid and grid[:1].isdigit() else grid
    if sampler == "auto" and eta is not None:
        sampler = "ddim"
    return model.plan(steps, times, eta or 0.0, sigmas, clip_x0, encode, default, top, sampler)


def read_plan(model: ModelBase, path: Path, given: Mapping[str, object]) -> BasePlan[Any]:
    """The plan of --plan, over the model's kind of data; beside it none of the options given may have a value."""
    for option in options_given(given):
        raise DdimError(f"--plan and {option}", "are both given", "a plan holds all of it; leave the other out")
    return model.kind.read_plan(read_text(path, JSON_BYTES, "write one with `ddim plan MODEL --json`"), str(path))


def options_given(given: Mapping[str, object]) -> list[str]:
    """The options that have a value, as they are written."""
    return [f"--{name.removesuffix('_x0').replace('_', '-')}" for name, value in given.items() if value is not None]


def numbers(text: str | None, name: str) -> list[float]:
    """A list of numbers separated by commas."""
    try:
        return [float(part) for part in (text or "").split(",")]
    except ValueError:
        raise DdimError(f"{name} {text}", "is not a list of numbers", f"write {name} 1,2.5,10") from None


def whole_numbers(text: str, name: str) -> list[int]:
    """A list of whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DdimError(f"{name} {text}", "is not a list of whole numbers", f"write {name} 10,20,50") from None


def output_file(path: Path) -> Path:
    """A file to be written, its folder checked before any work is done."""
    folder = path.parent
    if path.is_dir():
        raise DdimError(path, "is a folder", "give a file name")
    if not folder.is_dir():
        raise DdimError(folder, "no such folder", "make it, or choose another place")
    if not os.access(folder, os.W_OK):
        raise DdimError(folder, "cannot be written to", "choose a folder you may write to")
    remove_parts(folder, path.name)
    return path
