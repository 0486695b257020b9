"""Options that several commands share."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim._io.reading import JSON_BYTES, read_text
from ddim._io.temporary import remove_parts
from ddim.cli._clipping import clip_option
from ddim.cli._command import detail, note
from ddim.cli._ranges import COUNT, POSITIVE, Real
from ddim.errors import DdimError
from ddim.names import SAMPLER_NAMES, SPACINGS

if TYPE_CHECKING:
    from ddim.model.model import Model
    from ddim.plan.base import BasePlan

_GRID_HELP = f"Timesteps: a rule ({', '.join(SPACINGS)}), or an increasing list such as 1,250,1000."

_SOURCES = {
    "diffusers": "a diffusers U-Net",
    "official": "a U-Net of the DDIM authors' code",
    "openai": "a U-Net of OpenAI's code",
    "lucidrains": "a U-Net of denoising-diffusion-pytorch",
}

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class OutputFolder(click.Path):
    """The path of a folder to write; a file, or a name that is a file's, is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; a DdimError if it is not a folder's."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        subject = f"{param.opts[0] if param is not None else 'folder'} {path}"
        if path.is_file():
            raise DdimError(subject, "is a file, and a folder is written", "use an empty or new folder")
        if path.suffix.lower() in _FILES and not path.is_dir():
            raise DdimError(subject, "is the name of a file, and a folder is written", f"use {path.with_suffix('')}")
        return path


_FILES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".json", ".csv", ".html", ".safetensors", ".onnx", ".pt2", ".txt")


def device_options(function: Callable[..., Any], dtype: str = "auto") -> Callable[..., Any]:
    """Add --device, --dtype and --compile."""
    for option in (
        click.option("--compile", "compile_", is_flag=True, help="Run the network through torch.compile."),
        click.option(
            "--precision",
            "--dtype",
            "dtype",
            type=click.Choice(["auto", "float32", "float32-fast", "bfloat16"]),
            default=dtype,
            show_default=True,
            help="Precision of the network: auto is bfloat16 if the device has matrix units for it, else float32-fast "
            "(our own kernels, equal to float32 within 1e-5) if available, else float32, without approximations.",
        ),
        click.option("--device", help="cpu, cuda, cuda:1, ... [default: a GPU if there is one]"),
    ):
        function = option(function)
    return function


def label_of(text: str | None) -> Any:
    """The value of --label: a number, "each", or None."""
    if text is None or text == "each" or text.lstrip("-").isdigit():
        return text if text in (None, "each") else int(text)
    raise DdimError(f"--label {text}", "is not a label", "use a number, or each for all labels in turn")


def exact_device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --device, --dtype and --compile for encoding: float32 by default, as rounding limits the reconstruction."""
    return device_options(function, "float32")


def grid_option(*others: str, default: str = SPACINGS[0]) -> Decorator:
    """Add --grid, with `others` as further spellings; None if it is not passed."""
    return click.option("--grid", *others, "grid", help=f"{_GRID_HELP} [default: {default}]")


def steps_option(default: int) -> Decorator:
    """Add --steps; not passed if --grid is a list of timesteps."""
    text = "Number S of sampling steps, one network evaluation each in most samplers; not with a list of timesteps. "
    text += f"[default: {default}, or T if the model has fewer timesteps]"
    return click.option("--steps", type=COUNT, help=text)


def sampler_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --sampler."""
    text = "auto is what docs/solvers.md recommends for this number of steps, or ddim with --grid, --eta or --sigma. "
    text += f"Only ddim adds noise. One of auto, {', '.join(SAMPLER_NAMES)}."
    return click.option("--sampler", default="auto", show_default=True, help=text)(function)


def noise_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --eta, --sigma and --clip."""
    function = clip_option(function)
    for option in (
        click.option(
            "--sigma",
            help="Noise of the steps: hat is the paper's larger noise; learned is the network's own; optimal is the "
            "variance that fits the model's measured error, with the mean of --eta; or a list, one standard deviation "
            "per step. Only optimal can be combined with --eta.",
        ),
        click.option("--eta", type=Real(0), help="Noise scale: 0 is DDIM, 1 is DDPM. [default: 0]"),
    ):
        function = option(function)
    return function


def sharpness_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --temperature and --top-p."""
    for option in (
        click.option(
            "--top-p",
            type=Real(0, 1, above=True),
            help="Discrete data: sample only from the likeliest tokens, up to this total probability. [default: 1]",
        ),
        click.option(
            "--temperature",
            type=POSITIVE,
            help="Discrete data: temperature of the prediction; below 1 it is sharper. [default: 1]",
        ),
    ):
        function = option(function)
    return function


def only_model(loaded: object, name: str | Path) -> Model:
    """What `ddim.load` returned.

    Raises:
        DdimError: If it is a network of `ddim.fit`, which the commands do not know.
    """
    from ddim.model.model import Model

    if not isinstance(loaded, Model):
        hint = "load it in Python, by ddim.load"
        raise DdimError(name, "is a network of ddim.fit, not a model of this library", hint)
    return loaded


