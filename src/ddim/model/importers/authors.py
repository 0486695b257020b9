"""Import state dicts of the DDIM authors' code and its PyTorch port of DDPM: the network of Ho et al. 2020."""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import Tensor

from ddim.errors import DdimError
from ddim.model.config import build
from ddim.model.importers import defaults
from ddim.model.importers.state_dict import Names, Place, to_native
from ddim.model.importers.types import CheckpointHints, ImportedModel
from ddim.nn.unet import UNetConfig

SIGNATURE = ("temb.dense.0.weight", "down.0.block.0.conv1.weight")
"""Tensor names that identify such a state dict."""


def read(path: Path, tensors: dict[str, Tensor], hints: CheckpointHints) -> ImportedModel:
    """Convert a state dict.

    Raises:
        DdimError: If metadata is missing from the file and the hints, or the network is a different one.
    """
    defaults.reject_hints(hints, "that library's attention has one head", "heads", "head_channels", "attention")
    defaults.reject_hints(hints, "that library never rescales times", "rescale")
    # "nin" is a 1x1 convolution, "conv" a 3x3 one, which no configuration of that library uses.
    tensors = {key.replace(".conv_shortcut.", ".nin_shortcut."): tensor for key, tensor in tensors.items()}
    network = _network(path, tensors, hints)
    # "quad" there means betas whose square root is linear, here "scaled-linear"; "quadratic" is different.
    name = "scaled-linear" if hints.schedule == "quad" else None
    schedule, of_schedule = defaults.schedule(hints, path, name=name)
    predicts, of_predicts = defaults.predicts(hints, path)
    config = defaults.config(path, network, schedule, predicts, "official")
    notes = [f"network: {network}, one head, padded far, norm eps 1e-06, sin-cos embedding (shift 1), time from 0"]
    notes += ["dropout: 0 (used only in training)", of_schedule, of_predicts]
    return ImportedModel(config, to_native(tensors, network, _names(network), str(path)), tuple(notes))


def _network(path: Path, tensors: dict[str, Tensor], hints: CheckpointHints) -> UNetConfig:
    channels, in_channels, _, _ = defaults.shape(tensors, "conv_in.weight", path, 4)
    defaults.image_channels(in_channels, path)
    levels = _count(tensors, "down.{}.block.0.conv1.weight")
    widths = [defaults.shape(tensors, f"down.{level}.block.0.conv1.weight", path, 4)[0] for level in range(levels)]
    if levels > 1 and "down.0.downsample.conv.weight" not in tensors:
        problem = "resamples without weights (resamp_with_conv is off), which is not supported"
        raise DdimError(path, problem, "wrap the network with ddim.wrap")
    if not levels:
        raise DdimError(path, "contains no down.0.block.0.conv1.weight", "use a checkpoint of such a network")
    height, width = defaults.size(hints, path)
    values = {
        "in_channels": in_channels,
        "height": height,
        "width": width,
        "channels": channels,
        "multipliers": defaults.multiples(widths, channels, path),
        "blocks": _count(tensors, "down.0.block.{}.conv1.weight"),
        "attention": [height >> level for level in range(levels) if f"down.{level}.attn.0.q.weight" in tensors],
        "dropout": 0.0,
    }
    return build(UNetConfig, values, path)


def _count(tensors: dict[str, Tensor], name: str) -> int:
    return next(number for number in itertools.count() if name.format(number) not in tensors)


def _names(network: UNetConfig) -> Names:
    last = len(network.multipliers) - 1

    def prefix(place: Place) -> str:
        if place.half == "middle":
            return f"mid.block_{place.inner + 1}" if place.kind == "block" else "mid.attn_1"
        level = place.level if place.half == "down" else last - place.level
        if place.kind == "resample":
            return f"{place.half}.{level}.{place.half}sample"
        return f"{place.half}.{level}.{'block' if place.kind == 'block' else 'attn'}.{place.inner}"

    single = {"time.0": "temb.dense.0", "time.2": "temb.dense.1"}
    return Names(
        prefix=prefix,
        single=single | {name: name for name in ("conv_in", "norm_out", "conv_out")},
        block={name: name for name in ("norm1", "conv1", "norm2", "conv2")}
        | {"skip": "nin_shortcut", "time": "temb_proj"},
        attention={"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"},
    )
