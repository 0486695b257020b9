"""`ddim show`."""

from __future__ import annotations

from pathlib import Path

import click

from ddim.cli._options import output_file
from ddim.errors import DdimError

SAMPLERS = "ddim,ddim:1,ab2,unipc3"


@click.group("show")
def command() -> None:
    """Plot noise schedules, or the paths of samplers through data whose denoiser is known.

    \b
    Examples:
      ddim show schedule --out schedules.png
      ddim show schedule linear cosine mnist --out schedules.png
      ddim show trajectories --steps 10 --out paths.png
    """


_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="Figure to write: .png or .svg.")


@command.command("schedule")
@click.argument("names", nargs=-1)
@_out
def schedule_command(names: tuple[str, ...], out: Path) -> None:
    """Plot alpha_bar, log-SNR and beta of NAMES: schedules, schedule files or models. [default: all schedules]

    \b
    Example:
      ddim show schedule linear cosine mnist --out schedules.png
    """
    output_file(out)
    from ddim.cli.check import schedule_of
    from ddim.evaluation import plots
    from ddim.process import schedule

    plots.check_plot(out)
    plots.schedules(out, {name: schedule_of(name) for name in names or schedule.NAMED})
    click.echo(f"figure: {out}")


@command.command("trajectories")
@click.option("--steps", type=int, default=10, show_default=True, help="Number S of sampling steps.")
@click.option(
    "--sampler",
    "samplers",
    default=SAMPLERS,
    show_default=True,
    help="Samplers separated by commas, one panel each; ddim:ETA is DDIM with noise.",
)
@click.option("--schedule", "name", default="linear", show_default=True, help="A schedule, a schedule file or a model.")
@click.option("-n", "n", type=int, default=16, show_default=True, help="Number of paths.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@_out
def trajectories_command(steps: int, samplers: str, name: str, n: int, seed: int, out: Path) -> None:
    """Plot the paths of samplers from the same starts through a mixture of three Gaussians, with its exact denoiser.

    \b
    Example:
      ddim show trajectories --steps 5 --sampler ddim,ddim:1,unipc3 --out paths.png
    """
    output_file(out)
    from ddim.cli.check import schedule_of
    from ddim.evaluation import plots
    from ddim.samplers.registry import Planner
    from ddim.samplers.settings import SamplerSettings

    plots.check_plot(out)
    if not 1 <= n <= 1000:
        raise DdimError(f"-n {n}", "is outside 1..1000", "use a number such as 16")
    schedule, plans = schedule_of(name), {}
    planner = Planner(schedule, "v")
    for text in samplers.split(","):
        sampler, _, eta = text.partition(":")
        settings = SamplerSettings(steps=steps, sampler=sampler, eta=_eta(text, eta) if eta else None)
        plans[f"{sampler}, eta = {eta}" if eta else sampler] = planner.plan(settings)
    plots.trajectories(out, plans, schedule, n, seed)
    click.echo(f"figure: {out}")


def _eta(text: str, eta: str) -> float:
    try:
        return float(eta)
    except ValueError:
        raise DdimError(f"--sampler {text}", "has no number after the colon", "write ddim:1") from None
