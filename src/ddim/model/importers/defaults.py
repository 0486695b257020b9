"""Metadata missing from a checkpoint: taken from hints, filled with the library's default (noted), or an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError
from ddim.model.config import ModelConfig, Origin, ScheduleConfig, build
from ddim.model.importers.types import CheckpointHints
from ddim.nn.lucidrains import LucidrainsConfig
from ddim.nn.unet import UNetConfig

PREDICTS = ("eps", "x0", "v")
_OPTIONS = {"head_channels": "head-channels", "attention": "qkv"}


def size(hints: CheckpointHints, path: Path) -> tuple[int, int]:
    """Height and width of the images.

    Raises:
        DdimError: If the hints lack it.
    """
    if hints.size is None:
        hint = "use `ddim convert FILE --size 32`, or 32x48 for height x width"
        raise DdimError(path, "does not record the size of its images", hint)
    return hints.size


def image_channels(channels: int, path: Path) -> Literal[1, 3]:
    """The number of channels, which must be that of images.

    Raises:
        DdimError: If they are not 1 or 3.
    """
    if channels not in (1, 3):
        problem = f"takes {channels} channels, so not just grey or colour images, but latents or an image to upscale"
        raise DdimError(path, problem, "use it in its own library, with ddim.PlanScheduler or ddim.wrap for plans")
    return 1 if channels == 1 else 3


def schedule(
    hints: CheckpointHints, path: Path, bounds: tuple[float, float] = (1e-4, 0.02), name: str | None = None
) -> tuple[ScheduleConfig, str]:
    """The noise schedule and a note on its source; by default linear betas with T = 1000.

    Args:
        hints: The hints from the user.
        path: The file, for messages.
        bounds: First and last beta, of linear betas and of those of `name`.
        name: This library's name of the hint's schedule, if it differs.

    Raises:
        DdimError: If there is no such schedule.
    """
    kind = name or hints.schedule or "linear"
    values: dict[str, Any] = {"name": kind, "T": 1000 if hints.T is None else hints.T}
    if kind in ("linear", name):
        values |= {"beta_start": bounds[0], "beta_end": bounds[1]}
    config = build(ScheduleConfig, values, path)
    missing = [option for option, value in (("--schedule", hints.schedule), ("--times", hints.T)) if value is None]
    ends = f", {config.beta_start:g} to {config.beta_end:g}" if config.beta_start is not None else ""
    note = f"schedule: {config.name} betas{ends}, T = {config.T}"
    return config, note + _assumed(missing)


def predicts(hints: CheckpointHints, path: Path) -> tuple[str, str]:
    """The prediction type and a note on its source; eps by default.

    Raises:
        DdimError: If the hint is not eps, x0 or v.
    """
    prediction = hints.predicts or "eps"
    if prediction not in PREDICTS:
        raise DdimError(path, f"cannot predict {prediction!r}", f"choose one of {', '.join(PREDICTS)}")
    return prediction, f"predicts: {prediction}" + _assumed([] if hints.predicts else ["--predicts"])


def config(
    path: Path, network: UNetConfig | LucidrainsConfig, schedule: ScheduleConfig, predicts: str, library: str
) -> ModelConfig:
    """The configuration of the converted model.

    Raises:
        DdimError: If its parts are inconsistent.
    """
    policy = ImagePolicy(height=network.height, width=network.width, channels=image_channels(network.in_channels, path))
    values = {"schedule": schedule, "predicts": predicts, "network": network, "data": policy}
    return build(ModelConfig, {**values, "origin": Origin.model_validate({"format": library})}, path)


def shape(tensors: Mapping[str, Tensor], name: str, path: Path, ndim: int) -> tuple[int, ...]:
    """A tensor's shape.

    Raises:
        DdimError: If there is no such tensor, or its number of dimensions is not `ndim`.
    """
    if name not in tensors:
        raise DdimError(path, f"contains no {name}", "use a checkpoint of such a network")
    sizes = tuple(tensors[name].shape)
    if len(sizes) != ndim:
        raise DdimError(path, f"contains {name} of shape {list(sizes)}, not {ndim} dimensions", "copy the file again")
    return sizes


def multiples(widths: list[int], channels: int, path: Path) -> tuple[int, ...]:
    """Widths as multiples of the first level's channels.

    Raises:
        DdimError: If one is not an integer multiple.
    """
    if any(width % channels for width in widths):
        raise DdimError(
            path, f"has channels {widths}, not all multiples of {channels}", "wrap the network with ddim.wrap"
        )
    return tuple(width // channels for width in widths)


def reject_hints(hints: CheckpointHints, reason: str, *options: str) -> None:
    """Reject hints that do not apply to a library's networks.

    Args:
        hints: The hints from the user.
        reason: The reason.
        options: Names of fields of `CheckpointHints`.

    Raises:
        DdimError: Naming the first of these hints that is set.
    """
    for option in options:
        if getattr(hints, option) is not None:
            raise DdimError(f"--{_OPTIONS.get(option, option)}", f"does not apply: {reason}", "remove it")


def _assumed(options: list[str]) -> str:
    return f" (assumed, not in the file: `ddim convert {' '.join(options)}`)" if options else ""
