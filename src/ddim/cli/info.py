"""`ddim info`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ddim._io.terminal import counted, terminal_width, wrapped
from ddim.cli._options import only_model
from ddim.errors import printable

if TYPE_CHECKING:
    from ddim.model.config import CategoricalConfig, TrainConfig


@click.command("info")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print the whole configuration as JSON.")
def command(model: str, as_json: bool) -> None:
    """Show the configuration and provenance of MODEL, after verifying its checksum and weights.

    \b
    Example:
      ddim info mnist
    """
    from ddim.model.checkpoint import find
    from ddim.model.config import to_json
    from ddim.model.hub import place as find_place
    from ddim.model.importers import is_importable
    from ddim.model.load import load

    place = find_place(model)
    loaded = only_model(load(place, "cpu"), place)
    config = loaded.config
    if as_json:
        click.echo(_visible(to_json(config)), nl=False)
        return
    net, policy, origin, noise = config.network, config.data, config.provenance, config.categorical
    parameters = sum(p.numel() for p in loaded.network.parameters())
    first, last = loaded.schedule.level(1), loaded.schedule.level(loaded.schedule.T)
    recipe, noun = origin.training, loaded.kind.noun
    lines = {
        "model": str(place if is_importable(place) else find(place)),
        **({"read as": "; ".join(loaded.notes)} if loaded.notes else {}),
        **policy.facts(),
        **({} if noise is None else {"categories": f"{noise.categories}, noise {_pi(noise)}"}),
        "network": f"{net}; {parameters / 1e6:.1f} M parameters",
        "labels": f"{net.classes} classes" if net.classes else "none",
        "predicts": config.predicts,
        "schedule": f"{loaded.schedule.name}, T = {loaded.schedule.T}, log-SNR {first.log_snr:.2f} at t = 1 to "
        f"{last.log_snr:.2f} at T",
        "trained on": f"{origin.data} ({origin.split}), {counted(origin.images, noun)}, hash {origin.data_fingerprint}"
        if origin.data
        else "unknown",
        "training": f"{counted(origin.steps, 'steps')}, {counted(origin.images_seen, noun)} seen, "
        f"{counted(round(origin.seconds / 60), 'minutes')}" + (_recipe(recipe) if recipe else ""),
        **({"initial weights": f"of the model with the checksum {origin.init_from}"} if origin.init_from else {}),
        "error table": f"from {origin.error_from or 'an unknown source'}: {config.error[0]:.4g} at t = 1 to "
        f"{config.error[-1]:.4g} at T"
        if config.error
        else "none (`ddim calibrate` measures one)",
        "command": origin.command or "unknown",
        "written by": f"ddim {origin.version}" if origin.version else "unknown",
        "sha256": f"{config.sha256} (verified)" if config.sha256 else f"{loaded.fingerprint} (of the weights as read)",
    }
    width = max(len(key) for key in lines)
    for key, value in lines.items():
        for line in wrapped(printable(value), terminal_width(), f"{key:{width}}  ", " " * (width + 2)):
            click.echo(line)


def _visible(text: str) -> str:
    """JSON text with control characters escaped, so that a terminal does not interpret them; the same JSON value."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _recipe(recipe: TrainConfig) -> str:
    average = f"half-life {recipe.ema_half_life:.0%}" if recipe.ema_half_life else str(recipe.ema)
    return f", gamma {recipe.gamma}, times {recipe.times}, EMA {average}, seed {recipe.seed}"


def _pi(noise: CategoricalConfig) -> str:
    name = noise.pi if isinstance(noise.pi, str) else "with an explicit pi"
    return name + (", tokens that are not masked are carried over" if noise.carry_over else "")
