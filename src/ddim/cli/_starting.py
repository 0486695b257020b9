"""Inputs of `ddim train`: the time budget, the labels or vocabulary of the data, the initial weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim.errors import DdimError, warn

if TYPE_CHECKING:
    from torch import Tensor

    from ddim.data import ImageSet
    from ddim.data.text import TextSet
    from ddim.model.config import ModelConfig
    from ddim.train.run_config import Origin

UNITS = {"h": 3600, "min": 60, "m": 60, "s": 1}


def seconds(text: str) -> float:
    """A duration such as 25min, 90s or 1h30min, in seconds.

    Raises:
        DdimError: If it is not a duration.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|min|m|s)", text)
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not total:
        raise DdimError(f"--budget {text}", "is not a duration", "write 25min, 90s or 1h30min")
    return total


def classes_of(data: str, images: ImageSet | TextSet) -> int:
    """The number of labels of a data set.

    Raises:
        DdimError: If it has no labels.
    """
    from ddim.data import ImageSet
    from ddim.data.labels import missing_labels

    if images.labels is None:
        columns = images.label_columns if isinstance(images, ImageSet) else ()
        raise DdimError(data, *missing_labels(columns, "use --no-labels, or sort the images into one folder per label"))
    return len(images.classes) if images.classes else int(images.labels.max()) + 1


def vocabulary(data: str, tokenizer: Path | None) -> dict[str, Any]:
    """The vocabulary of a text: a tokenizer's tokens, or all characters of the text."""
    from ddim.data.text import characters, read_tokenizer

    return {"tokenizer": read_tokenizer(tokenizer)} if tokenizer else {"characters": characters(data)}


def initial_weights(name: str, config: ModelConfig) -> tuple[Origin, dict[str, Tensor]]:
    """Read the initial weights of a training from a model, and the record of their origin.

    Args:
        name: As for `ddim.load`, or a safetensors file that holds only the weights of such a network.
        config: The model to train.

    Returns:
        The record, and the weights as a state dict.

    Raises:
        DdimError: If there is no such model, or its network, schedule or prediction differs from `config`.
    """
    from ddim._io.atomic import sha256
    from ddim._io.safetensors import read_tensors
    from ddim.model import checkpoint, hub
    from ddim.model.importers import wrappers
    from ddim.train.run_config import Origin, first_difference

    path = Path(name)
    if path.is_file() and (path.parent / checkpoint.CONFIG).is_file():
        path = path.parent
    if path.is_file() and path.suffix == ".safetensors":
        fresh, weights = config.network.build(), read_tensors(path)[0]
        if networks := wrappers.networks(weights, {"ddim": tuple(fresh.state_dict())}, path):
            weights, which, notes = wrappers.choose(networks, True, path)
            if networks[0].where:
                warn(f"--from {name}: {'; '.join((which, *notes))}")
        checkpoint.check_finite(weights, path)
        checkpoint.fill(fresh, weights, path)
        return Origin(sha256=sha256(path)), weights
    model, network, _ = hub.read(hub.place(path if path.exists() else name), name)
    for part in ("network", "schedule", "predicts", "categorical"):
        initial, requested = model.model_dump()[part], config.model_dump()[part]
        if initial != requested:
            key, initial_value, requested_value = first_difference({part: initial}, {part: requested})
            problem = f"has {key} {initial_value!r}, the preset {requested_value!r}"
            raise DdimError(f"--from {name}", problem, "start from a model of this preset, or set it with --set")
    provenance = model.provenance
    weights = dict(network.state_dict())
    origin = Origin(
        sha256=model.sha256 or checkpoint.digest(weights), steps=provenance.steps, images_seen=provenance.images_seen
    )
    return origin, weights
