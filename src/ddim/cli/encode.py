"""`ddim encode`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._datasets import fit_option, refit
from ddim.cli._options import exact_device_options, grid_option, load_model, numbers, output_file, steps_option
from ddim.cli._progress import counted, progress_bar, suggest
from ddim.cli._ranges import COUNT
from ddim.names import METHODS

if TYPE_CHECKING:
    from ddim.model.model import Model
    from ddim.sampling.inversion import Inversion


def inversion_from_options(model: Model, method: str, steps: int | None, grid: str | None) -> Inversion:
    """The inversion plans of --method, --steps and --grid, see `ddim.Model.inversion`."""
    return model.inversion(method, steps, grid=numbers(grid, "--grid") if grid and grid[:1].isdigit() else grid)


@click.command("encode")
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Latents file, *.safetensors.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=METHODS[0],
    show_default=True,
    help="ddim: eq. (13) in reverse, approximate; ddim-target: the same, with the network evaluated at the next level. "
    "fixed-point: exact for plain DDIM, with several network evaluations per step. reversible: exact for two-step "
    "plans, with two states per latent; lossless: the same to the last bit. All but fixed-point take one network "
    "evaluation per step.",
)
@steps_option(50)
@grid_option(default="equal-angle; for fixed-point a rule that is denser near t = 1")
@click.option("--split", help="Split of a data set: train or test.")
@click.option("--limit", type=COUNT, help="Maximum number of images.")
@fit_option
@exact_device_options
def command(
    model: str,
    images: tuple[str, ...],
    out: Path,
    method: str,
    steps: int | None,
    grid: str | None,
    split: str | None,
    limit: int | None,
    fit: str | None,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Encode IMAGES (files, a folder, or a data set) as latents x_T.

    \b
    Examples:
      ddim encode mnist two.png three.png --out latents.safetensors --steps 50
      ddim encode mnist two.png three.png --out latents.safetensors --steps 50 --method lossless
    """
    from ddim.cli._inputs import read_images

    output_file(out)
    loaded = load_model(model, device, dtype, compile_)
    from ddim.data.pixels import to_float
    from ddim.sampling.latents import write_latents

    inversion = inversion_from_options(loaded, method, steps, grid)
    pixels, names = read_images(images, refit(loaded.policy, fit), split, limit)
    started, parts = time.monotonic(), []
    with progress_bar() as bar:
        task = bar.add_task("encoding", total=len(pixels), rate="")
        for part in loaded.encode_blocks(inversion, to_float(pixels)):
            parts.append(part)
            bar.advance(task, len(part.latents))
            rate = bar.tasks[0].completed / (time.monotonic() - started)
            bar.update(task, rate=f"{rate:.1f} images/s")
    latents = loaded.latents(inversion, parts, names)
    write_latents(out, latents)
    name = (inversion.encode_plan or inversion.decode_plan).name
    prefix = "" if method == METHODS[0] else f"{method}, "
    click.echo(f"{counted(len(latents), 'latents')}, {prefix}{name}, std {latents.x.std():.3f}: {out}")
    decoded = f"{out.stem}-decoded"
    suggest("decode", model, out, "--out", decoded, "--sheet", f"{decoded}.png")
    return {"out": out, "n": len(latents), "method": method, "plan": name, "std": float(latents.x.std())}
