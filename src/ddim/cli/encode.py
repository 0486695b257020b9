"""`ddim encode`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ddim.cli.options import (
    exact_device_options,
    grid_option,
    load_model,
    make_plan,
    output_file,
    progress_bar,
    steps_option,
)


@click.command("encode")
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The latents file, *.safetensors.")
@steps_option(50)
@grid_option()
@click.option("--split", help="Which part of a data set: train or test.")
@click.option("--limit", type=int, help="At most so many pictures.")
@exact_device_options
def command(
    model: str,
    images: tuple[str, ...],
    out: Path,
    steps: int | None,
    grid: str | None,
    split: str | None,
    limit: int | None,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> None:
    """Turn IMAGES (files, a folder, or a data set) into latents x_T by eq. (13) run backwards.

    \b
    Example:
      ddim encode mnist two.png three.png --out latents.safetensors --steps 50
    """
    import torch

    from ddim.cli.pictures import read_pictures

    output_file(out)
    loaded = load_model(model, device, dtype, compile_)
    from ddim.latents import write_latents
    from ddim.pixels import to_float

    plan = make_plan(loaded, steps, grid, encode=True, default=50)
    pictures, names = read_pictures(images, loaded.config.data, split, limit)
    begun, blocks = time.monotonic(), [loaded.empty()]
    with progress_bar() as bar:
        task = bar.add_task("encoding", total=len(pictures), rate="")
        for block in loaded.run_blocks(plan, to_float(pictures)):
            blocks.append(block)
            bar.advance(task, len(block))
            rate = bar.tasks[0].completed / (time.monotonic() - begun)
            bar.update(task, rate=f"{rate:.1f} images/s")
    latents = torch.cat(blocks)
    write_latents(out, latents, names, plan, loaded.config.sha256)
    click.echo(f"{len(latents)} latents, {plan.name}, std {latents.std():.3f}: {out}")
