"""`ddim plan`."""

from __future__ import annotations

import json

import click

from ddim.cli.options import grid_option, make_any_plan, noise_options, sampler_option, sharpness_options, steps_option


@click.command("plan")
@click.argument("model")
@steps_option(20)
@sampler_option
@grid_option(default="equal-angle; auto has its own")
@noise_options
@sharpness_options
@click.option("--encode", is_flag=True, help="The plan that encodes: rising levels.")
@click.option("--json", "as_json", is_flag=True, help="As a plan file, for `ddim sample --plan`.")
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
    as_json: bool,
) -> None:
    """Print the table of coefficients that a sampler runs on MODEL: one row per network call.

    Each row says x_next = x * state + x0 * predicted x_0 + eps * predicted noise + z * fresh noise; a column such as
    eps[-1] weighs the prediction one row before. Of categories it says with what probability a token is kept, drawn
    from the predicted x_0, or from the noise.

    \b
    Examples:
      ddim plan mnist --steps 10
      ddim plan mnist --steps 10 --eta 0.5
      ddim plan mnist --steps 10 --sampler unipc3 --grid log-snr
      ddim plan mnist --grid 1,50,300,1000 --json > plan.json
    """
    from ddim.model import load

    settings = {"eta": eta, "sigma": sigma, "clip_x0": clip_x0, "encode": encode or None}
    sharp = {"temperature": temperature, "top_p": top_p}
    made = make_any_plan(load(model, "cpu"), steps, grid, sampler, **settings, **sharp)
    click.echo(json.dumps(json.loads(made.to_json()), indent=1) if as_json else str(made))
