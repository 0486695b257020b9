"""`ddim plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ddim._io.terminal import terminal_width
from ddim.cli._emulation import comparison, counterpart, like_option, make_like
from ddim.cli._options import (
    grid_option,
    make_plan,
    noise_options,
    only_model,
    output_file,
    read_plan,
    sampler_option,
    sharpness_options,
    steps_option,
)
from ddim.errors import DdimError


@click.command("plan")
@click.argument("model")
@steps_option(20)
@sampler_option
@grid_option(default="equal-angle; --sampler auto chooses its own")
@noise_options
@sharpness_options
@click.option("--encode", is_flag=True, help="Print the plan that encodes, from x_0 to x_T.")
@like_option
@click.option("--diff", is_flag=True, help="With --like: compare with our plan, at the same timesteps or at --grid.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Also plot alpha_bar, the timesteps and the added noise: .png or .svg. With --diff, both plans.",
)
@click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    multiple=True,
    help="With --plot: another plan file for the same figure; can be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as a plan file, for `ddim sample --plan`.")
def command(
    model: str,
    steps: int | None,
    sampler: str,
    grid: str | None,
    eta: float | None,
    sigma: str | None,
    clip_x0: bool | None,
    temperature: float | None,
    top_p: float | None,
    encode: bool,
    like: str | None,
    diff: bool,
    plot: Path | None,
    overlay: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Print the table of coefficients that a sampler runs on MODEL: one row per network evaluation.

    A row means x_next = x * state + x0 * predicted x_0 + eps * predicted noise + z * fresh noise; a column such as
    eps[-1] is the weight of the prediction one row before. For discrete data, a row has the probabilities that a token
    is kept, drawn from the predicted x_0, or drawn from the noise.

    \b
    Examples:
      ddim plan mnist --steps 10
      ddim plan mnist --steps 10 --eta 0.5
      ddim plan mnist --steps 10 --sampler unipc3 --grid log-snr
      ddim plan mnist --grid 1,50,300,1000 --json > plan.json
      ddim plan mnist --like diffusers:spacing=linspace --steps 10 --diff
      ddim plan mnist --steps 10 --eta 1 --plot plan.png --overlay plan.json
    """
    from ddim._io.checksum import seal
    from ddim.model.load import load

    if diff and (like is None or as_json):
        problem, hint = (
            ("cannot be combined with --json", "leave one out") if like else ("needs --like", "add --like diffusers")
        )
        raise DdimError("--diff", problem, hint)
    if overlay and plot is None:
        raise DdimError("--overlay", "needs --plot", "add --plot plan.png")
    if plot is not None:
        from ddim.evaluation import plots

        plots.check_plot(output_file(plot))
    settings = {"eta": eta, "sigma": sigma, "clip_x0": clip_x0, "encode": encode or None}
    sharp = {"temperature": temperature, "top_p": top_p}
    loaded = only_model(load(model, "cpu"), model)
    drawn = [read_plan(loaded, path, {}) for path in overlay]
    table: Any
    like_settings: dict[str, Any] = {}
    if like is None:
        table = make_plan(loaded, steps, grid, sampler, {**settings, **sharp})
    else:
        others = {"sampler": None if sampler == "auto" else sampler, "grid": None if diff else grid, "sigma": sigma}
        table, like_settings = make_like(loaded, like, steps, eta, clip_x0, others | sharp | {"encode": encode or None})
    if diff:
        ours = counterpart(loaded, table, like_settings, steps, grid)
        drawn.insert(0, ours)
        click.echo(comparison(loaded, table, ours, grid is None))
    else:
        text = seal(json.dumps(json.loads(table.to_json()), indent=1)).decode() if as_json else None
        click.echo(text or table.table(terminal_width()))
    if plot is not None:
        plots.plans(plot, [table, *drawn])
        click.echo(f"figure: {plot}", err=as_json)
