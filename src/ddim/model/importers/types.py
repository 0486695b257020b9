"""Types of the importers: hints, and a converted model with notes on its conversion."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim._io import reading
from ddim._io.safetensors import read_tensors
from ddim.errors import DdimError, shorten
from ddim.model.config import ModelConfig


@dataclass(frozen=True)
class ImportedModel:
    """A model converted from another library.

    Args:
        config: The model's configuration.
        weights: The weights under this library's names, float32.
        notes: A description of every choice made in the conversion.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointHints:
    """Metadata that a state dict lacks, from the user; None if unspecified.

    Args:
        size: Height and width of the images.
        schedule: The name of the noise schedule.
        T: The number of timesteps of the schedule.
        predicts: "eps", "x0" or "v".
        heads: The number of attention heads.
        head_channels: The channels per attention head, instead of heads.
        attention: "new" or "legacy": the order of q, k and v in OpenAI's libraries.
        ema: Whether to take averaged weights if the file has both averaged and raw ones.
        rescale: Whether the time passed to the network was (t - 1) 1000 / T, the default of improved-diffusion.
    """

    size: tuple[int, int] | None = None
    schedule: str | None = None
    T: int | None = None
    predicts: str | None = None
    heads: int | None = None
    head_channels: int | None = None
    attention: str | None = None
    ema: bool = True
    rescale: bool | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        DdimError: If the file does not exist or is not a JSON object.
    """
    value: dict[str, Any] = reading.read_json(path, dict, "copy the whole folder", "copy it again")
    return value


def read_state(path: Path) -> Any:
    """Read a weights file: safetensors, or a torch.save file, loaded with weights_only so that no code runs.

    Returns:
        A dict from names to tensors; for a torch.save file, its content of tensors, numbers, strings, lists and dicts.

    Raises:
        DdimError: If it cannot be read, or needs code to run.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    reading.check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about old formats, which weights_only can read
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DdimError(path, "no such file", "check the path") from None
    except Exception as error:  # torch may raise any exception for a damaged file
        problem, hint = _unreadable(error)
        raise DdimError(path, problem, hint) from None


def _unreadable(error: Exception) -> tuple[str, str]:
    """The problem and the hint for a file that torch could not load."""
    message, hint = str(error), "save only its state dict, with the code that wrote the file"
    if "TorchScript" in message or ".tar format" in message:
        return "is in a format that cannot be read without running code, which is never done", hint
    if any(word in message for word in ("Unsupported", "WeightsUnpickler", "GLOBAL")):
        name = (
            shorten(message.split("GLOBAL ", 1)[1].split()[0])
            if "GLOBAL " in message
            else "objects that are not tensors"
        )
        return f"would have to run code to be read ({name}), which is never done", hint
    first = (message.splitlines() or [type(error).__name__])[0]
    return f"cannot be read ({first[:80]})", "copy it again"


def tensors_of(state: Any) -> dict[str, Tensor] | None:
    """The state if it is a state dict of names to tensors, without DataParallel's prefix "module."; else None."""
    if not isinstance(state, Mapping) or not state:
        return None
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        return None
    return {key.removeprefix("module."): value for key, value in state.items()}
