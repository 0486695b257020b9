"""`ddim reconstruct`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._datasets import fit_option, refit
from ddim.cli._options import OutputFolder, exact_device_options, grid_option, load_model, whole_numbers
from ddim.cli._progress import counted, progress_bar
from ddim.cli._ranges import COUNT
from ddim.cli.encode import inversion_from_options
from ddim.errors import DdimError, warn
from ddim.names import METHODS

if TYPE_CHECKING:
    import numpy as np

    from ddim.evaluation.reconstruction import RoundTrip
    from ddim.model.model import Model
    from ddim.sampling.inversion import Inversion

SHOWN = 16
STEPS = (10, 20, 50, 100)


@click.command("reconstruct")
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@click.option("--out", required=True, type=OutputFolder(), help="Folder for the table and the figure.")
@click.option("--steps", help="Numbers S of network evaluations, to decode. [default: 10,20,50,100, up to T]")
@click.option(
    "--method",
    "methods",
    default=METHODS[0],
    show_default=True,
    help=f"Inversion methods, separated by commas: {', '.join(METHODS)}.",
)
@grid_option(default="equal-angle; for fixed-point a rule that is denser near t = 1")
@click.option("--split", help="Split of a data set: train or test.")
@click.option("--limit", type=COUNT, help="Maximum number of images.")
@fit_option
@exact_device_options
def command(
    model: str,
    images: tuple[str, ...],
    out: Path,
    steps: str | None,
    methods: str,
    grid: str | None,
    split: str | None,
    limit: int | None,
    fit: str | None,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Encode and decode IMAGES and print the per-dimension mean squared error in [0, 1] (the paper's Table 2).

    \b
    Examples:
      ddim reconstruct mnist ./mnist --split test --limit 1000 --steps 10,20,50,100 --out round-trip
      ddim reconstruct mnist ./mnist --split test --limit 200 --method ddim,fixed-point,lossless --out round-trip
    """
    from ddim._io.atomic import claimed, unexpected_entries
    from ddim._io.temporary import remove_parts
    from ddim.cli._inputs import read_images
    from ddim.process.start import default_counts

    requested, names = whole_numbers(steps, "--steps") if steps else None, methods.split(",")
    for method in names:
        if method not in METHODS:
            raise DdimError(f"--method {method}", "is unknown", f"use one of {', '.join(METHODS)}")
    if unexpected_entries(out, *_OUTPUTS):
        raise DdimError(out, "contains other files", "choose an empty or new folder")
    loaded = load_model(model, device, dtype, compile_)
    counts = requested or default_counts(STEPS, loaded.schedule)
    inversions = [inversion_from_options(loaded, method, s, grid) for method in names for s in counts]
    originals, _ = read_images(images, refit(loaded.policy, fit), split, limit)
    with claimed(out):
        remove_parts(out)
        results, failed = _measure(loaded, inversions, originals)
        if not results:
            raise DdimError("round trips", "have all failed", "use more --steps, or another --method")
        facts = {
            "model": {"name": Path(model).name, "sha256": loaded.config.sha256},
            "images": len(originals),
            "split": split,
            "grid": grid or "the method's own",
            **loaded.conditions,
            "failed": failed,
        }
        click.echo(f"{counted(len(originals), 'images')}, grid {facts['grid']}")
        return {"out": out, **_report(out, facts, originals, results)}


def _measure(
    model: Model, inversions: list[Inversion], originals: np.ndarray
) -> tuple[list[tuple[Inversion, RoundTrip]], list[dict[str, Any]]]:
    """The round trips, and those that failed; a failure only warns if there are several round trips."""
    from ddim.evaluation.reconstruction import join, round_trips

    results: list[tuple[Inversion, RoundTrip]] = []
    failed: list[dict[str, Any]] = []
    started = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("round trips", total=len(originals) * len(inversions), rate="")
        for inversion in inversions:
            parts = []
            try:
                for part in round_trips(model, originals, inversion):
                    parts.append(part)
                    bar.advance(task, len(part.again))
                    bar.update(task, rate=f"{bar.tasks[0].completed / (time.monotonic() - started):.1f} images/s")
            except DdimError as error:
                if len(inversions) == 1:
                    raise
                warn(f"{inversion.method}, S = {inversion.decode_plan.nfe}, is left out: {error}")
                failed.append({"method": inversion.method, "steps": inversion.decode_plan.nfe, "error": str(error)})
                bar.advance(task, len(originals) - sum(len(part.again) for part in parts))
                continue
            results.append((inversion, join(parts)))
    return results, failed


def _report(
    out: Path, about: dict[str, Any], originals: np.ndarray, results: list[tuple[Inversion, RoundTrip]]
) -> dict[str, Any]:
    from ddim._io.atomic import write_atomic
    from ddim._io.png import labelled_rows, save_png

    table = [
        {
            "method": inversion.method,
            "steps": inversion.decode_plan.nfe,
            "plan": inversion.decode_plan.name,
            "mse": trip.mse,
            "standard_error": trip.standard_error,
            "rms": trip.rms,
            "max": float(trip.largest.max()),
            "latent_std": float(trip.latent_std.mean()),
            "calls_per_step": float(trip.nfe.double().mean()) / inversion.decode_plan.nfe,
            "seconds": float(trip.seconds.mean()),
        }
        for inversion, trip in results
    ]
    report = {
        **about,
        "error": "mse: mean squared error per dimension, images in [0, 1], neither clipped nor rounded; rms and max: "
        "images in [-1, 1]",
        "calls_per_step": "network evaluations that encoding takes for each step of decoding",
        "seconds": "encoding and decoding, for one image",
        "rows": table,
    }
    write_atomic(out / "reconstruct.json", (json.dumps(report, indent=1) + "\n").encode())
    single = len({inversion.method for inversion, _ in results}) == 1
    names = [
        f"S = {inversion.decode_plan.nfe}" if single else f"{inversion.method}, S = {inversion.decode_plan.nfe}"
        for inversion, _ in results
    ]
    rows = [("original", originals), *zip(names, (trip.again for _, trip in results), strict=True)]
    shown = [(name, images[:SHOWN]) for name, images in rows]
    save_png(out / "reconstruct.png", labelled_rows(shown, zoom=2 if originals.shape[1] <= 32 else 1))
    click.echo(_HEAD)
    for line in table:
        spread = "-" if line["standard_error"] is None else f"{line['standard_error']:.2e}"
        click.echo(
            f"{line['method']:<11} {line['steps']:4d} {line['mse']:9.3e} {spread:>8} {line['rms']:8.2e} "
            f"{line['max']:8.2e} {line['latent_std']:7.3f} {line['calls_per_step']:8.2f} {line['seconds']:7.3f}"
        )
    click.echo(f"table: {out / 'reconstruct.json'}\nfigure: {out / 'reconstruct.png'}")
    return report


_HEAD = (
    "MSE and its standard error: images in [0, 1]; rms, max: images in [-1, 1];\n"
    "std x_T: of latents; NFE/step: of encoding; s/image: encoding and decoding\n"
    f"{'method':<11} {'S':>4} {'MSE':>9} {'std err.':>8} {'rms':>8} {'max':>8} "
    f"{'std x_T':>7} {'NFE/step':>8} {'s/image':>7}"
)
_OUTPUTS = ("reconstruct.json", "reconstruct.png")
