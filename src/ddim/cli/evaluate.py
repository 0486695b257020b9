"""`ddim evaluate`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddim.cli.main import Stopper
from ddim.cli.measuring import extractor_options, get_data, get_extractor, reference, table_grid_option
from ddim.cli.options import device_options, load_model, progress_bar, whole_numbers
from ddim.errors import DdimError

if TYPE_CHECKING:
    from ddim.evaluation.table import Measured, Standing
    from ddim.model import Model
    from ddim.report.tables import Times


@click.command("evaluate")
@click.argument("model")
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder for the table; gone on with.")
@click.option("--steps", default="10,20,50,100,1000", show_default=True, help="Numbers of network calls S.")
@click.option("--eta", default="0,0.2,0.5,1,hat", show_default=True, help="Rows: etas, and hat for sigma-hat.")
@click.option("--sampler", "samplers", help="More rows: samplers without noise, such as auto,unipc3.")
@table_grid_option("linear, as the paper's; auto has its own")
@click.option(
    "-n",
    "n",
    default="50000",
    show_default=True,
    help="Samples of each cell. For some of them another number: [S[:ETA]=]N, later ones win, 0 leaves one out, such "
    "as 5000,1000=500,1000:0.2=0.",
)
@click.option("--split", help="Which part of the data samples are held against. [default: train]")
@click.option("--limit", type=int, help="At most so many pictures of the data.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the samples, the same x_T in every cell.")
@click.option("--label", type=int, help="A label, for a model trained with labels.")
@click.option("--images", type=click.Path(path_type=Path), help="Keep the samples as PNG files in this folder.")
@extractor_options
@device_options
def command(
    model: str,
    data: str,
    out: Path,
    steps: str,
    eta: str,
    samplers: str | None,
    grid: str | None,
    n: str,
    split: str | None,
    limit: int | None,
    seed: int,
    label: int | None,
    images: Path | None,
    extractor: str | None,
    inception_weights: Path | None,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> None:
    """Sample MODEL for every number of calls and amount of noise and measure how far from DATA (the paper's Table 1).

    Cells are kept in the folder by what they depend on: run again after an interruption, or with more cells, the same
    command makes what is missing. No sample is written to a file, unless --images asks for it.

    \b
    Examples:
      ddim evaluate mnist ./mnist -n 1000 --steps 10,20,50 --eta 0,1,hat --out table
      ddim evaluate runs/cifar ./cifar10 --extractor inception --grid quadratic --out table-1
    """
    from ddim.evaluation import table
    from ddim.evaluation.counts import Counts
    from ddim.files import lock, make_folder, remove_parts, strangers

    loaded = load_model(model, device, dtype, compile_)
    rows = [part.strip() for part in [*eta.split(","), *(samplers.split(",") if samplers else [])] if part.strip()]
    some = table.cells(loaded, whole_numbers(steps, "--steps"), rows, Counts(n), grid or "linear")
    table.check(loaded, some, seed, label=label)
    inside = [images.resolve().relative_to(out.resolve()).parts[0]] if images and _below(images, out) else []
    if strangers(out, "cells", "reference", *_OURS, *inside):
        raise DdimError(out, "holds something else", "choose an empty or new folder")
    policy = loaded.policy
    found = get_data(data, policy, split, limit)
    space = get_extractor(extractor, inception_weights, policy.shape, found.name, device)
    make_folder(out)
    with lock(out):
        for folder in (out, out / "cells", out / "reference"):
            remove_parts(folder)
        table.check(loaded, some, seed, Path(model).name, label, images)
        real = reference(found, space, out / "reference")
        filling = table.filling(loaded, some, real, space, out / "cells", seed, Path(model).name, label, images)
        made = fill(filling, sum(cell.n * cell.plan.calls for cell in some), out)
        from ddim.report.tables import about, print_table, write_table

        facts = about(loaded, Path(model).name, real, space, seed, label)
        write_table(out, facts, made, times(loaded, made, label))
    click.echo(print_table(made, space.metric))
    click.echo(f"tables: {out / 'evaluate.json'}, {out / 'evaluate.csv'}; times: {out / 'timing.json'}")
    if (out / "evaluate.png").exists():
        click.echo(f"picture: {out / 'evaluate.png'}")


def _below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


_OURS = ("evaluate.json", "evaluate.csv", "evaluate.png", "timing.json")


def times(model: Model, made: Sequence[Measured], label: int | None = None) -> Times:
    """Seconds a sample of each cell, see `ddim.evaluation.table.seconds`."""
    from ddim.evaluation.table import seconds

    found = {(m.cell.row, m.cell.steps): seconds(model, m.cell, m.gathered, label) for m in made}
    return {key: {"seconds_per_image": value, "images": timed} for key, (value, timed) in found.items()}


def fill(steps: Generator[Standing, None, Sequence[Measured]], total: int, out: Path) -> Sequence[Measured]:
    """Go through the cells of a table with one bar over all their network calls.

    Args:
        steps: What `ddim.evaluation.table.filling` yields.
        total: Network calls of all cells.
        out: The folder, for the message of a stop.
    """
    begun, standing = time.monotonic(), None
    with contextlib.closing(steps), Stopper() as stopper, progress_bar(transient=True) as bar:
        task = bar.add_task("network calls", total=total, rate="")
        while True:
            try:
                standing = next(steps)
            except StopIteration as end:
                return list(end.value)
            rate = (standing.calls - standing.found) / max(time.monotonic() - begun, 1e-9)
            cell = standing.cell
            told = f"{cell.label}, S = {cell.steps}: {standing.done} of {cell.n}  {rate:.0f} calls/s"
            bar.update(task, completed=standing.calls, rate=told)
            if stopper() and standing.calls < total:
                break
    click.echo(f"stopped: {standing.calls} of {total} network calls in {out}; run the same command to go on", err=True)
    raise SystemExit(stopper.code)
