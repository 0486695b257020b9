"""`ddim tune`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._command import note
from ddim.cli._options import exact_device_options, load_model, output_file
from ddim.cli._progress import counted, progress_bar
from ddim.cli._ranges import Whole
from ddim.errors import DdimError, warn

if TYPE_CHECKING:
    from ddim.model.model import Model

RECIPE = 3  # version of `ddim.tuning`: cached results of another version are not used


@click.command("tune")
@click.argument("model")
@click.option(
    "--nfe", "--calls", "nfe", type=Whole(2, 30), required=True, help="Network evaluations of the plan, 2..30."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Plan file to write, *.json.")
@click.option(
    "--solver",
    default="fitted",
    show_default=True,
    help="fitted: fit the weights by least squares; or a sampler, such as ipndm4: search its timesteps only.",
)
@click.option(
    "--calibration-samples",
    "--pilots",
    type=Whole(4),
    default=128,
    show_default=True,
    help="Calibration samples; half are held out.",
)
@click.option("--seed", type=Whole(0, 2**62 - 1), default=0, show_default=True, help="Seed of the calibration samples.")
@click.option("--fresh", is_flag=True, help="Tune again, ignoring cached results.")
@exact_device_options
def command(
    model: str,
    nfe: int,
    out: Path,
    solver: str,
    calibration_samples: int,
    seed: int,
    fresh: bool,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Tune a plan for MODEL and a number of network evaluations, without data, in a few minutes.

    The plan file is for `ddim sample --plan`. On held-out calibration samples, the tuned plan is compared with the
    default plan and with the best untuned samplers and spacings. The plan with the lowest error is written; if it is an
    untuned one, the command reports that.

    The result is cached in the user's cache folder by model checksum and settings. A run that is stopped early cannot
    be resumed.

    \b
    Example:
      ddim tune mnist --nfe 10 --out plan.json
      ddim sample mnist --plan plan.json --out samples
    """
    from ddim._io.checksum import write_json

    output_file(out)
    loaded = load_model(model, device, dtype, compile_)
    settings = {"nfe": nfe, "solver": solver, "calibration_samples": calibration_samples, "seed": seed}
    cache_file = _cache_path(loaded, settings)
    result = _read_cached(cache_file) if cache_file and not fresh else None
    cached = result is not None
    if result is None:
        result = _tune(loaded, settings)
    write_json(out, result["plan"])
    if cache_file and not cached:
        _store(cache_file, result)
    if cached:
        note(f"cached result for the same model and settings: {cache_file} (--fresh tunes again)")
    tuned, untuned = (f"{result[key]:.4f}" for key in ("error", "untuned_error"))
    error = f"RMS error {tuned} on held-out samples, against the converged solution"
    click.echo(f"{result['name']}, {counted(nfe, 'network evaluations')}: {error}")
    if result["won"]:
        click.echo(f"best untuned plan: {result['untuned']}: {untuned}")
    else:
        click.echo("tuning did not improve on this plan")
    click.echo(f"plan: {out}")
    return {"out": out, "nfe": nfe, "cached": cached, **{key: result[key] for key in result if key != "plan"}}


def _tune(model: Model, settings: dict[str, Any]) -> dict[str, Any]:
    result = None
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}
        for step in model.tuning(**settings):
            task = tasks.setdefault(step.stage, None)
            if task is None:
                task = tasks[step.stage] = bar.add_task(step.stage, total=step.total, rate="")
            bar.update(task, completed=step.done)
            result = step.result or result
    assert result is not None
    return {
        "plan": json.loads(result.plan.to_json()),
        "name": result.plan.name,
        "error": result.error,
        "untuned": result.untuned.name,
        "untuned_error": result.untuned_error,
        "won": result.tuned_wins,
    }


def _cache_path(model: Model, settings: dict[str, Any]) -> Path | None:
    """The cache file for these settings; None for a user without a home folder."""
    from ddim import __version__
    from ddim._io.atomic import user_cache

    identity = {**settings, "recipe": RECIPE, "model": model.fingerprint, "version": __version__}
    identity |= {"dtype": model.compute.name}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    cache = user_cache()
    return None if cache is None else cache / "plans" / f"{key}.json"


def _store(path: Path, result: dict[str, Any]) -> None:
    from ddim._io.atomic import make_folder
    from ddim._io.checksum import write_json
    from ddim._io.temporary import remove_parts

    try:
        remove_parts(make_folder(path.parent), path.name)
        write_json(path, result)
    except DdimError as error:
        warn(f"{path}: cannot be written ({error}); the result is not cached")


def _read_cached(path: Path) -> dict[str, Any] | None:
    """The cached result, or None if the file is missing or damaged."""
    from ddim._io.checksum import read_sealed_json
    from ddim._io.reading import entry
    from ddim.plan.plan import Plan

    kinds = {"plan": dict, "name": str, "error": float, "untuned": str, "untuned_error": float, "won": bool}
    try:
        content = read_sealed_json(path, dict)
        result: dict[str, Any] = {key: entry(content, key, kind, path) for key, kind in kinds.items()}
        Plan.from_json(json.dumps(result["plan"]))
    except DdimError:
        return None
    return result
