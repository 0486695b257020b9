"""Import folders of diffusers' unconditional pipelines: a UNet2DModel and a scheduler's configuration.

A folder is JSON and tensors, so diffusers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim._io.reading import entry, list_of
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError, shorten
from ddim.model.config import ModelConfig, Origin, ScheduleConfig, build
from ddim.model.importers import wrappers
from ddim.model.importers.state_dict import Names, Place, to_native
from ddim.model.importers.types import ImportedModel, read_json, read_state, tensors_of
from ddim.nn.unet import UNetConfig

SIGNATURE = ("conv_in.weight", "time_embedding.linear_1.weight")
"""Tensor names that identify the state dict of such a U-Net."""
SCHEDULER = "scheduler/scheduler_config.json"
PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
PREDICTION_TYPES = {native: external for external, native in PREDICTS.items()}
BETAS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}

# Defaults of diffusers for keys that older files lack.
_UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "thresholding": False,
}
_RECORDED = (
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "set_alpha_to_one",
    "steps_offset",
    "timestep_spacing",
    "variance_type",
)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "freq_shift"), (int,)),
    **dict.fromkeys(("dropout", "norm_eps"), (float,)),
    **dict.fromkeys(("add_attention", "flip_sin_to_cos"), (bool,)),
    "attention_head_dim": (int, type(None)),
}
_SCALAR = (str, bool, int, float, type(None))


def _prefix(place: Place) -> str:
    if place.half == "middle":
        return f"mid_block.{'resnets' if place.kind == 'block' else 'attentions'}.{place.inner}"
    part = {"block": "resnets", "attention": "attentions", "resample": f"{place.half}samplers"}[place.kind]
    return f"{place.half}_blocks.{place.level}.{part}.{0 if place.kind == 'resample' else place.inner}"


NAMES = Names(
    prefix=_prefix,
    single={
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
    block={name: name for name in ("norm1", "conv1", "norm2", "conv2")}
    | {"skip": "conv_shortcut", "time": "time_emb_proj"},
    attention={"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
)
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def unet_folder(folder: Path) -> Path | None:
    """The folder of a pipeline's U-Net: `unet`, or the pipeline folder itself in old ones; None if there is none."""
    for place in (folder / "unet", folder):
        if (place / "config.json").is_file() and "_class_name" in read_json(place / "config.json"):
            return place
    return None


def read(folder: Path) -> ImportedModel:
    """Convert a diffusers pipeline folder.

    Raises:
        DdimError: If it is damaged, or its network has features that `ddim.nn.unet` does not support.
    """
    place = unet_folder(folder)
    if place is None:
        raise DdimError(folder, "contains no unet/config.json of diffusers", "use the folder of a whole pipeline")
    network, of_network = _network(read_json(place / "config.json"), place / "config.json")
    options = [folder / SCHEDULER, folder / "scheduler_config.json"]
    file = next((path for path in options if path.is_file()), None)
    if file is None:
        raise DdimError(folder, f"contains no {SCHEDULER}, which defines the schedule", "copy the whole pipeline")
    scheduler = read_json(file)
    schedule, predicts, of_schedule = read_scheduler(scheduler, file)
    settings = {key: entry(scheduler, key, _SCALAR, file) for key in ("_class_name", *_RECORDED) if key in scheduler}
    name = str(settings.pop("_class_name", ""))
    values = {
        "schedule": schedule,
        "predicts": predicts,
        "network": network,
        "data": ImagePolicy(height=network.height, width=network.width, channels=_image_channels(network, place)),
        "origin": Origin(format="diffusers", settings={"scheduler": name, **settings}),
    }
    weights, of_weights = _weights(place)
    notes = [*of_network, *of_weights, *of_schedule]
    notes += [_sampler_note(settings)]
    config = build(ModelConfig, values, folder)
    return ImportedModel(config, to_native(weights, network, NAMES, str(place)), tuple(notes))


def _image_channels(network: UNetConfig, place: Path) -> int:
    if network.in_channels not in (1, 3):
        problem = f"takes {network.in_channels} channels: latents, not images"
        raise DdimError(place, problem, "use it in its own pipeline with ddim.PlanScheduler")
    return network.in_channels


