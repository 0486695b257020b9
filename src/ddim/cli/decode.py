"""`ddim decode`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._clipping import force_option
from ddim.cli._options import OutputFolder, exact_device_options, grid_option, load_model
from ddim.cli._progress import counted, run_sampling
from ddim.cli._ranges import COUNT
from ddim.cli.encode import inversion_from_options
from ddim.errors import DdimError, warn
from ddim.names import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    from ddim.model.model import Model
    from ddim.plan.plan import Plan
    from ddim.sampling.latents import Latents


@click.command("decode")
@click.argument("model")
@click.argument("latents", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=OutputFolder(), help="Folder for the images; created or resumed.")
@click.option("--method", type=click.Choice(METHODS), help="Inversion method. [default: as encoded]")
@click.option("--steps", type=COUNT, help="Number S of network evaluations. [default: as encoded]")
@grid_option(default="as encoded")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write one PNG with all images.")
@force_option
@exact_device_options
def command(
    model: str,
    latents: Path,
    out: Path,
    method: str | None,
    steps: int | None,
    grid: str | None,
    sheet: Path | None,
    force: bool,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Decode LATENTS, a file written by `ddim encode`, into images, with eta = 0 and the plan in the file.

    \b
    Example:
      ddim decode mnist latents.safetensors --out decoded --steps 50
    """
    from ddim._io.png import save_png
    from ddim._io.png import sheet as make_sheet
    from ddim.cli._options import output_file
    from ddim.evaluation.sample_folder import decode, read_sheet
    from ddim.model.modality import image_path
    from ddim.sampling.latents import read_latents

    if sheet is not None:
        output_file(sheet)
    loaded = load_model(model, device, dtype, compile_)
    file = read_latents(latents)
    if file.model_sha256 != loaded.config.sha256:
        raise DdimError(latents, f"was encoded with another model than {model}", "use that model")
    if file.method not in METHODS:
        raise DdimError(
            latents, f"was encoded with method {file.method!r}", f"use a file of one of {', '.join(METHODS)}"
        )
    if method not in (None, file.method):
        raise DdimError(latents, f"was encoded with method {file.method}, not {method}", "leave out --method")
    plan, start, second_states = _decoding(loaded, str(latents), file, steps, grid)
    decoding = decode(loaded, plan, out, start, file.names, Path(model).name, second_states, force)
    result = run_sampling(decoding, "decoding", len(start), "images", out)
    click.echo(f"{counted(result.total, 'images')}{result.before}, {plan.name}: {image_path(out, 0)} ...")
    if sheet is not None:
        images = read_sheet(out, range(result.total))
        save_png(sheet, make_sheet(images, columns=max(1, round(result.total**0.5))))
        click.echo(f"sheet: {sheet}")
    return {"out": out, "n": result.total, "plan": plan.name, "nfe": plan.nfe, "sheet": sheet}


def _decoding(
    model: Model, name: str, file: Latents, steps: int | None, grid: str | None
) -> tuple[Plan, Tensor, list[Tensor]]:
    """The plan, its initial states and the second states of two-step plans; warns if the result will differ."""
    total = file.plan.nfe + len(file.plan.before)
    plan, start = file.plan, file.x
    second_states: list[Tensor] = []
    if steps is not None or grid is not None:
        listed = grid is not None and grid[:1].isdigit()
        requested = inversion_from_options(model, file.method, total if steps is None and not listed else steps, grid)
        plan = file.plan if requested.resume_plan.rows == file.plan.rows else requested.decode_plan
        if plan is requested.decode_plan:
            note = " from x_T alone, which is approximate" if file.earlier is not None else ""
            warn(f"{name}: was encoded for {file.plan.name} and is decoded with {plan.name}{note}")
    if file.earlier is not None and plan is file.plan:
        start, second_states = file.states()
    others = file.other_conditions(model.conditions)
    if others and file.method not in METHODS[:2]:
        warn(f"{name}: was encoded under other conditions ({others}); bytes may differ")
    return plan, start, second_states
