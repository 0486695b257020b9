"""`ddim convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._options import OutputFolder, resolution
from ddim.cli._ranges import COUNT, TIMES
from ddim.errors import DdimError

if TYPE_CHECKING:
    from torch import Tensor

    from ddim.model.config import ModelConfig
    from ddim.model.importers import CheckpointHints

KINDS = ("diffusers", "official", "openai", "lucidrains")


@click.command("convert")
@click.argument("source")
@click.option("--out", required=True, type=OutputFolder(), help="Folder to write.")
@click.option(
    "--to", type=click.Choice(["ddim", "diffusers"]), default="ddim", show_default=True, help="Target format."
)
@click.option("--from", "kind", type=click.Choice(KINDS), help="Source library. [default: detected by its names]")
@click.option("--size", help="Resolution, 32 or 32x48 (height x width), if missing in SOURCE.")
@click.option("--schedule", help="Noise schedule by name, such as linear or cosine, if missing in SOURCE.")
@click.option("--times", type=TIMES, help="Number of timesteps T, if missing in SOURCE.")
@click.option("--predicts", type=click.Choice(["eps", "x0", "v"]), help="Prediction of the network, if missing.")
@click.option("--heads", type=COUNT, help="Number of attention heads, if missing in SOURCE.")
@click.option("--head-channels", type=COUNT, help="Channels per attention head, instead of --heads.")
@click.option("--qkv", type=click.Choice(["legacy", "new"]), help="OpenAI models: new is use_new_attention_order.")
@click.option(
    "--rescale-times/--no-rescale-times",
    default=None,
    help="OpenAI models with T other than 1000: whether the network takes (t - 1) 1000 / T as its timestep.",
)
@click.option("--no-ema", is_flag=True, help="Use the raw weights even if there are averaged (EMA) weights.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Precision in which weights are stored, with --to ddim.",
)
def command(
    source: str,
    out: Path,
    to: str,
    kind: str | None,
    size: str | None,
    schedule: str | None,
    times: int | None,
    predicts: str | None,
    heads: int | None,
    head_channels: int | None,
    qkv: str | None,
    rescale_times: bool | None,
    no_ema: bool,
    dtype: str,
) -> dict[str, Any]:
    """Convert SOURCE: a diffusers folder or hub id, a checkpoint of another library, or a model of this one.

    Every setting that is read or assumed is printed. Nothing in a checkpoint is ever executed.

    \b
    Examples:
      ddim convert ./ddpm-cifar10-32 --out cifar10
      ddim convert diffusion_cifar10.ckpt --size 32 --out cifar10
      ddim convert runs/photos --to diffusers --out photos-diffusers
    """
    from ddim.model.importers import CheckpointHints

    hints = CheckpointHints(
        resolution(size), schedule, times, predicts, heads, head_channels, qkv, not no_ema, rescale_times
    )
    config, weights, notes = _read(source, hints, kind)
    for note in notes:
        click.echo(note)
    if to == "diffusers":
        from ddim.interop import diffusers_export

        for line in diffusers_export.write(out, config, weights):
            click.echo(f"written: {line}")
        click.echo(f"written: {out}; load it with DDIMPipeline.from_pretrained({str(out)!r})")
        return {"out": out, "format": to, "notes": notes}
    import torch

    from ddim.model import checkpoint

    checkpoint.write(out, config, {key: tensor.to(getattr(torch, dtype)) for key, tensor in weights.items()})
    click.echo(f"written: {out}; sample from it with `ddim sample {out} --out samples`")
    return {"out": out, "format": to, "notes": notes}


def _read(
    source: str, hints: CheckpointHints, kind: str | None
) -> tuple[ModelConfig, dict[str, Tensor], tuple[str, ...]]:
    """The configuration, weights and notes of any source."""
    from ddim.model import hub, importers
    from ddim.model.importers import CheckpointHints

    set_hints = [name for name, value in asdict(hints).items() if value != getattr(CheckpointHints(), name)]
    location = hub.place(source)
    foreign, folder = importers.is_importable(location), Path(location).is_dir()
    if not foreign and (kind or set_hints):
        problem = f"is a model of this library, which defines {kind or set_hints[0]}"
        raise DdimError(source, problem, "leave out all but --out, --to and --dtype")
    if foreign and folder and set_hints:
        raise DdimError(source, f"is a folder, which defines {set_hints[0]}", "leave it out")
    if foreign and kind and (kind == "diffusers") != folder:
        raise DdimError(
            "--from " + kind, f"does not fit {source}", "a diffusers model is a folder, other models are files"
        )
    return hub.contents(location, hints, kind)
