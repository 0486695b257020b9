"""Export of a model as a diffusers pipeline folder, which `DDIMPipeline.from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddim._io.atomic import make_folder, new_folder, unexpected_entries, write_atomic
from ddim.errors import DdimError
from ddim.model.config import ModelConfig
from ddim.model.importers.clipping import CLIPS
from ddim.model.importers.diffusers import BETAS, NAMES, PREDICTION_TYPES, SCHEDULER
from ddim.model.importers.state_dict import from_native
from ddim.nn.unet import UNetConfig

INDEX, UNET, WEIGHTS = "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
_CLIPPING = ("clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
VERSION = "0.42.1"  # the diffusers version whose format is written


def write(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> list[str]:
    """Write a model as a diffusers pipeline folder, atomically.

    Args:
        folder: The folder, created, or replaced if it is a pipeline written by this function.
        config: The model's configuration.
        weights: The model's state dict, in this library's names.

    Returns:
        A description of the network and of the scheduler, a line each.

    Raises:
        DdimError: If a UNet2DModel cannot represent the network, or the folder has other content.
    """
    network = describe(config, folder)
    if _has_unexpected_content(folder):
        raise DdimError(folder, "has content that is not a diffusers pipeline", "choose another folder")
    assert isinstance(config.network, UNetConfig)
    scheduler = scheduler_config(config)
    tensors = {key: t.to(torch.float32) for key, t in from_native(weights, config.network, NAMES).items()}
    index: dict[str, Any] = {"_class_name": "DDIMPipeline", "_diffusers_version": VERSION}
    index |= {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    with new_folder(folder) as part:
        for inner in ("unet", "scheduler"):
            make_folder(part / inner)
        write_atomic(part / WEIGHTS, save(tensors, {"format": "pt"}))
        for name, value in ((UNET, network), (SCHEDULER, scheduler), (INDEX, index)):
            write_atomic(part / name, (json.dumps(value, indent=2) + "\n").encode())
    return [
        f"network: UNet2DModel, {sum(t.numel() for t in tensors.values()):,} parameters, float32",
        f"scheduler: DDIMScheduler, {scheduler['beta_schedule'] or 'trained'} betas, {scheduler['prediction_type']}, "
        f"clip_sample {scheduler['clip_sample']}, timestep_spacing {scheduler['timestep_spacing']}",
    ]


def _has_unexpected_content(folder: Path) -> bool:
    """Whether a path has anything but a pipeline written by `write`, which may be replaced as a whole."""
    if folder.exists() and not folder.is_dir():
        return True
    inner = {"unet": [Path(UNET).name, Path(WEIGHTS).name], "scheduler": [Path(SCHEDULER).name]}
    other = unexpected_entries(folder, INDEX, *inner) or any(
        unexpected_entries(folder / name, *files) for name, files in inner.items()
    )
    return bool(other) or any((folder / name).is_dir() for name in (INDEX, UNET, WEIGHTS, SCHEDULER))


def describe(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """The UNet2DModel configuration equivalent to a model's network.

    Args:
        config: The model's configuration.
        folder: The folder named in an error.

    Raises:
        DdimError: If a UNet2DModel cannot represent the network.
    """
    c = config.network
    problem = None
    if not isinstance(c, UNetConfig) or c.categories:
        problem = "is for discrete data"
    else:
        for applies, reason in (
            (c.patch > 1, f"takes patches of {c.patch}x{c.patch} pixels"),
            (c.classes > 0, "has labels"),
            (c.scale_shift, "scales and shifts its norms by time"),
            (c.resample == "block", "changes resolution in residual blocks"),
            (c.time_scale != 1, "rescales time"),
            (c.learned_variance, "has learned variance"),
            (
                c.heads > 1 and len({c.channels * m for m in c.multipliers}) > 1,
                "fixes the number of heads, not their size",
            ),
        ):
            problem = problem or (reason if applies else None)
    if problem or not isinstance(c, UNetConfig):
        raise DdimError(folder, f"the model {problem}, which UNet2DModel does not support", "use it as a ddim model")
    sides = [c.height >> level for level in range(len(c.multipliers))]
    down = ["AttnDownBlock2D" if side in c.attention else "DownBlock2D" for side in sides]
    head = c.head_channels or (c.channels * c.multipliers[0] // c.heads if c.heads > 1 else None)
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": c.height if c.height == c.width else [c.height, c.width],
        "in_channels": c.in_channels,
        "out_channels": c.in_channels,
        "freq_shift": c.embedding_shift,
        "flip_sin_to_cos": c.embedding == "cos-sin",
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": [c.channels * m for m in c.multipliers],
        "layers_per_block": c.blocks,
        "downsample_padding": 1 if c.padding == "both" else 0,
        "dropout": c.dropout,
        "attention_head_dim": head,
        "norm_num_groups": c.groups,
        "norm_eps": c.norm_eps,
        "add_attention": c.middle_attention,
    }


def scheduler_config(config: ModelConfig) -> dict[str, Any]:
    """The DDIMScheduler configuration equivalent to a model's schedule.

    Settings of a model imported from diffusers (clipping, spacing, offset) are restored.
    """
    s = config.schedule
    name = {ddim_name: name for name, ddim_name in BETAS.items()}.get(s.name)
    plain = s.model_copy(update={"zero_terminal_snr": False})  # diffusers rescales the betas itself
    betas = None if name else [float(beta) for beta in plain.build().betas]
    imported = config.origin.settings if config.origin and config.origin.format == "diffusers" else {}
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": s.T,
        "beta_schedule": name or "linear",
        "beta_start": s.beta_start if s.beta_start is not None else (0.00085 if name == "scaled_linear" else 1e-4),
        "beta_end": s.beta_end if s.beta_end is not None else (0.012 if name == "scaled_linear" else 0.02),
        "trained_betas": betas,
        "prediction_type": PREDICTION_TYPES[config.predicts],
        "rescale_betas_zero_snr": s.zero_terminal_snr,
        "clip_sample": imported.get("clip_sample", imported.get("scheduler") in CLIPS),
        **{key: imported[key] for key in _CLIPPING if key in imported},
        "set_alpha_to_one": imported.get("set_alpha_to_one", True),
        "steps_offset": imported.get("steps_offset", 0),
        "timestep_spacing": imported.get("timestep_spacing", "trailing" if s.zero_terminal_snr else "leading"),
    }
