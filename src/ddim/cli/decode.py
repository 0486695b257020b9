"""`ddim decode`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ddim.cli.main import Stopper
from ddim.cli.options import exact_device_options, grid_option, load_model, make_plan, progress_bar
from ddim.errors import DdimError, say


@click.command("decode")
@click.argument("model")
@click.argument("latents", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder for the pictures.")
@click.option("--steps", type=int, help="S, the number of network calls. [default: as encoded]")
@grid_option(default="as encoded")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write one PNG of all the pictures.")
@exact_device_options
def command(
    model: str,
    latents: Path,
    out: Path,
    steps: int | None,
    grid: str | None,
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
    from ddim.cli.options import output_file
    from ddim.generate import decode, picture_path, read_sheet
    from ddim.latents import read_latents
    from ddim.sheet import save_png
    from ddim.sheet import sheet as make_sheet

    if sheet is not None:
        output_file(sheet)
    loaded = load_model(model, device, dtype, compile_)
    states, file = read_latents(latents)
    if file.model_sha256 != loaded.config.sha256:
        raise DdimError(latents, f"was made by another model than {model}", "decode with the model that encoded")
    times = [row.next.t for row in file.plan.rows]
    as_encoded = steps is None and grid is None
    plan = loaded.plan(grid=times) if as_encoded else make_plan(loaded, steps, grid, default=50)
    if times != [row.now.t for row in reversed(plan.rows)]:
        say(f"{latents}: was encoded with {file.plan.name}, is decoded with {plan.name}")
    made = None
    begun = time.monotonic()
    with Stopper() as stopper, progress_bar() as bar:
        task = bar.add_task("decoding", total=len(states), rate="")
        for made in decode(loaded, plan, out, states, file.names, Path(model).name):
            rate = (made.done - made.found) / max(time.monotonic() - begun, 1e-9)
            bar.update(task, completed=made.done, rate=f"{rate:.1f} images/s")
            if stopper() and made.done < made.total:
                break
    assert made is not None
    if made.done < made.total:
        click.echo(f"stopped: {made.done} of {made.total} in {out}; run the same command to make the rest", err=True)
        raise SystemExit(stopper.code)
    there = f" ({made.found} were there)" if made.found else ""
    click.echo(f"{made.total} pictures{there}, {plan.name}: {picture_path(out, 0)} ...")
    if sheet is not None:
        pictures = read_sheet(out, range(made.total))
        save_png(sheet, make_sheet(pictures, columns=max(1, round(made.total**0.5))))
        click.echo(f"sheet: {sheet}")