def _network(settings: Mapping[str, Any], file: Path) -> tuple[UNetConfig, list[str]]:
    """The U-Net configuration equivalent to a UNet2DModel's, and notes on it."""
    if settings.get("_class_name") != "UNet2DModel":
        problem = f"describes a {shorten(str(settings.get('_class_name')))}, not a UNet2DModel"
        raise DdimError(file, problem, "use it in its own pipeline with ddim.PlanScheduler")
    c = {**_UNET, **settings}
    for key, expected in _TYPES.items():
        entry(c, key, expected, file)
    widths = _integers(c.get("block_out_channels") or (224, 448, 672, 896), "block_out_channels", file)
    _refuse(c, widths, file)
    size = c["sample_size"]
    height, width = _integers([size, size] if isinstance(size, int) else size, "sample_size", file, 2)
    down, up = (
        [_has_attention(name, file, half) for name in list_of(c.get(f"{half.lower()}_block_types"), str, key, file)]
        for half, key in (("Down", "down_block_types"), ("Up", "up_block_types"))
    )
    if down != up[::-1] or len(down) != len(widths):
        raise DdimError(
            file, "has attention at other levels in the decoder than in the encoder", "wrap it with ddim.wrap"
        )
    values = {
        "in_channels": c["in_channels"],
        "height": height,
        "width": width,
        "channels": widths[0],
        "multipliers": [w // widths[0] for w in widths],
        "blocks": c["layers_per_block"],
        "attention": [height >> level for level, attends in enumerate(down) if attends],
        "middle_attention": c["add_attention"],
        "head_channels": c["attention_head_dim"] or 0,
        "groups": c["norm_num_groups"],
        "dropout": c["dropout"],
        "norm_eps": c["norm_eps"],
        "padding": "both" if c["downsample_padding"] else "far",
        "embedding": "cos-sin" if c["flip_sin_to_cos"] else "sin-cos",
        "embedding_shift": c["freq_shift"],
        "learned_variance": c["out_channels"] == 2 * c["in_channels"],
    }
    network = build(UNetConfig, values, file)
    heads = f"heads of {network.head_channels} channels" if network.head_channels else "one head"
    facts = (
        f"{network}, {heads}, padded {network.padding}, norm eps {network.norm_eps:g}, {network.embedding} embedding"
    )
    return network, [f"network: {facts} (shift {network.embedding_shift}), time from 0"]


def _refuse(c: Mapping[str, Any], widths: list[int], file: Path) -> None:
    """Reject features that `ddim.nn.unet` does not support."""
    groups = c["norm_num_groups"]
    fixed: dict[str, tuple[Any, ...]] = {
        "center_input_sample": (False,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None, 4 * widths[0]),
        "mid_block_type": ("UNetMidBlock2D",),
        "mid_block_scale_factor": (1,),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "act_fn": ("silu", "swish"),
        "attn_norm_num_groups": (None, groups),
        "resnet_time_scale_shift": ("default",),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "downsample_padding": (0, 1),
        "out_channels": (c["in_channels"], 2 * c["in_channels"]),
    }
    for key, supported in fixed.items():
        if c[key] not in supported:
            problem = f"has {key} = {shorten(repr(c[key]))}, which is not supported"
            raise DdimError(file, problem, "wrap the network with ddim.wrap")
    if c.get("sample_size") is None:
        raise DdimError(file, "has no sample_size", "add it, in pixels")
    if any(w % widths[0] for w in widths):  # no width is 0 here
        raise DdimError(file, f"has channels {widths}, not all multiples of the first", "wrap it with ddim.wrap")


def _integers(values: Any, key: str, file: Path, count: int | None = None) -> list[int]:
    """Validate a list of integers of at least 1."""
    numbers = list_of(values, int, key, file)
    if not numbers or min(numbers) < 1 or count not in (None, len(numbers)):
        problem = f"{key} is not a list of {'' if count is None else f'{count} '}integers >= 1"
        raise DdimError(file, problem, "copy it again")
    return numbers


def _has_attention(name: str, file: Path, half: str) -> bool:
    attends = {f"{half}Block2D": False, f"Attn{half}Block2D": True}
    if name not in attends:
        raise DdimError(file, f"has a {name}, which is not supported", "wrap the network with ddim.wrap")
    return attends[name]


def read_scheduler(settings: Mapping[str, Any], file: Path) -> tuple[ScheduleConfig, str, list[str]]:
    """The noise schedule and prediction type of a scheduler's configuration, and notes on them."""
    c = {**_SCHEDULER, **settings}
    for key in ("prediction_type", "beta_schedule"):
        entry(c, key, str, file)
    for key in ("rescale_betas_zero_snr", "thresholding"):
        entry(c, key, bool, file)
    if c["prediction_type"] not in PREDICTS:
        raise DdimError(file, f"has prediction_type {c['prediction_type']!r}", f"supported are {', '.join(PREDICTS)}")
    values: dict[str, Any] = {"T": c["num_train_timesteps"], "zero_terminal_snr": bool(c["rescale_betas_zero_snr"])}
    if c["trained_betas"] is not None:
        values |= {"name": "betas", "betas": c["trained_betas"]}
    elif c["beta_schedule"] in BETAS:
        values["name"] = BETAS[c["beta_schedule"]]
        if values["name"] != "cosine":
            values |= {"beta_start": c["beta_start"], "beta_end": c["beta_end"]}
    else:
        raise DdimError(file, f"has beta_schedule {c['beta_schedule']!r}", f"supported are {', '.join(BETAS)}")
    schedule = build(ScheduleConfig, values, file)
    ends = f", {schedule.beta_start:g} to {schedule.beta_end:g}" if schedule.beta_start is not None else ""
    snr = ", rescaled to zero terminal SNR" if schedule.zero_terminal_snr else ""
    predicts = PREDICTS[c["prediction_type"]]
    notes = [f"schedule: {schedule.name} betas{ends}, T = {schedule.T}{snr}", f"predicts: {predicts}"]
    if c["thresholding"]:
        notes.append("thresholding: not supported by plans; sampling requires --clip or --no-clip")
    return schedule, predicts, notes


def _sampler_note(settings: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key} {value}" for key, value in settings.items()) or "no settings"
    rest = "the rest is recorded for `ddim sample --like diffusers` and for export"
    return f"sampler: {listed}; clipping applies to sampling, {rest}"


def emulation(config: ModelConfig) -> dict[str, Any]:
    """The settings of `ddim.emulate` that reproduce the original scheduler of a converted model.

    Returns:
        The settings; empty for a model that was not converted from diffusers.

    Raises:
        DdimError: If the scheduler has a setting that the emulation does not support.
    """
    if config.origin is None or config.origin.format != "diffusers":
        return {}
    settings = config.origin.settings
    if settings.get("clip_sample", True) and settings.get("clip_sample_range", 1.0) != 1:
        problem = f"its scheduler clips to {settings['clip_sample_range']:g}, which is not supported"
        raise DdimError("--like diffusers", problem, "use --no-clip, or sample without --like")
    same = ("steps_offset", "clip_sample", "set_alpha_to_one", "variance_type")
    names = {"timestep_spacing": "spacing"} | {key: key for key in same}
    return {native: settings[external] for external, native in names.items() if external in settings}


def _weights(place: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The U-Net's tensors under the current names of diffusers, and notes on them."""
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    file = next((place / name for name in names if (place / name).is_file()), None)
    if file is None:
        raise DdimError(place, f"contains neither {names[0]} nor {names[1]}", "copy the whole folder")
    state = read_state(file)
    networks, notes = wrappers.networks(state, {"diffusers": SIGNATURE}, file), tuple[str, ...]()
    tensors = tensors_of(state)
    if networks:
        tensors, which, notes = wrappers.choose(networks, True, file)
        notes = (which, *notes) if networks[0].where else notes
    if tensors is None:
        raise DdimError(file, "is not a state dict", "copy the whole folder again")
    if any(f"{old}" in key for key in tensors for old in _OLD_NAMES):
        for old, new in _OLD_NAMES.items():
            tensors = {key.replace(old, new) if ".attentions." in key else key: t for key, t in tensors.items()}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return tensors, (f"weights: {dtype}, converted to float32" if dtype != "float32" else "weights: float32", *notes)
