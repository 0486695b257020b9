"""Read files of weights of other libraries: detect the library and select the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.errors import DdimError
from ddim.model.importers import authors, lucidrains, openai, wrappers
from ddim.model.importers.types import CheckpointHints, ImportedModel, read_state, tensors_of

Tensors = dict[str, Tensor]
READERS: dict[str, Callable[[Path, Tensors, CheckpointHints], ImportedModel]] = {
    "official": authors.read,
    "openai": openai.read,
    "lucidrains": lucidrains.read,
}
_SIGNATURES = {"official": authors.SIGNATURE, "openai": openai.SIGNATURE, "lucidrains": lucidrains.SIGNATURE}


def read(path: Path, hints: CheckpointHints, library: str | None = None) -> ImportedModel:
    """Convert a file of weights. No code in it is ever executed.

    Args:
        path: A state dict, or a training checkpoint: a list or dict that contains state dicts.
        hints: Metadata that a file of weights lacks.
        library: "official", "openai" or "lucidrains"; detected from tensor names if None.

    Raises:
        DdimError: If it cannot be read, is from an unknown library, or is a network that this library does not support.
    """
    if library not in (None, *READERS):
        raise DdimError(
            f"--from {library}", "is not a library whose weights can be read", f"choose one of {_list(READERS)}"
        )
    tensors, notes_on_weights = _select_weights(path, read_state(path), hints.ema)
    name = library or _detect(path, tensors)
    model = READERS[name](path, tensors, hints)
    return replace(
        model,
        notes=(
            f"library: {name}, {'as requested' if library else 'by its tensor names'}",
            *model.notes,
            *notes_on_weights,
        ),
    )


def _detect(path: Path, tensors: Tensors) -> str:
    """The library that a state dict is from, by its tensor names."""
    names = {key.removeprefix("model.") for key in tensors} if "model.init_conv.weight" in tensors else tensors.keys()
    for library, signature in _SIGNATURES.items():
        if all(name in names for name in signature):
            return library
    expected = "; ".join(f"{' and '.join(signature)} ({library})" for library, signature in _SIGNATURES.items())
    problem = f"is not from a supported library: expected {expected}; its first names are {_list([*tensors][:3])}"
    raise DdimError(path, problem, "wrap the network with ddim.wrap")


def _select_weights(path: Path, state: Any, ema: bool) -> tuple[Tensors, tuple[str, ...]]:
    """The averaged weights of a file, or the raw ones, and notes on which were taken."""
    networks = wrappers.networks(state, _SIGNATURES, path)
    if not networks:  # no known tensor names: take any state dict
        flat = tensors_of(state) or next(
            (inner for inner in map(tensors_of, _values(state)) if inner is not None), None
        )
        if flat is None:
            keys = f", its keys are {_list(str(key) for key in [*state][:5])}" if isinstance(state, Mapping) else ""
            raise DdimError(path, f"contains no state dict{keys}", "save only the network's state dict")
        networks = [wrappers.NetworkWeights("", flat, False)]
    if ema and not any(network.averaged for network in networks) and (where := wrappers.unmatched(state)):
        problem = f"contains averaged weights without names ({where}) whose number or shapes do not match the network"
        raise DdimError(path, problem, "use the raw weights: `ddim convert FILE --no-ema`")
    tensors, which, notes = wrappers.choose(networks, ema, path)
    dtypes = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    )
    stored = "" if dtypes == ["float32"] else f", stored as {_list(dtypes)}, converted to float32"
    return tensors, (*notes, f"{which}{stored}")


def _values(state: Any) -> Iterable[Any]:
    return state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()


def _list(words: Any) -> str:
    return ", ".join(words)