def load_any(name: str, device: str | None, dtype: str, compile_: bool, **settings: Any) -> Model:
    """Load the model of a command's MODEL argument, of any modality."""
    from ddim.model.load import load

    check_device(device)
    loaded = load(name, device, dtype=dtype, compile=compile_, **settings)  # type: ignore[call-overload]
    model = only_model(loaded, name)
    if model.notes and model.config.origin:
        source = _SOURCES.get(model.config.origin.format, model.config.origin.format)
        note(f"note: read as {source}; `ddim info {shlex.quote(name)}` lists the conversions")
    detail(f"{name}: {model.config.network}, on {model.device}, computed in {model.compute}")
    return model


def load_model(name: str, device: str | None, dtype: str, compile_: bool, **settings: Any) -> Model:
    """Load the model of a command's MODEL argument, which must be one of real-valued images."""
    model = load_any(name, device, dtype, compile_, **settings)
    if model.config.categorical is not None:
        raise DdimError(name, "is a model of discrete data", "use one of real-valued images")
    return model


def check_device(device: str | None) -> None:
    """Refuse a device that does not exist."""
    from ddim.model.devices import usable

    if device is not None:
        usable(device, f"--device {device}")


def make_plan(
    model: Model,
    steps: int | None,
    grid: str | None,
    sampler: str,
    options: Mapping[str, Any],
    default: int = 20,
) -> Any:
    """The plan of a command's options, for a model of any modality.

    Args:
        model: The model.
        steps: The value of --steps.
        grid: The value of --grid.
        sampler: The value of --sampler.
        options: Other settings by name; None for options not passed.
        default: The number of steps if `steps` is None.
    """
    from ddim.samplers.settings import SamplerSettings

    options = {key: value for key, value in options.items() if value is not None}
    for name in options.keys() - model.planner.SETTINGS:
        raise DdimError(options_passed({name: True})[0], f"is not a setting of {model.kind.noun}", "leave it out")
    sigma = options.get("sigma")
    if "eta" in options and sigma not in (None, "optimal"):
        raise DdimError("--eta and --sigma", "cannot be combined", "use one of them")
    if sigma is not None and sigma not in ("hat", "optimal", "learned"):
        options["sigma"] = numbers(sigma, "--sigma")
    times = numbers(grid, "--grid") if grid and grid[:1].isdigit() else grid
    return model.plan_of(SamplerSettings(steps=steps, grid=times, sampler=sampler, **options), default)


def read_plan(model: Model, path: Path, options: Mapping[str, object]) -> BasePlan[Any]:
    """Read the plan of --plan for the model's modality; none of `options` may have a value."""
    for option in options_passed(options):
        raise DdimError(f"--plan and {option}", "cannot be combined", "leave the option out; a plan file contains it")
    return model.kind.read_plan(read_text(path, JSON_BYTES, "write one with `ddim plan MODEL --json`"), str(path))


def options_passed(options: Mapping[str, object]) -> list[str]:
    """The options that have a value, as written on the command line."""
    return [f"--{name.removesuffix('_x0').replace('_', '-')}" for name, value in options.items() if value is not None]


def numbers(text: str | None, name: str) -> list[float]:
    """Parse numbers separated by commas."""
    try:
        return [float(part) for part in (text or "").split(",")]
    except ValueError:
        raise DdimError(f"{name} {text}", "is not a list of numbers", f"write {name} 1,2.5,10") from None


def whole_numbers(text: str, name: str) -> list[int]:
    """Parse whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DdimError(f"{name} {text}", "is not a list of whole numbers", f"write {name} 10,20,50") from None


def resolution(text: str | None) -> tuple[int, int] | None:
    """The height and width of --size, such as 32 or 32x48; None if it is not passed."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and len(part) < 7 and int(part) > 0 for part in parts):
        raise DdimError(f"--size {text}", "is not a resolution", "write 32, or 32x48 for height x width")
    return int(parts[0]), int(parts[-1])


def sheet_option(content: str = "all images") -> Decorator:
    """Add --sheet.

    Args:
        content: What the sheet shows.
    """
    text = f"Also write one file with {content}: .png, .webp or .gif."
    return click.option("--sheet", type=click.Path(path_type=Path), help=text)


def sheet_file(path: Path) -> Path:
    """Check that a sheet can be written, see `output_file`, and that its suffix is that of an image format."""
    from ddim._io.sheets import check_suffix

    check_suffix(path)
    return output_file(path)


def output_file(path: Path) -> Path:
    """Check that a file can be written, before any work is done, and remove its leftover temporary files."""
    folder = path.parent
    if path.is_dir():
        raise DdimError(path, "is a folder", "use a file name")
    if not folder.is_dir():
        raise DdimError(folder, "does not exist", "make it, or choose another folder")
    if not os.access(folder, os.W_OK):
        raise DdimError(folder, "cannot be written to", "choose a folder you may write to")
    remove_parts(folder, path.name)
    return path
