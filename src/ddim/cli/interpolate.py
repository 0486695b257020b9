"""`ddim interpolate`."""

from __future__ import annotations

from pathlib import Path

import click

from ddim.cli.options import exact_device_options, grid_option, load_model, make_plan, output_file, steps_option
from ddim.errors import DdimError


@click.command("interpolate")
@click.argument("model")
@click.option("--seeds", help="Two seeds (or four, for a sheet), each SEED or SEED:INDEX, such as 3,14 or 0:5,0:9.")
@click.option("--images", help="Instead of seeds: two (or four) picture files, which are encoded first.")
@click.option(
    "--grid", "four", is_flag=True, help="A sheet between four corners: top left, top right, bottom left, ..."
)
@click.option("--frames", type=int, default=11, show_default=True, help="Pictures from one end to the other.")
@steps_option(50)
@grid_option("--tau")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The PNG file.")
@exact_device_options
def command(
    model: str,
    seeds: str | None,
    images: str | None,
    four: bool,
    frames: int,
    steps: int | None,
    grid: str | None,
    out: Path,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> None:
    """Walk between two latents by slerp and decode every point of the way, with eta = 0.

    \b
    Examples:
      ddim interpolate mnist --seeds 3,14 --frames 11 --out strip.png
      ddim interpolate mnist --images two.png,seven.png --out strip.png
      ddim interpolate mnist --seeds 1,2,3,4 --grid --frames 8 --out sheet.png
    """
    import numpy as np
    import torch

    if (seeds is None) == (images is None):
        raise DdimError("--seeds and --images", "exactly one of them is needed", "write --seeds 3,14")
    if frames < 2:
        raise DdimError(f"--frames {frames}", "is less than 2", "give 2 or more")
    given = (seeds or images or "").split(",")
    corners = 4 if four else 2
    if len(given) != corners:
        more = "" if four else " (four with --grid)"
        raise DdimError(
            "--seeds" if seeds else "--images", f"names {len(given)}, not {corners}", f"give {corners}{more}"
        )
    places = [_place(text) for text in given] if seeds else []
    output_file(out)
    loaded = load_model(model, device, dtype, compile_)
    from ddim.latents import between_four, walk
    from ddim.pixels import to_float, to_uint8
    from ddim.sheet import save_png, sheet

    plan = make_plan(loaded, steps, grid, default=50)
    if seeds:
        ends = torch.cat([loaded.noise([index], seed).start() for seed, index in places])
    else:
        from ddim.cli.pictures import read_pictures

        pictures, _ = read_pictures(tuple(given), loaded.config.data, None, None)
        ends = torch.cat(
            [*loaded.run_blocks(make_plan(loaded, steps, grid, encode=True, default=50), to_float(pictures))]
        )
    latents = between_four(ends, frames, frames) if four else walk(ends[0], ends[1], frames)
    made = to_uint8(torch.cat([*loaded.run_blocks(plan, latents)]))
    page = sheet(np.asarray(made), columns=frames, zoom=2 if made.shape[1] <= 32 else 1)
    save_png(out, page, {"model": Path(model).name, "plan": plan.name, "between": ",".join(given)})
    click.echo(f"{len(made)} pictures, {plan.name}: {out}")


def _place(text: str) -> tuple[int, int]:
    seed, _, index = text.partition(":")
    try:
        found = int(seed), int(index or 0)
    except ValueError:
        raise DdimError(f"--seeds {text}", "is neither SEED nor SEED:INDEX", "write --seeds 3,14 or 0:5,0:9") from None
    if min(found) < 0:
        raise DdimError(f"--seeds {text}", "is negative", "give whole numbers >= 0")
    return found
