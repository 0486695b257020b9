"""`ddim calibrate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._datasets import fit_option, label_column_option, load_images, refit
from ddim.cli._options import OutputFolder, load_model
from ddim.cli._progress import counted, progress_bar
from ddim.cli._ranges import COUNT, SEED, TIMES
from ddim.cli.main import Stopper
from ddim.errors import DdimError, warn

if TYPE_CHECKING:
    from ddim.data import ImagePolicy, ImageSet
    from ddim.train.error_table import TimestepMSE

SHOWN = 12


@click.command("calibrate")
@click.argument("model")
@click.argument("data")
@click.option("--out", required=True, type=OutputFolder(), help="Folder for the calibrated model.")
@click.option("--split", default="train", show_default=True, help="Split of the data.")
@click.option("--limit", type=COUNT, default=1000, show_default=True, help="Maximum number of images per timestep.")
@click.option(
    "--times",
    "count",
    type=TIMES,
    default=100,
    show_default=True,
    help="Maximum number of timesteps: 1..10, T, and equal steps of log-SNR; the table is linear between them.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the noise.")
@fit_option
@label_column_option
@click.option("--device", help="cpu, cuda, cuda:1, ... [default: a GPU if there is one]")
def command(
    model: str,
    data: str,
    out: Path,
    split: str,
    limit: int,
    count: int,
    seed: int,
    fit: str | None,
    label_column: str | None,
    device: str | None,
) -> dict[str, Any]:
    """Measure the error of MODEL at each timestep on DATA, and write the model with that error table to --out.

    The optimal reverse variance, `ddim sample --sigma optimal`, is computed from this table. Models trained by `ddim
    train` have a table from training; use this command for other models, or for a more accurate table: it measures the
    averaged network.

    \b
    Example:
      ddim calibrate mnist ./mnist --limit 1000 --out mnist-calibrated
      ddim sample mnist-calibrated --sigma optimal --steps 10 --out samples
    """
    from ddim._io.atomic import make_folder
    from ddim.data.labels import missing_labels
    from ddim.model.checkpoint import check_same_model, copy, write
    from ddim.model.hub import place
    from ddim.train.error_table import choose_timesteps, error_table, interpolate

    loaded = load_model(model, device, "float32", False)
    config = loaded.config
    times = choose_timesteps(loaded.schedule, count)
    check_same_model(out, config.sha256)
    dataset = _load(data, refit(loaded.policy, fit), split, limit, label_column)
    labels = dataset.labels if config.network.classes else None
    if config.network.classes and labels is None:
        problem, hint = missing_labels(dataset.label_columns, "use labelled images")
        if config.needs_label:
            raise DdimError(data, f"{problem}, and this model was trained with labels only", hint)
        warn(f"{data}: {problem}: the error is measured without labels", hint)
    make_folder(out.parent)
    measured: list[TimestepMSE] = []
    started, images = time.monotonic(), dataset.batch(range(len(dataset)))
    with progress_bar() as bar:
        task = bar.add_task(counted(len(times), "timesteps"), total=len(times) * len(dataset), rate="")
        for measurement in error_table(loaded, images, times, seed, labels):
            measured.append(measurement)
            bar.advance(task, len(dataset))
            bar.update(task, rate=f"{bar.tasks[0].completed / (time.monotonic() - started):.1f} images/s")
    error = interpolate(times, [measurement.error for measurement in measured], loaded.schedule.T)
    description = f"calibrate {dataset.name} ({dataset.split}), {counted(len(dataset), 'images')}"
    origin = config.provenance.model_copy(update={"error_from": description})
    with Stopper():  # a first Ctrl-C does not interrupt writing
        calibrated = config.model_copy(update={"error": error, "provenance": origin})
        if config.sha256:
            copy(place(model), out, calibrated)
        else:  # another library's model, which has no folder in our format
            write(out, calibrated, loaded.network.state_dict())
    _show(measured)
    click.echo(f"{counted(len(times), 'timesteps')}, {counted(len(dataset), 'images')}: {out}")
    errors = [{"t": row.t, "error": row.error, "standard_error": row.standard_error} for row in measured]
    return {"out": out, "n": len(dataset), "errors": errors}


def _load(data: str, policy: ImagePolicy, split: str, limit: int, label_column: str | None) -> ImageSet:
    if data == "digits" and label_column is None and policy.shape == (28, 28, 1):
        from ddim.data import digits_as_mnist

        return digits_as_mnist(split, limit)
    return load_images(data, policy, split, limit, label_column=label_column)


def _show(measured: list[TimestepMSE]) -> None:
    click.echo("    t   error in eps   standard error")
    last = len(measured) - 1
    for index in sorted({round(i * last / (SHOWN - 1)) for i in range(SHOWN)}):
        row = measured[index]
        click.echo(f"{row.t:5d}   {row.error:12.6f}   {row.standard_error:14.1e}")
