"""`ddim evaluate`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._clipping import clip_option
from ddim.cli._datasets import fit_option, refit
from ddim.cli._measuring import extractor_options, get_data, get_extractor, reference_statistics, table_grid_option
from ddim.cli._options import (
    OutputFolder,
    device_options,
    label_of,
    load_any,
    options_passed,
    sharpness_options,
    whole_numbers,
)
from ddim.cli._progress import run_with_progress
from ddim.cli._ranges import COUNT, MICRO_BATCH, SEED
from ddim.errors import DdimError

if TYPE_CHECKING:
    from ddim.evaluation.fid_table import Measured, Progress, TableCell
    from ddim.evaluation.report.tables import Times
    from ddim.model.model import Model
    from ddim.sampling.microbatch import Label


@click.command("evaluate")
@click.argument("model")
@click.argument("data")
@click.option("--out", required=True, type=OutputFolder(), help="Folder for the table; created or resumed.")
@click.option("--steps", help="Numbers S of network evaluations. [default: 10,20,50,100,1000, up to T]")
@click.option(
    "--eta",
    help="Rows: values of eta, and hat for sigma-hat. [default: 0,0.2,0.5,1,hat; for discrete data 0,0.1,0.5]",
)
@click.option("--sampler", "samplers", help="Additional rows: samplers without noise, such as auto,unipc3.")
@sharpness_options
@clip_option
@table_grid_option("linear, as in the paper; sampler auto chooses its own")
@click.option(
    "-n",
    "n",
    default="50000",
    show_default=True,
    help="Samples per cell: N, or [S[:ETA]=]N for some cells, such as 5000,1000=500,1000:0.2=0. Later entries override "
    "earlier ones; 0 leaves cells out.",
)
@click.option("--split", help="Split of DATA to compare with. [default: train; for text test]")
@click.option("--limit", type=COUNT, help="Maximum number of images of DATA.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the samples; all cells share x_T.")
@click.option(
    "--label",
    callback=lambda c, p, v: label_of(v),
    metavar="NUMBER|each",
    help="Label, for a model trained with labels; each: all labels in turn.",
)
@click.option(
    "--micro-batch",
    type=MICRO_BATCH,
    help="Samples per network evaluation. [default: 8 on a CPU (4 in bfloat16), 64 on a GPU]",
)
@click.option("--images", type=click.Path(path_type=Path), help="Also write the samples as PNG files to this folder.")
@fit_option
@extractor_options
@device_options
def command(
    model: str,
    data: str,
    out: Path,
    steps: str | None,
    eta: str | None,
    samplers: str | None,
    temperature: float | None,
    top_p: float | None,
    clip_x0: bool | None,
    grid: str | None,
    n: str,
    split: str | None,
    limit: int | None,
    fit: str | None,
    seed: int,
    label: Label,
    micro_batch: int | None,
    images: Path | None,
    extractor: str | None,
    inception_weights: Path | None,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Sample MODEL with every S and eta and measure the distance of the samples from DATA (the paper's Table 1).

    For a model of text, DATA is a text: samples are scored by the words that occur in its training split, the n-grams
    that occur in --split, and bits under an n-gram model. They are stored under --out.

    Finished cells are stored under --out. After an interruption, run the same command again to resume, or with more
    cells to add them. Images are written to files only with --images.

    \b
    Examples:
      ddim evaluate mnist ./mnist -n 1000 --steps 10,20,50 --eta 0,1,hat --out table
      ddim evaluate runs/cifar ./cifar10 --extractor inception --grid quadratic --out table-1
      ddim evaluate tinyshakespeare ./shakespeare.txt -n 64 --steps 8,32,128 --eta 0,0.1 --out table-a
    """
    from ddim._io.atomic import claimed, unexpected_entries
    from ddim._io.temporary import remove_parts
    from ddim.data.text import TextPolicy
    from ddim.evaluation import fid_table
    from ddim.evaluation.counts import Counts
    from ddim.process.start import default_counts

    loaded = load_any(model, device, dtype, compile_, micro_batch=micro_batch)
    eta = eta or ("0,0.2,0.5,1,hat" if "sigma" in loaded.planner.SETTINGS else "0,0.1,0.5")
    rows = [part.strip() for part in [*eta.split(","), *(samplers.split(",") if samplers else [])] if part.strip()]
    options = {"temperature": temperature, "top_p": top_p, "clip_x0": clip_x0}
    plan_settings = {key: value for key, value in options.items() if value is not None}
    for option in options_passed({key: options[key] for key in plan_settings.keys() - loaded.planner.SETTINGS}):
        raise DdimError(option, "applies to another modality", "leave it out")
    counts = whole_numbers(steps, "--steps") if steps else default_counts(fid_table.STEPS, loaded.schedule)
    cells = fid_table.cells(loaded, counts, rows, Counts(n), grid or "linear", **plan_settings)
    if isinstance(loaded.config.data, TextPolicy):
        image_options = {"--label": label, "--images": images, "--fit": fit}
        image_options |= {"--extractor": extractor or inception_weights}
        for option in [option for option, value in image_options.items() if value is not None]:
            raise DdimError(option, "applies to images only", "leave it out")
        _evaluate_text(loaded, cells, data, split or "test", limit, out, seed, Path(model).name)
        return _results(out)
    fid_table.check(loaded, cells, seed, label=label)
    nested = [images.resolve().relative_to(out.resolve()).parts[0]] if images and _below(images, out) else []
    if unexpected_entries(out, "cells", "reference", *_OUTPUTS, *nested):
        raise DdimError(out, "contains other files", "choose an empty or new folder")
    policy = refit(loaded.config.data, fit)
    dataset = get_data(data, policy, split, limit)
    feature_space = get_extractor(extractor, inception_weights, policy.shape, dataset.name, device)
    with claimed(out, "cells", "reference") as owned:
        for folder in (out, out / "cells", out / "reference"):
            remove_parts(folder)
        fid_table.check(loaded, cells, seed, Path(model).name, label, images)
        real = reference_statistics(dataset, feature_space, out / "reference")
        owned.keep()
        progress = fid_table.iter_fill(
            loaded, cells, real, feature_space, out / "cells", seed, Path(model).name, label, images
        )
        measured = run_table(progress, sum(cell.n * cell.plan.nfe for cell in cells), out)
        from ddim.evaluation.report.tables import about, print_table, write_table

        facts = about(loaded, Path(model).name, real, feature_space, seed, label)
        write_table(out, facts, measured, times(loaded, measured, label))
    click.echo(print_table(measured, feature_space.metric))
    click.echo(f"tables: {out / 'evaluate.json'}, {out / 'evaluate.csv'}; times: {out / 'timing.json'}")
    if (out / "evaluate.png").exists():
        click.echo(f"figure: {out / 'evaluate.png'}")
    return _results(out)


