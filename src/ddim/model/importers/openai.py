"""Import state dicts of OpenAI's improved-diffusion and guided-diffusion: their U-Nets without labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.errors import DdimError
from ddim.model.config import build
from ddim.model.importers import defaults
from ddim.model.importers.state_dict import Names, Place, to_native
from ddim.model.importers.types import CheckpointHints, ImportedModel
from ddim.nn.unet import UNetConfig

SIGNATURE = ("time_embed.0.weight", "input_blocks.0.0.weight")
"""Tensor names that identify such a state dict."""


def read(path: Path, tensors: dict[str, Tensor], hints: CheckpointHints) -> ImportedModel:
    """Convert a state dict.

    Raises:
        DdimError: If metadata is missing from the file and the hints, or the network is a different one.
    """
    if "label_emb.weight" in tensors:
        raise DdimError(path, "is a network with labels", "wrap it with ddim.wrap and a fixed label")
    T = 1000 if hints.T is None else hints.T
    schedule, of_schedule = defaults.schedule(hints, path, (1000 / T * 1e-4, 1000 / T * 0.02))
    predicts, of_predicts = defaults.predicts(hints, path)
    network, notes = _network(path, tensors, hints, T)
    config = defaults.config(path, network, schedule, predicts, "openai")
    weights = to_native(tensors, network, _names(network, hints.attention or "legacy"), str(path))
    return ImportedModel(config, weights, (*notes, of_schedule, of_predicts))


def _network(path: Path, tensors: dict[str, Tensor], hints: CheckpointHints, T: int) -> tuple[UNetConfig, list[str]]:
    """The network, from tensor names and shapes, and notes on it."""
    channels, in_channels, _, _ = defaults.shape(tensors, "input_blocks.0.0.weight", path, 4)
    defaults.image_channels(in_channels, path)
    if defaults.shape(tensors, "time_embed.0.weight", path, 2)[1] != channels:
        problem = "has a first multiplier that is not 1, which is not supported"
        raise DdimError(path, problem, "wrap the network with ddim.wrap")
    levels, blocks, in_block = _levels(path, tensors)
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    widths = [defaults.shape(tensors, f"{first}.0.in_layers.2.weight", path, 4)[0] for first in firsts]
    scale_shift = defaults.shape(tensors, "input_blocks.1.0.emb_layers.1.weight", path, 2)[0] == 2 * widths[0]
    height, width = defaults.size(hints, path)
    heads, of_heads = _heads(path, hints)
    time_scale, of_time = _time_scale(hints, T, in_block)
    values = {
        "in_channels": in_channels,
        "height": height,
        "width": width,
        "channels": channels,
        "multipliers": defaults.multiples(widths, channels, path),
        "blocks": blocks,
        "attention": [height >> level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in tensors],
        **heads,
        "dropout": 0.0,
        "norm_eps": 1e-5,
        "padding": "both",
        "embedding": "cos-sin",
        "embedding_shift": 0,
        "time_scale": time_scale,
        "scale_shift": scale_shift,
        "resample": "block" if in_block else "conv",
        "learned_variance": defaults.shape(tensors, "out.2.weight", path, 4)[0] == 2 * in_channels,
    }
    network = build(UNetConfig, values, path)
    effect = "scales and shifts norms" if scale_shift else "is added"
    facts = f"padded both, norm eps 1e-05, cos-sin embedding (shift 0), time {effect}, resolution changes in "
    notes = [f"network: {network}, {facts}{'residual blocks' if in_block else 'convolutions'}", of_heads, of_time]
    if network.learned_variance:
        notes.append("variance: learned, for `ddim sample --sigma learned`; other plans ignore it")
    return network, [*notes, "dropout: 0 (used only in training)"]


def _levels(path: Path, tensors: dict[str, Tensor]) -> tuple[int, int, bool]:
    """The number of levels, of blocks per level of the encoder, and whether resolution changes in residual blocks.

    A downsampling block looks like any other block. In the decoder, upsampling follows a block within the same module,
    so the levels are recognised there.
    """
    inputs, counts = (
        {int(match[1]) for key in tensors if (match := re.match(rf"{half}_blocks\.(\d+)\.", key))}
        for half in ("input", "output")
    )
    ends = {"conv": "conv.weight", "block": "in_layers.2.weight"}
    changes = {
        kind: [at for at in sorted(counts) if any(f"output_blocks.{at}.{i}.{end}" in tensors for i in (1, 2))]
        for kind, end in ends.items()
    }
    resamplers = changes["conv"] or changes["block"]
    per_level = resamplers[0] + 1 if resamplers else len(counts)
    regular = len(inputs) == len(counts) == (len(resamplers) + 1) * per_level
    if per_level < 2 or not regular or all(changes.values()):
        problem = (
            "has levels that cannot be recognised; they resample without weights (conv_resample is off), or differ"
        )
        raise DdimError(path, problem, "wrap the network with ddim.wrap")
    return len(resamplers) + 1, per_level - 1, bool(changes["block"])


def _heads(path: Path, hints: CheckpointHints) -> tuple[dict[str, Any], str]:
    """The attention heads, which cannot be derived from tensor shapes."""
    if hints.attention not in (None, "legacy", "new"):
        raise DdimError(path, f"cannot have the attention order {hints.attention!r}", "choose legacy or new")
    if (hints.heads is None) == (hints.head_channels is None):
        problem = "does not record its attention heads" if hints.heads is None else "has heads specified twice"
        hint = "use `ddim convert FILE --heads 4` (1 for improved-diffusion's LSUN), or --head-channels 64"
        raise DdimError(path, problem, f"{hint} (most of guided-diffusion's)")
    if hints.head_channels is not None and hints.head_channels < 1:
        raise DdimError(f"--head-channels {hints.head_channels}", "is not an integer >= 1", "use 1 or more")
    order = hints.attention or "legacy"
    layout = "legacy: head by head" if order == "legacy" else "new: all of q, then k, then v"
    note = f"qkv order: {layout}" + (
        "" if hints.attention else " (assumed, both libraries' default: `ddim convert --qkv`)"
    )
    if hints.head_channels is not None:
        return {"head_channels": hints.head_channels}, f"attention: heads of {hints.head_channels} channels, {note}"
    return {"heads": hints.heads}, f"attention: heads {hints.heads}, {note}"


def _time_scale(hints: CheckpointHints, T: int, in_block: bool) -> tuple[float, str]:
    """The factor of t - 1, and a note on its source."""
    if T == 1000:
        return 1.0, "time: from 0 to 999"
    # Only guided-diffusion has such blocks or heads of a fixed width, and it does not rescale by default.
    guided = in_block or hints.head_channels is not None or hints.attention == "new"
    rescaled = not guided if hints.rescale is None else hints.rescale
    scaling = f"times 1000/{T}, as with rescale_timesteps" if rescaled else f"from 0 to {T - 1}, not rescaled"
    library = "guided-diffusion" if guided else "improved-diffusion"
    assumption = f" (assumed, the default of {library})" if hints.rescale is None else ""
    return 1000 / T if rescaled else 1.0, f"time: {scaling}{assumption}"


def _names(network: UNetConfig, order: str) -> Names:
    per_level, last = network.blocks + 1, len(network.multipliers) - 1

    def prefix(place: Place) -> str:
        if place.half == "middle":
            return f"middle_block.{1 if place.kind == 'attention' else 2 * place.inner}"
        inner = 1 if place.kind == "attention" else 0
        if place.half == "down":
            return f"input_blocks.{1 + place.level * per_level + place.inner}.{inner}"
        if place.kind == "resample":  # after the level's last block, and after its attention if there is one
            attends = network.height >> (last - place.level) in network.attention
            return f"output_blocks.{(place.level + 1) * per_level - 1}.{2 if attends else 1}"
        return f"output_blocks.{place.level * per_level + place.inner}.{inner}"

    return Names(
        prefix=prefix,
        single={
            "time.0": "time_embed.0",
            "time.2": "time_embed.2",
            "conv_in": "input_blocks.0.0",
            "norm_out": "out.0",
            "conv_out": "out.2",
        },
        block={
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "time": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "skip": "skip_connection",
        },
        attention={"norm": "norm", "qkv": "qkv", "out": "proj_out"},
        resample={"down": "op", "up": "conv"},
        interleaved=order == "legacy",
    )
