"""`ddim reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._clipping import clip_option
from ddim.cli._datasets import fit_option, refit
from ddim.cli._measuring import (
    extractor_options,
    get_data,
    get_extractor,
    reference_statistics,
    run_counting,
    table_grid_option,
)
from ddim.cli._options import OutputFolder, device_options, load_model, whole_numbers
from ddim.cli._ranges import COUNT, SEED
from ddim.cli.evaluate import run_table, times
from ddim.errors import DdimError

if TYPE_CHECKING:
    from ddim.data import ImageSet
    from ddim.evaluation import Extractor, Statistics
    from ddim.evaluation.fid_table import Measured
    from ddim.evaluation.report.budget import Amounts
    from ddim.model.model import Model


@click.command("reproduce")
@click.argument("model")
@click.argument("data")
@click.option("--out", required=True, type=OutputFolder(), help="Folder of the report; created or resumed.")
@click.option(
    "--budget",
    type=click.Choice(["10min", "1h", "full"]),
    default="1h",
    show_default=True,
    help="Approximate time for sampling, without feature extraction: sample counts are scaled to it and S that do not "
    "fit are left out, which captions report. full: 50,000 samples per cell and the whole test set.",
)
@click.option("-n", "n", help="Samples per cell of Table 1, as in `ddim evaluate -n`. [default: by --budget]")
@click.option(
    "--pictures", "round_trip_images", type=COUNT, help="Images encoded and decoded for Table 2. [default: by --budget]"
)
@click.option("--steps", help="Values of S in Table 1. [default: those of 10,20,50,100,1000 that fit]")
@click.option("--eta", default="0,0.2,0.5,1,hat", show_default=True, help="Rows of Table 1.")
@table_grid_option("linear; quadratic for CIFAR-10; as in the paper")
@click.option("--split", default="train", show_default=True, help="Split that samples are compared with.")
@click.option("--test-split", default="test", show_default=True, help="Split that is encoded and decoded.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the samples.")
@click.option("--images", type=click.Path(path_type=Path), help="Also write the samples as PNG files to this folder.")
@fit_option
@clip_option
@extractor_options
@device_options
def command(
    model: str,
    data: str,
    out: Path,
    budget: str,
    n: str | None,
    round_trip_images: int | None,
    steps: str | None,
    eta: str,
    grid: str | None,
    split: str,
    test_split: str,
    seed: int,
    images: Path | None,
    fit: str | None,
    clip_x0: bool | None,
    extractor: str | None,
    inception_weights: Path | None,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Reproduce the paper's section 5 for MODEL and DATA: Tables 1 and 2 and Figures 3 to 6, on one HTML page.

    After an interruption, run the same command again to resume. The page needs no other files and no network.

    \b
    Examples:
      ddim reproduce mnist ./mnist --budget 10min --out report
      ddim reproduce runs/cifar ./cifar10 --budget full --extractor inception --out report
    """
    from ddim._io.atomic import claimed, unexpected_entries
    from ddim._io.temporary import remove_parts
    from ddim.evaluation import fid_table
    from ddim.evaluation.counts import Counts
    from ddim.evaluation.report import page, paper
    from ddim.evaluation.report.budget import settle
    from ddim.process.schedule import linear
    from ddim.process.start import default_counts

    page.need()
    loaded = load_model(model, device, dtype, compile_)
    if loaded.config.needs_label:
        raise DdimError(model, "was trained with labels only", "use another model, or `ddim evaluate --label`")
    policy, T = refit(loaded.policy, fit), loaded.schedule.T
    dataset, test = get_data(data, policy, split, None), get_data(data, policy, test_split, None)
    feature_space = get_extractor(extractor, inception_weights, policy.shape, dataset.name, device)
    grid = grid or ("quadratic" if paper.data_set(dataset.name) == "CIFAR-10" else "linear")
    rows = [part.strip() for part in eta.split(",") if part.strip()]
    requested_steps = whole_numbers(steps, "--steps") if steps else default_counts(fid_table.STEPS, loaded.schedule)
    plan_settings: dict[str, Any] = {} if clip_x0 is None else {"clip_x0": clip_x0}
    if loaded.schedule == linear():  # the paper's sequences end at T for every prediction type
        plan_settings["top"] = T
    fid_table.check(
        loaded, fid_table.cells(loaded, requested_steps, rows, Counts(n or "2"), grid, **plan_settings), seed
    )
    if round_trip_images is not None and not 1 <= round_trip_images <= len(test):
        raise DdimError(
            f"--pictures {round_trip_images}",
            f"is outside 1..{len(test)}",
            f"use --pictures {len(test)} or fewer, the test images",
        )
    if unexpected_entries(out) and not (out / "request.json").exists():
        raise DdimError(out, "contains other files and no report", "choose an empty or new folder")
    with claimed(out, "request.json", "cells", "reference") as owned:
        request: dict[str, Any] = {"model": loaded.fingerprint, "data": dataset.fingerprint(), "budget": budget, "n": n}
        request |= {"steps": requested_steps, "eta": rows, "grid": grid, "seed": seed, "pictures": round_trip_images}
        request |= {"extractor": feature_space.sha256, "compile": compile_}
        request |= {} if clip_x0 is None else {"clip_x0": clip_x0}
        request |= {key: loaded.conditions[key] for key in ("dtype", "device", "micro_batch")}
        request["test"] = test.fingerprint()
        counts = settle(out / "request.json", request, loaded, len(test))
        for folder in (out, out / "cells", out / "reference", out / "pictures"):
            remove_parts(folder)
        cells = fid_table.cells(loaded, counts.steps, rows, Counts(counts.samples), grid, **plan_settings)
        fid_table.check(loaded, cells, seed, Path(model).name, None, images)
        real = reference_statistics(dataset, feature_space, out / "reference")
        owned.keep()
        progress = fid_table.iter_fill(
            loaded, cells, real, feature_space, out / "cells", seed, Path(model).name, None, images
        )
        measured = run_table(progress, sum(cell.n * cell.plan.nfe for cell in cells), out)
        exact = load_model(model, device, "float32", compile_)
        summary = _finish(
            out, (loaded, exact), (real, feature_space, Path(model).name), request, counts, measured, test
        )
    click.echo(summary)
    return {"out": out, "results": out / "report.json"}


def _finish(
    out: Path,
    models: tuple[Model, Model],
    about_data: tuple[Statistics, Extractor, str],
    request: dict[str, Any],
    counts: Amounts,
    measured: Sequence[Measured],
    test: ImageSet,
) -> str:
    """Make Table 2, the interpolations and the page; returns the text to print."""
    from ddim._io.atomic import make_folder
    from ddim.evaluation.report.reproduction import write_report
    from ddim.evaluation.report.sections import INTERPOLATED, iter_interpolations, iter_round_trips
    from ddim.evaluation.report.tables import about, print_table

    (loaded, exact), (real, space, name), (seed, grid) = models, about_data, (request["seed"], request["grid"])
    make_folder(out / "pictures")
    progress = iter_round_trips(exact, test, counts.round_trips, counts.images, out / "round-trips.jsonl", grid)
    trips = run_counting(progress, "round trips", counts.images * len(counts.round_trips), resumable=True)
    run_counting(
        iter_interpolations(loaded, out / "pictures", seed, grid), "interpolations", INTERPOLATED, resumable=True
    )
    facts = about(loaded, name, real, space, seed)
    page = write_report(out, facts, request, counts, measured, times(loaded, measured), trips, test)
    return f"{print_table(measured, space.metric)}\nresults: {out / 'report.json'}\npage: {page}"
