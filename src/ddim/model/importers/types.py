"""A model of another code, as ours: its configuration, its weights, and every choice that was made."""

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
    """What another code's model is here.

    Args:
        config: The model's configuration.
        weights: Its weights under our names, float32.
        notes: Every choice that was mapped, in words.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointHints:
    """What a state dict does not say of itself; None where it is not known.

    Args:
        size: Height and width of its pictures.
        schedule: Noise schedule by name.
        T: Its number of times.
        predicts: "eps", "x0" or "v".
        heads: Attention heads.
        head_channels: Channels of an attention head, instead of heads.
        attention: "new" or "legacy": the order of q, k and v in OpenAI's codes.
        ema: Whether averaged weights are taken where there are both.
        rescale: Whether the network was told (t - 1) 1000 / T, as improved-diffusion's is unless told otherwise.
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
    """A JSON object from a file.

    Raises:
        DdimError: If it is not there or is none.
    """
    value: dict[str, Any] = reading.read_json(path, dict, "copy the whole folder", "copy it again")
    return value


def read_state(path: Path) -> Any:
    """What a weights file holds: safetensors, or a file of torch.save read without ever running code.

    Returns:
        A dict from names to tensors; of a file of torch.save whatever tensors, numbers, strings, lists and dicts it
        holds.

    Raises:
        DdimError: If it cannot be read, or would need code to run.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    reading.check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, which weights_only reads all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DdimError(path, "no such file", "check the path") from None
    except Exception as error:  # of a damaged file torch may raise anything
        wrong, mend = _unreadable(error)
        raise DdimError(path, wrong, mend) from None


def _unreadable(error: Exception) -> tuple[str, str]:
    """What is wrong with a file that torch would not load, and how to mend it."""
    said, save = str(error), "save its state dict alone with the code that made it"
    if "TorchScript" in said or ".tar format" in said:
        return "is of a form that cannot be read without running code, which is never done", save
    if any(word in said for word in ("Unsupported", "WeightsUnpickler", "GLOBAL")):
        named = shorten(said.split("GLOBAL ", 1)[1].split()[0]) if "GLOBAL " in said else "objects that are not tensors"
        return f"would have to run code to be read ({named}), which is never done", save
    first = (said.splitlines() or [type(error).__name__])[0]
    return f"cannot be read ({first[:80]})", "copy it again"


def tensors_of(state: Any) -> dict[str, Tensor] | None:
    """The state, if it is a state dict: names to tensors, "module." of DataParallel taken off; else None."""
    if not isinstance(state, Mapping) or not state:
        return None
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        return None
    return {key.removeprefix("module."): value for key, value in state.items()}
