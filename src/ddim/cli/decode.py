"""`ddim decode`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ddim.cli.options import exact_device_options, grid_option, load_model, make_plan, progress_bar
from ddim.errors import DdimError, say


@click.command("decode")
@click.argument("model")
@click.argument("latents", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder for the pictures.")
@click.option("--steps", type=int, default=50, show_default=True, help="S, the number of network calls.")
@grid_option()
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write one PNG of all the pictures.")
@exact_device_options
def command(
    model: str,
    latents: Path,
    out: Path,
    steps: int,
    grid: str,
    sheet: Path | None,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> None:
    """Turn LATENTS, a file that `ddim encode` wrote, back into pictures, with eta = 0.

    \b
    Example:
      ddim decode mnist latents.safetensors --out decoded --steps 50
    """
    import numpy as np

    from ddim.cli.options import output_file
    from ddim.files import lock, make_folder
    from ddim.generate import picture_path
    from ddim.latents import read_latents
    from ddim.pixels import to_uint8
    from ddim.sheet import save_png
    from ddim.sheet import sheet as make_sheet

    if sheet is not None:
        output_file(sheet)
    loaded = load_model(model, device, dtype, compile_)
    states, file = read_latents(latents)
    if file.model_sha256 != loaded.config.sha256:
        raise DdimError(latents, f"was made by another model than {model}", "decode with the model that encoded")
    plan = make_plan(loaded, steps, grid)
    times = [row.next.t for row in file.plan.rows]
    if times != [row.now.t for row in reversed(plan.rows)]:
        say(f"{latents}: was encoded with {file.plan.name}, is decoded with {plan.name}")
    if out.is_dir() and any(entry.name != ".lock" for entry in out.iterdir()):
        raise DdimError(out, "is not empty", "choose an empty or new folder")
    make_folder(out)
    begun = time.monotonic()
    done: list[np.ndarray] = []
    with lock(out), progress_bar() as bar:
        task = bar.add_task("decoding", total=len(states), rate="")
        for block in loaded.run_blocks(plan, states):
            for picture in to_uint8(block):
                text = {"model": Path(model).name, "plan": plan.name, "latent": file.names[len(done)]}
                save_png(picture_path(out, len(done)), picture, text)
                done.append(picture)
            bar.update(task, completed=len(done), rate=f"{len(done) / (time.monotonic() - begun):.1f} images/s")
    click.echo(f"{len(done)} pictures, {plan.name}: {picture_path(out, 0)} ...")
    if sheet is not None:
        save_png(sheet, make_sheet(np.stack(done), columns=max(1, round(len(done) ** 0.5))))
        click.echo(f"sheet: {sheet}")
