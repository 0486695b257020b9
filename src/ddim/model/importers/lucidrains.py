"""Import checkpoints of denoising-diffusion-pytorch, version 2, whose U-Net is `ddim.nn.lucidrains`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.model.config import ScheduleConfig, build
from ddim.model.importers import defaults
from ddim.model.importers.state_dict import Remaining, Weights, blank
from ddim.model.importers.types import CheckpointHints, ImportedModel
from ddim.nn.lucidrains import LucidrainsConfig

SIGNATURE = ("init_conv.weight", "time_mlp.3.weight")
"""Tensor names that identify such a state dict; in that of a GaussianDiffusion they begin with "model."."""
_NETWORK = "model."
_OBJECTIVES = {"eps": "pred_noise", "x0": "pred_x0", "v": "pred_v"}


def read(path: Path, tensors: dict[str, Tensor], hints: CheckpointHints) -> ImportedModel:
    """Convert the state dict of a Unet, or of a GaussianDiffusion that contains one.

    Raises:
        DdimError: If metadata is missing from the file and the hints, or the network is a different one.
    """
    defaults.reject_hints(hints, "the file determines its heads", "heads", "head_channels", "attention")
    defaults.reject_hints(hints, "that library never rescales times", "rescale")
    whole = f"{_NETWORK}{SIGNATURE[0]}" in tensors
    net = (
        {key.removeprefix(_NETWORK): t for key, t in tensors.items() if key.startswith(_NETWORK)} if whole else tensors
    )
    table = {key: t for key, t in tensors.items() if not key.startswith(_NETWORK)} if whole else {}
    network = _network(path, net, hints)
    schedule, of_schedule = _schedule(path, table, hints)
    predicts, of_predicts = _predicts(path, table, hints)
    config = defaults.config(path, network, schedule, predicts, "lucidrains")
    heads = ", ".join(f"{n} of {c}" for n, c in zip(network.heads, network.head_channels, strict=True))
    notes = [f"network: {network}, heads {heads} channels, sin-cos embedding (shift 1, theta 10000), time from 0"]
    notes += [of_schedule, of_predicts, "images: trained in [-1, 1] (auto_normalize, assumed)"]
    return ImportedModel(config, _weights(path, net, network), tuple(notes))


def _network(path: Path, net: dict[str, Tensor], hints: CheckpointHints) -> LucidrainsConfig:
    """The network, from tensor names and shapes."""
    _refuse(path, net)
    first, in_channels, _, _ = defaults.shape(net, "init_conv.weight", path, 4)
    out_channels = defaults.shape(net, "final_conv.weight", path, 4)[0]
    if in_channels == 2 * out_channels:
        problem = "is conditioned on its last prediction (self_condition), which is not supported"
        raise DdimError(path, problem, "use a checkpoint without it")
    if out_channels == 2 * in_channels:
        raise DdimError(path, "has a learned variance, which is not supported", "use a checkpoint without it")
    channels = defaults.shape(net, "time_mlp.1.weight", path, 2)[1]
    levels = next(level for level in itertools.count() if f"downs.{level}.0.block1.proj.weight" not in net)
    if not levels:
        raise DdimError(path, "contains no downs.0.0.block1.proj.weight", "use a checkpoint of version 2")
    ends = [f"downs.{level}.3" + (".1" if level < levels - 1 else "") for level in range(levels)]
    widths = [defaults.shape(net, f"{end}.weight", path, 4)[0] for end in ends]
    full = [f"downs.{level}.2.to_out.weight" in net for level in range(levels)]
    # Shape of mem_kv: (2, heads, memories, channels) in full attention, (2, heads, channels, memories) in linear.
    memory = [defaults.shape(net, f"downs.{level}.2.mem_kv", path, 4) for level in range(levels)]
    height, width = defaults.size(hints, path)
    values = {
        "in_channels": defaults.image_channels(in_channels, path),
        "height": height,
        "width": width,
        "channels": channels,
        "first": first,
        "multipliers": defaults.multiples(widths, channels, path),
        "full": full,
        "heads": [shape[1] for shape in memory],
        "head_channels": [shape[3 if all_pairs else 2] for shape, all_pairs in zip(memory, full, strict=True)],
        "memories": [shape[2 if all_pairs else 3] for shape, all_pairs in zip(memory, full, strict=True)],
    }
    return build(LucidrainsConfig, values, path)


def _refuse(path: Path, net: dict[str, Tensor]) -> None:
    """Reject unsupported options and older versions."""
    if "time_mlp.0.weights" in net:
        problem = "has custom frequencies (learned_sinusoidal_cond or random_fourier_features), which are not supported"
        raise DdimError(path, problem, "use a checkpoint without them")
    if any(key.startswith(("classes_emb", "null_classes_emb", "classes_mlp")) for key in net):
        raise DdimError(path, "is a network with labels", "wrap it with ddim.wrap and a fixed label")
    if any(".fn." in key or ".block1.norm.weight" in key for key in net):
        problem = "is from a version before 2, whose blocks differ"
        raise DdimError(path, problem, "wrap the network with ddim.wrap")


def _schedule(path: Path, table: dict[str, Tensor], hints: CheckpointHints) -> tuple[ScheduleConfig, str]:
    """The noise schedule: from the file's table of betas, or by the name in the hints."""
    if "betas" not in table:
        if hints.schedule is None:
            hint = "use `ddim convert FILE --schedule sigmoid` (that library's default), or linear or cosine"
            raise DdimError(path, "is a network without its noise schedule", hint)
        T = 1000 if hints.T is None else hints.T
        if hints.schedule != "sigmoid":
            return defaults.schedule(hints, path, (1000 / T * 1e-4, 1000 / T * 0.02))
        of_times = " (T assumed, not in the file: `ddim convert --times`)" if hints.T is None else ""
        values: dict[str, Any] = {"name": "betas", "T": T, "betas": [float(beta) for beta in sigmoid_betas(T)]}
        return build(ScheduleConfig, values, path), f"schedule: that library's sigmoid, T = {T}, as a table{of_times}"
    betas = table["betas"].double().flatten()
    for option, value in (("--schedule", hints.schedule), ("--times", hints.T)):
        if value is not None:
            raise DdimError(f"{option} {value}", f"is defined by {path}, as a table of betas", "remove it")
    T = len(betas)
    for name, bounds in {"linear": {"beta_start": 1000 / T * 1e-4, "beta_end": 1000 / T * 0.02}, "cosine": {}}.items():
        schedule = ScheduleConfig.model_validate({"name": name, "T": T, **bounds})
        if T > 20 and np.allclose(schedule.build().betas, betas.numpy(), rtol=1e-5, atol=0):
            return schedule, f"schedule: {name} betas, T = {T}, from the file's table"
    schedule = build(ScheduleConfig, {"name": "betas", "T": T, "betas": betas.tolist()}, path)
    return schedule, f"schedule: the file's table of betas, {betas[0]:g} to {betas[-1]:g}, T = {T}"