def _results(out: Path) -> dict[str, Any]:
    from ddim._io.reading import read_json

    return {"out": out, **read_json(out / "evaluate.json", dict)}


def _below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


_OUTPUTS = ("evaluate.json", "evaluate.csv", "evaluate.png", "timing.json")


def _evaluate_text(
    model: Model,
    cells: Sequence[TableCell],
    data: str,
    split: str,
    limit: int | None,
    out: Path,
    seed: int,
    name: str,
) -> None:
    from ddim._io.atomic import make_folder, unexpected_entries
    from ddim.data.text import read_text
    from ddim.evaluation import text_table
    from ddim.evaluation.report.texts import write_text_table
    from ddim.evaluation.text_quality import Reference

    if unexpected_entries(out, "samples", *_OUTPUTS):
        raise DdimError(out, "contains other files", "choose an empty or new folder")
    training, held_out = read_text(data, "train"), read_text(data, split)[:limit]
    real = text_table.windows(read_text(data, "validation"), model, max(cell.n for cell in cells))
    make_folder(out)
    progress = text_table.iter_fill(model, cells, out / "samples", seed, name)
    run_table(progress, sum(cell.n * cell.plan.nfe for cell in cells), out)
    rows = text_table.measure(model, cells, out / "samples", Reference(training, held_out), real)
    facts = {"model": name, "model_sha256": model.fingerprint, "seed": seed, "dtype": model.conditions["dtype"]}
    write_text_table(out, facts | {"data": Path(data).name, "split": split}, rows)
    click.echo(text_table.print_table(rows))
    click.echo(f"tables: {out / 'evaluate.json'}, {out / 'evaluate.csv'}; texts: {out / 'samples'}")
    if (out / "evaluate.png").exists():
        click.echo(f"figure: {out / 'evaluate.png'}")


def times(model: Model, measured: Sequence[Measured], label: Label = None) -> Times:
    """Seconds per sample of each cell, see `ddim.evaluation.fid_table.seconds`."""
    from ddim.evaluation.fid_table import seconds

    timings = {(m.cell.row, m.cell.steps): seconds(model, m.cell, m.gathered, label) for m in measured}
    return {key: {"seconds_per_image": value, "images": timed} for key, (value, timed) in timings.items()}


def run_table(steps: Generator[Progress, None, Sequence[Measured] | None], total: int, out: Path) -> Sequence[Measured]:
    """Fill the cells of a table with one progress bar over all network evaluations; on a signal, stop and exit.

    Args:
        steps: The generator of `ddim.evaluation.fid_table.iter_fill`.
        total: Network evaluations of all cells.
        out: The folder, for the message after a stop.

    Returns:
        The measured cells.
    """

    def status(progress: Progress, seconds: float) -> tuple[int, str]:
        cell, rate = progress.cell, (progress.nfe - progress.resumed) / seconds
        return progress.nfe, f"{cell.label}, S = {cell.steps}: {progress.done} of {cell.n}  {rate:.0f} NFE/s"

    def stopped(nfe: int) -> str:
        return f"{nfe} of {total} network evaluations in {out}; run the same command to resume"

    measured = run_with_progress(steps, "network evaluations", total, status, stopped)
    return list(measured or [])
