"""`ddim interpolate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._clipping import force_option
from ddim.cli._datasets import fit_option, refit
from ddim.cli._options import (
    exact_device_options,
    grid_option,
    load_model,
    make_plan,
    numbers,
    sheet_file,
    steps_option,
)
from ddim.cli._progress import counted
from ddim.cli._ranges import Whole
from ddim.errors import DdimError

if TYPE_CHECKING:
    from torch import Tensor

    from ddim.model.model import Model
    from ddim.plan.plan import Plan

MOST = 1000  # frames per row


@click.command("interpolate")
@click.argument("model")
@click.option("--seeds", help="Two seeds, or four with --corners, each SEED or SEED:INDEX, such as 3,14 or 0:5,0:9.")
@click.option("--images", help="Image files to encode, separated by commas, instead of --seeds.")
@click.option(
    "--weights",
    multiple=True,
    help="Blend any number of seeds or images, with one weight for each, such as 0.5,0.3,0.2. Several blends are "
    "separated by ';', or the option is repeated.",
)
@click.option(
    "--corners",
    "four",
    is_flag=True,
    help="Sheet between four corners, row by row.",
)
@click.option("--frames", type=Whole(2, MOST), help="Images from one end to the other. [default: 11]")
@steps_option(50)
@grid_option("--tau")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Sheet to write: .png, .webp or .gif.")
@fit_option
@force_option
@exact_device_options
def command(
    model: str,
    seeds: str | None,
    images: str | None,
    weights: tuple[str, ...],
    four: bool,
    frames: int | None,
    steps: int | None,
    grid: str | None,
    out: Path,
    fit: str | None,
    force: bool,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Interpolate between two latents by slerp and decode every point, with eta = 0.

    With --weights, blend any number of latents instead: sum w z / sqrt(sum w^2), which keeps their noise level.

    \b
    Examples:
      ddim interpolate mnist --seeds 3,14 --frames 11 --out strip.png
      ddim interpolate mnist --images two.png,seven.png --out strip.png
      ddim interpolate mnist --seeds 1,2,3,4 --corners --frames 8 --out sheet.png
      ddim interpolate mnist --seeds 1,2,3 --weights "0.5,0.3,0.2; 1,1,1" --out blends.png
    """
    import numpy as np
    import torch

    if (seeds is None) == (images is None):
        raise DdimError("--seeds and --images", "must be used one at a time", "use one of them, such as --seeds 3,14")
    sources = (seeds or images or "").split(",")
    blends = _blends(weights, len(sources), four or frames is not None)
    count = 11 if frames is None else frames
    corners = len(sources) if blends else 4 if four else 2
    if len(sources) != corners:
        more = "" if four else " (four with --corners, any number with --weights)"
        name = "--seeds" if seeds else "--images"
        raise DdimError(name, f"has {len(sources)} entries, not {corners}", f"use {corners}{more}")
    locations = [_seed_and_index(text) for text in sources] if seeds else []
    sheet_file(out)
    loaded = load_model(model, device, dtype, compile_)
    from ddim._io.sheets import save_sheet
    from ddim.data.pixels import to_uint8
    from ddim.model.plausible import refuse_implausible
    from ddim.sampling.latents import blend, slerp_grid, slerp_path

    plan = make_plan(loaded, steps, grid, "ddim", {"clip_x0": False}, 50)
    ends = torch.cat([loaded.noise([index], seed).start() for seed, index in locations]) if locations else None
    if ends is None:
        ends = _encoded(loaded, tuple(sources), make_plan(loaded, steps, grid, "ddim", {"encode": True}, 50), fit)
    if blends:
        latents, columns = blend(ends, blends), min(len(blends), 11)
    elif four:
        latents, columns = slerp_grid(ends, count, count), count
    else:
        latents, columns = slerp_path(ends[0], ends[1], count), count
    samples = torch.cat([*loaded.run_blocks(plan, latents)])
    refuse_implausible(samples, loaded.config, force)
    pixels = to_uint8(samples)
    text = {"model": Path(model).name, "plan": plan.name, "between": ",".join(sources)}
    save_sheet(out, np.asarray(pixels), columns, {**text, "weights": ";".join(weights)} if blends else text)
    click.echo(f"{counted(len(pixels), 'images')}, {plan.name}: {out}")
    return {"out": out, "n": len(pixels), "plan": plan.name, "between": sources}


def _encoded(model: Model, files: tuple[str, ...], plan: Plan, fit: str | None) -> Tensor:
    """The latents of image files, (N, C, H, W)."""
    import torch

    from ddim.cli._inputs import read_images
    from ddim.data.pixels import to_float

    pixels, _ = read_images(files, refit(model.policy, fit), None, None)
    return torch.cat([*model.run_blocks(plan, to_float(pixels))])


def _blends(weights: tuple[str, ...], count: int, path: bool) -> list[list[float]]:
    """The value of --weights: one list for each blend, none if it is not passed."""
    blends = [numbers(part, "--weights") for text in weights for part in text.split(";")]
    if blends and path:
        raise DdimError("--weights", "cannot be combined with --corners or --frames", "leave those out")
    for blend in blends:
        text = ",".join(f"{weight:g}" for weight in blend)
        if len(blend) != count:
            raise DdimError(
                f"--weights {text}",
                f"has {len(blend)} entries for {counted(count, 'latents')}",
                "use one weight for each",
            )
        if not any(blend) or not all(map(math.isfinite, blend)):
            raise DdimError(f"--weights {text}", "is all 0, or not finite", "use a weight that is not 0")
    return blends


def _seed_and_index(text: str) -> tuple[int, int]:
    seed, _, index = text.partition(":")
    try:
        location = int(seed), int(index or 0)
    except ValueError:
        raise DdimError(f"--seeds {text}", "is neither SEED nor SEED:INDEX", "write --seeds 3,14 or 0:5,0:9") from None
    if min(location) < 0:
        raise DdimError(f"--seeds {text}", "is negative", "use whole numbers >= 0")
    return location
