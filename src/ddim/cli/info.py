"""`ddim info`."""

from __future__ import annotations

import click


@click.command("info")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="The whole configuration as JSON.")
def command(model: str, as_json: bool) -> None:
    """Show what MODEL is and where it comes from; its checksum and weights are verified.

    \b
    Example:
      ddim info mnist
    """
    from ddim.checkpoint import find
    from ddim.config import to_json
    from ddim.model import load

    loaded = load(model, "cpu")
    config = loaded.config
    if as_json:
        click.echo(to_json(config), nl=False)
        return
    net, policy, origin = config.network, config.data, config.provenance
    parameters = sum(p.numel() for p in loaded.network.parameters())
    first, last = loaded.schedule.level(1), loaded.schedule.level(loaded.schedule.T)
    recipe = origin.training
    lines = {
        "model": str(find(model)),
        "pictures": f"{policy.height}x{policy.width}, {'grey' if policy.channels == 1 else 'colour'}",
        "network": f"U-Net, {parameters / 1e6:.1f} M parameters, {net.channels} channels x {list(net.multipliers)}, "
        f"{net.blocks} blocks, patch {net.patch}, attention at {list(net.attention)}",
        "labels": f"{net.classes} classes" if net.classes else "none",
        "predicts": config.predicts,
        "schedule": f"{loaded.schedule.name}, T = {loaded.schedule.T}, log-SNR {first.log_snr:.2f} at t = 1 to "
        f"{last.log_snr:.2f} at T",
        "data policy": f"fit {policy.fit}, filter {policy.filter}, matte {policy.matte}"
        + (f", box {list(policy.box)}" if policy.box else ""),
        "trained on": f"{origin.data} ({origin.split}), {origin.pictures} pictures, hash {origin.data_fingerprint}"
        if origin.data
        else "unknown",
        "training": f"{origin.steps} steps, {origin.images_seen} pictures seen, {origin.seconds / 60:.0f} minutes"
        + (f", gamma {recipe.gamma}, EMA {recipe.ema}, seed {recipe.seed}" if recipe else ""),
        "error table": f"from {origin.error_from or 'an unknown place'}: {config.error[0]:.4g} at t = 1 to "
        f"{config.error[-1]:.4g} at T"
        if config.error
        else "none (`ddim calibrate` measures one)",
        "command": origin.command or "unknown",
        "written by": f"ddim {origin.version}" if origin.version else "unknown",
        "sha256": f"{config.sha256} (verified)",
    }
    width = max(len(key) for key in lines)
    for key, value in lines.items():
        click.echo(f"{key:{width}}  {value}")
