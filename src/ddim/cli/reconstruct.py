"""`ddim reconstruct`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli.options import (
    GRIDS,
    exact_device_options,
    grid_option,
    load_model,
    make_plan,
    progress_bar,
    whole_numbers,
)
from ddim.errors import DdimError

if TYPE_CHECKING:
    import numpy as np

    from ddim.roundtrip import RoundTrip

SHOWN = 16


@click.command("reconstruct")
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder for the table and the picture.")
@click.option("--steps", default="10,20,50,100", show_default=True, help="Numbers of network calls each way.")
@grid_option()
@click.option("--split", help="Which part of a data set: train or test.")
@click.option("--limit", type=int, help="At most so many pictures.")
@exact_device_options
def command(
    model: str,
    images: tuple[str, ...],
    out: Path,
    steps: str,
    grid: str | None,
    split: str | None,
    limit: int | None,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> None:
    """Encode and decode IMAGES and print the per-dimension mean squared error in [0, 1] (the paper's Table 2).

    \b
    Example:
      ddim reconstruct mnist ./mnist --split test --limit 1000 --steps 10,20,50,100 --out round-trip
    """
    from ddim.cli.pictures import read_pictures
    from ddim.files import make_folder, strangers
    from ddim.roundtrip import join, round_trips

    counts = whole_numbers(steps, "--steps")
    if strangers(out, *_OURS):
        raise DdimError(out, "holds something else", "choose an empty or new folder")
    loaded = load_model(model, device, dtype, compile_)
    plans = [(make_plan(loaded, s, grid, encode=True), make_plan(loaded, s, grid)) for s in counts]
    pictures, _ = read_pictures(images, loaded.config.data, split, limit)
    make_folder(out)
    results: list[tuple[int, RoundTrip]] = []
    begun = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("round trips", total=len(pictures) * len(plans), rate="")
        for up, down in plans:
            parts = []
            for part in round_trips(loaded, pictures, up, down):
                parts.append(part)
                bar.advance(task, len(part.again))
                bar.update(task, rate=f"{bar.tasks[0].completed / (time.monotonic() - begun):.1f} images/s")
            results.append((down.calls, join(parts)))
    about = {
        "model": {"name": Path(model).name, "sha256": loaded.config.sha256},
        "images": len(pictures),
        "split": split,
        "grid": grid or GRIDS[0],
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    click.echo(f"{len(pictures)} pictures, grid {about['grid']}")
    _report(out, about, pictures, results)


def _report(out: Path, about: dict[str, Any], pictures: np.ndarray, results: list[tuple[int, RoundTrip]]) -> None:
    from ddim.files import write_atomic
    from ddim.sheet import labelled_rows, save_png

    table = [
        {
            "steps": steps,
            "mse": trip.mse,
            "standard_error": trip.standard_error,
            "latent_std": float(trip.latent_std.mean()),
        }
        for steps, trip in results
    ]
    report = {
        **about,
        "method": "eq. (13) backwards, then forwards, S calls each way",
        "error": "mean squared error per dimension, pictures in [0, 1], neither clipped nor rounded",
        "rows": table,
    }
    write_atomic(out / "reconstruct.json", (json.dumps(report, indent=1) + "\n").encode())
    rows = [("original", pictures[:SHOWN]), *((f"S = {steps}", trip.again[:SHOWN]) for steps, trip in results)]
    save_png(out / "reconstruct.png", labelled_rows(rows, zoom=2 if pictures.shape[1] <= 32 else 1))
    click.echo("    S   MSE in [0,1]   standard error   latent std")
    for line in table:
        spread = "-" if line["standard_error"] is None else f"{line['standard_error']:.2e}"
        click.echo(f"{line['steps']:5d}   {line['mse']:12.3e}   {spread:>14}   {line['latent_std']:10.3f}")
    click.echo(f"table: {out / 'reconstruct.json'}\npicture: {out / 'reconstruct.png'}")


_OURS = ("reconstruct.json", "reconstruct.png")