def sigmoid_betas(T: int) -> np.ndarray:
    """The betas of that library's default schedule: alpha_bar is a logistic curve from -3 to 3 (Jabri et al. 2022).

    Args:
        T: The number of timesteps.

    Returns:
        float64, (T,), capped at 0.999.
    """
    curve = 1 / (1 + np.exp(6 * np.arange(T + 1) / T - 3))
    alpha_bar = (curve - curve[-1]) / (curve[0] - curve[-1])
    return np.asarray(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


def _predicts(path: Path, table: dict[str, Tensor], hints: CheckpointHints) -> tuple[str, str]:
    """The prediction type, from the loss weights in the file or from the hints.

    At a signal-to-noise ratio s <= 1 the loss weights are 1 for pred_noise, s for pred_x0 and s / (s + 1) for pred_v.
    """
    prediction = None
    if {"loss_weight", "alphas_cumprod"} <= table.keys():
        alpha_bar = table["alphas_cumprod"].double().clamp(1e-12, 1 - 1e-12)
        noisy = alpha_bar <= 0.5
        snr, weights = (alpha_bar / (1 - alpha_bar))[noisy], table["loss_weight"].double()[noisy]
        options = {"eps": torch.ones_like(snr), "x0": snr, "v": snr / (snr + 1)}
        match = [name for name, option in options.items() if torch.allclose(weights, option, rtol=1e-3, atol=1e-6)]
        prediction = match[0] if len(match) == 1 else None
    if prediction is None:
        if hints.predicts is None:
            hint = "use `ddim convert FILE --predicts v` (pred_v, that library's default), or eps (pred_noise), x0"
            raise DdimError(path, "does not record what its network predicts", hint)
        return defaults.predicts(hints, path)
    if hints.predicts not in (None, prediction):
        problem = f"is not what {path} was trained for: its loss weights are those of {_OBJECTIVES[prediction]}"
        raise DdimError(f"--predicts {hints.predicts}", problem, "remove it")
    return prediction, f"predicts: {prediction} ({_OBJECTIVES[prediction]}, from the file's loss weights)"


def _weights(path: Path, net: dict[str, Tensor], network: LucidrainsConfig) -> Weights:
    """The converted state dict; every tensor of the source must be used."""
    remaining, out = Remaining(dict(net), str(path)), {}
    shapes = {key: value.shape for key, value in blank(network).items()}
    for native, external in _names(network):
        if native in shapes:  # a layer may have no bias, a block no skip convolution
            out[native] = remaining.take(external, shapes[native])
    blocks = [external for _, external, kind in _parts(network) if kind == "block"]
    for key in ("weight", "bias"):
        names = [f"{external}.mlp.1.{key}" for external in blocks]
        out[f"time_to_blocks.{key}"] = remaining.join(names, shapes[f"time_to_blocks.{key}"])
    remaining.reject()
    return out


def _parts(network: LucidrainsConfig) -> Iterator[tuple[str, str, str]]:
    """The native name, the external name and the type of every block and attention, in the order in which they run."""
    for half, full in (("down", network.full), ("up", network.full[::-1])):
        for level, all_pairs in enumerate(full):
            yield from ((f"{half}_blocks.{2 * level + i}", f"{half}s.{level}.{i}", "block") for i in (0, 1))
            yield f"{half}_attention.{level}", f"{half}s.{level}.2", "full" if all_pairs else "linear"
        if half == "down":
            yield from (("middle.0", "mid_block1", "block"), ("middle_attention", "mid_attn", "full"))
            yield "middle.1", "mid_block2", "block"
    yield "last_block", "final_res_block", "block"


def _names(network: LucidrainsConfig) -> Iterator[tuple[str, str]]:
    """The native and the external name of every tensor except the time layers of blocks.

    Some of these tensors may not exist in a given network.
    """
    layers = [("time.0", "time_mlp.1"), ("time.2", "time_mlp.3"), ("conv_in", "init_conv"), ("conv_out", "final_conv")]
    last = len(network.multipliers) - 1
    for level in range(last + 1):
        inner = ".1" if level < last else ""
        layers += [(f"{half}.{level}{inner}", f"{half}.{level}.3{inner}") for half in ("downs", "ups")]
    for native, external, kind in _parts(network):
        if kind == "block":
            layers += [(f"{native}.conv{i}", f"{external}.block{i}.proj") for i in (1, 2)]
            layers.append((f"{native}.skip", f"{external}.res_conv"))
            yield from ((f"{native}.norm{i}.gain", f"{external}.block{i}.norm.g") for i in (1, 2))
            continue
        layers += [(f"{native}.qkv", f"{external}.to_qkv")]
        layers += [(f"{native}.out", f"{external}.to_out" + (".0" if kind == "linear" else ""))]
        yield f"{native}.norm.gain", f"{external}.norm.g"
        yield f"{native}.memory", f"{external}.mem_kv"
        yield f"{native}.norm_out.gain", f"{external}.to_out.1.g"
    yield from ((f"{native}.{key}", f"{external}.{key}") for native, external in layers for key in ("weight", "bias"))
