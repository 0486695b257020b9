"""`ddim export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._options import (
    grid_option,
    load_any,
    make_plan,
    noise_options,
    options_passed,
    output_file,
    read_plan,
    sampler_option,
    steps_option,
)
from ddim.cli._progress import progress_bar
from ddim.errors import DdimError

if TYPE_CHECKING:
    from ddim.interop.export import Exported


@click.command("export")
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write, *.onnx or *.pt2.")
@click.option(
    "--what",
    type=click.Choice(["network", "sampler"]),
    default="network",
    show_default=True,
    help="Export the network alone, or a whole sampler from x_T to x_0.",
)
@steps_option(20)
@sampler_option
@grid_option(default="equal-angle; --sampler auto chooses its own")
@noise_options
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="Plan file, instead of --steps, --sampler, --grid and noise options.",
)
def command(
    model: str,
    out: Path,
    what: str,
    steps: int | None,
    sampler: str,
    grid: str | None,
    eta: float | None,
    sigma: str | None,
    clip_x0: bool | None,
    plan_file: Path | None,
) -> dict[str, Any]:
    """Export the network of MODEL, or a whole sampler, as a float32 program that runs without this library.

    A network takes x (N, C, H, W), timesteps t (N,) in 1..T, and labels (N,) if it was trained with labels. A sampler
    takes x_T and returns x_0; its plan, which must add no noise, is part of the file. The batch size N is free. The
    file's metadata describe how to use it. Before the file is moved into place, it is run and compared with the model.

    \b
    Examples:
      ddim export mnist --out network.onnx
      ddim export mnist --out sampler.onnx --what sampler --steps 10
      ddim export mnist --out sampler.pt2 --what sampler --steps 10 --sampler unipc3 --grid log-snr
    """
    from ddim.interop.export import iter_export

    output_file(out)
    settings: dict[str, Any] = {"eta": eta, "sigma": sigma, "clip_x0": clip_x0}
    plan_options = {"sampler": None if sampler == "auto" else sampler, "steps": steps, "grid": grid, **settings}
    options = options_passed(plan_options) + (["--plan"] if plan_file is not None else [])
    if what == "network" and options:
        raise DdimError(options[0], "needs --what sampler", "add --what sampler, or leave it out")
    loaded = load_any(model, "cpu", "float32", False)
    plan: Any = None
    if what == "sampler" and plan_file is not None:
        plan = read_plan(loaded, plan_file, plan_options)
    elif what == "sampler":
        plan = make_plan(loaded, steps, grid, sampler, settings)
    with progress_bar(transient=True) as bar:
        task, work = bar.add_task("loading", total=None, rate=""), iter_export(loaded, out, plan, Path(model).name)
        while True:
            try:
                bar.update(task, description=next(work), refresh=True)
            except StopIteration as end:
                written: Exported = end.value
                break
    _print_summary(written)
    difference = written.difference
    return {"out": written.path, "bytes": written.size, "largest_difference": difference, **written.metadata}


def _print_summary(exported: Exported) -> None:
    facts = exported.metadata
    name = f"sampler {facts['plan_name']}" if facts["what"] == "sampler" else "network"
    click.echo(f"{exported.path}: {name}, {exported.size / 1e6:.1f} MB")
    click.echo(f"input: {facts['input']}")
    click.echo(f"output: {facts['output']}")
    if exported.difference is None:
        click.echo("not verified: onnxruntime is not installed; pip install 'ddim[interop]'")
    else:
        click.echo(f"verified: it differs from the model by at most {exported.difference:.1e}")
