"""`ddim sample`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._clipping import force_option
from ddim.cli._emulation import like_option, make_like
from ddim.cli._options import (
    OutputFolder,
    device_options,
    grid_option,
    label_of,
    load_any,
    make_plan,
    noise_options,
    output_file,
    read_plan,
    sampler_option,
    sharpness_options,
    steps_option,
)
from ddim.cli._progress import counted, run_sampling
from ddim.cli._ranges import BATCH, COUNT, INDEX, MICRO_BATCH, SEED, Real
from ddim.errors import DdimError

if TYPE_CHECKING:
    from ddim.model.model import Model
    from ddim.plan.base import BasePlan
    from ddim.sampling.guidance import Guidance
    from ddim.sampling.microbatch import Label

SHEET = 10_000  # maximum images of a sheet


@click.command("sample")
@click.argument("model")
@click.option("--out", required=True, type=OutputFolder(), help="Samples folder; created or resumed.")
@click.option("-n", "n", type=COUNT, default=64, show_default=True, help="Number of samples.")
@steps_option(20)
@sampler_option
@grid_option(default="equal-angle; --sampler auto chooses its own")
@noise_options
@sharpness_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the run.")
@click.option("--start", type=INDEX, default=0, show_default=True, help="Index of the first sample.")
@click.option(
    "--batch",
    type=BATCH,
    default=1,
    show_default=True,
    help="Samples to collect before writing, rounded up to micro-batches; does not change the samples.",
)
@click.option("--micro-batch", type=MICRO_BATCH, help="Samples per network evaluation; the exact bytes depend on it.")
@click.option(
    "--label",
    callback=lambda c, p, v: label_of(v),
    metavar="NUMBER|each",
    help="Label, for a model trained with labels; each: all labels in turn.",
)
@click.option("--guidance", type=Real(), help="Scale of classifier-free guidance, with --label.")
@click.option(
    "--cfg-plus-plus", type=Real(), help="Scale of CFG++ instead of --guidance, with --label: 0..1, such as 0.6."
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="Plan file, instead of --steps, --sampler, --grid, --eta, ...",
)
@like_option
@click.option("--any-model", is_flag=True, help="Allow a plan that was tuned for another model.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write one PNG with all images.")
@force_option
@device_options
def command(
    model: str,
    out: Path,
    n: int,
    steps: int | None,
    sampler: str,
    grid: str | None,
    eta: float | None,
    sigma: str | None,
    clip_x0: bool | None,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    start: int,
    batch: int,
    micro_batch: int | None,
    label: Label,
    guidance: float | None,
    cfg_plus_plus: float | None,
    plan_file: Path | None,
    like: str | None,
    any_model: bool,
    sheet: Path | None,
    force: bool,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Sample images or texts from MODEL (a bundled model, a model folder or a run) into a folder.

    Sample i depends only on the model, the plan, the seed and i. After an interruption, run the same command again to
    resume: it makes exactly the missing samples.

    \b
    Examples:
      ddim sample mnist --steps 20 -n 64 --seed 0 --out samples --sheet sheet.png
      ddim sample mnist --steps 50 --grid quadratic --eta 1 --out ddpm
    """

    if sheet is not None:
        output_file(sheet)
    loaded = load_any(model, device, dtype, compile_, micro_batch=micro_batch)
    from ddim._io.png import save_png
    from ddim._io.png import sheet as make_sheet
    from ddim.evaluation.sample_folder import generate, read_sheet

    settings = {"eta": eta, "sigma": sigma, "clip_x0": clip_x0, "temperature": temperature, "top_p": top_p}
    if sheet is not None and n > SHEET:
        raise DdimError("--sheet", f"would show {n} images, more than {SHEET}", "leave it out, or use a smaller -n")
    if sheet is not None and loaded.kind.unit != "images":
        raise DdimError("--sheet", "applies to images, the model is of text", "leave it out")
    selection = {"sampler": None if sampler == "auto" else sampler, "grid": grid}
    if plan_file is not None:
        plan_options = {"like": like, **selection, "steps": steps, **settings}
        plan = _read_plan(loaded, plan_file, plan_options, any_model)
    elif any_model:
        raise DdimError("--any-model", "needs --plan", "add --plan, or leave it out")
    elif like is not None:
        others = selection | {"sigma": sigma, "temperature": temperature, "top_p": top_p}
        plan, _ = make_like(loaded, like, steps, eta, clip_x0, others)
    else:
        if cfg_plus_plus is not None:  # the scale is defined for an unclipped ddim plan
            sampler = "ddim" if sampler == "auto" else sampler
            # With sigma, the plan's own rule for clipping applies: sigma hat clips or requires a choice.
            unclipped = clip_x0 is None and sigma is None and "clip_x0" in loaded.planner.SETTINGS
            settings["clip_x0"] = False if unclipped else clip_x0
        plan = make_plan(loaded, steps, grid, sampler, settings)
    scale = _scale(plan, guidance, cfg_plus_plus)
    generation = generate(loaded, plan, out, n, start, seed, Path(model).name, batch, label, scale, force=force)
    noun, evaluations = loaded.kind.noun, f"{counted(plan.nfe, 'network evaluations')} each"
    result = run_sampling(generation, evaluations, n, noun, out, loaded.kind.unit)
    first = loaded.kind.path(out, start)
    click.echo(f"{counted(n, noun)}{result.before}, {plan.name}, {evaluations}: {first} ...")
    click.echo(f"computed in {loaded.compute}")
    if sheet is not None:
        images = read_sheet(out, range(start, start + n))
        save_png(sheet, make_sheet(images, columns=max(1, round(n**0.5))))
        click.echo(f"sheet: {sheet}")
    return {
        "out": out,
        "n": n,
        "start": start,
        "seed": seed,
        "plan": plan.name,
        "nfe": plan.nfe,
        "computed_in": str(loaded.compute),
        "sheet": sheet,
    }


def _read_plan(model: Model, path: Path, options: Mapping[str, object], any_model: bool) -> BasePlan[Any]:
    """Read the plan of --plan; none of `options` may have a value."""
    from dataclasses import replace

    plan: Any = read_plan(model, path, options)
    unrestricted: BasePlan[Any] = replace(plan, made_for="") if any_model else plan
    return unrestricted


def _scale(plan: BasePlan[Any], guidance: float | None, lam: float | None) -> Guidance | None:
    """The guidance of --guidance or --cfg-plus-plus."""
    from ddim.plan.plan import Plan
    from ddim.sampling.guidance import cfg_plus_plus

    if lam is None:
        return guidance
    if not isinstance(plan, Plan):
        raise DdimError("--cfg-plus-plus", "applies to real-valued images only", "use --guidance")
    if guidance is not None:
        raise DdimError("--guidance and --cfg-plus-plus", "cannot be combined", "use one of them")
    return cfg_plus_plus(plan, lam)
