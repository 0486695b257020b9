"""`ddim plan`."""

from __future__ import annotations

import json
from typing import Any

import click

from ddim.cli._emulation import comparison, like_option, make_like
from ddim.cli._options import (
    grid_option,
    make_plan,
    noise_options,
    only_model,
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
    """
    from ddim._io.checksum import seal
    from ddim.model.load import load

    if diff and (like is None or as_json):
        problem, hint = (
            ("cannot be combined with --json", "leave one out") if like else ("needs --like", "add --like diffusers")
        )
        raise DdimError("--diff", problem, hint)
    settings = {"eta": eta, "sigma": sigma, "clip_x0": clip_x0, "encode": encode or None}
    sharp = {"temperature": temperature, "top_p": top_p}
    loaded = only_model(load(model, "cpu"), model)
    table: Any
    like_settings: dict[str, Any] = {}
    if like is None:
        table = make_plan(loaded, steps, grid, sampler, {**settings, **sharp})
    else:
        others = {"sampler": None if sampler == "auto" else sampler, "grid": None if diff else grid, "sigma": sigma}
        table, like_settings = make_like(loaded, like, steps, eta, clip_x0, others | sharp | {"encode": encode or None})
    if diff:
        click.echo(comparison(loaded, table, like_settings, steps, grid))
    else:
        click.echo(seal(json.dumps(json.loads(table.to_json()), indent=1)).decode() if as_json else str(table))
