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
_SIGNS = {"official": authors.SIGNS, "openai": openai.SIGNS, "lucidrains": lucidrains.SIGNS}


def read(path: Path, hints: CheckpointHints, kind: str | None = None) -> ImportedModel:
    """Convert a file of weights. No code in it is ever executed.

    Args:
        path: A state dict, or a training checkpoint: a list or dict that contains state dicts.
        hints: Metadata that a file of weights lacks.
        kind: "official", "openai" or "lucidrains"; detected from tensor names if None.

    Raises:
        DdimError: If it cannot be read, is from an unknown library, or is a network that this library does not support.
    """
    if kind not in (None, *READERS):
        raise DdimError(f"--from {kind}", "is no code whose files of weights are known", f"known are {_list(READERS)}")
    tensors, notes_on_weights = _chosen(path, read_state(path), hints.ema)
    library = kind or _kind(path, tensors)
    model = READERS[library](path, tensors, hints)
    return replace(
        model, notes=(f"code: {library}, {'as told' if kind else 'by its names'}", *model.notes, *notes_on_weights)
    )


def _kind(path: Path, tensors: Tensors) -> str:
    """The library that a state dict is from, by its tensor names."""
    names = {key.removeprefix("model.") for key in tensors} if "model.init_conv.weight" in tensors else tensors.keys()
    for kind, signs in _SIGNS.items():
        if all(sign in names for sign in signs):
            return kind
    looked = "; ".join(f"{' and '.join(signs)} ({kind})" for kind, signs in _SIGNS.items())
    problem = f"is of no known code: looked for {looked}; its first names are {_list([*tensors][:3])}"
    raise DdimError(path, problem, "wrap the network itself with ddim.wrap")


def _chosen(path: Path, state: Any, ema: bool) -> tuple[Tensors, tuple[str, ...]]:
    """The averaged weights of a file, or the raw ones, and notes on which were taken."""
    networks = wrappers.networks(state, _SIGNS, path)
    if not networks:  # no known tensor names: take any state dict
        flat = tensors_of(state) or next(
            (inner for inner in map(tensors_of, _values(state)) if inner is not None), None
        )
        if flat is None:
            keys = f", its keys are {_list(str(key) for key in [*state][:5])}" if isinstance(state, Mapping) else ""
            raise DdimError(path, f"holds no state dict{keys}", "save the network's state dict alone")
        networks = [wrappers.Found("", flat, False)]
    if ema and not any(network.averaged for network in networks) and (where := wrappers.unmatched(state)):
        problem = f"holds averaged weights without names ({where}) that do not fit the network's in number and shape"
        raise DdimError(path, problem, "take those as trained: `ddim convert FILE --no-ema`")
    tensors, which, notes = wrappers.choose(networks, ema, path)
    kinds = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    )
    stored = "" if kinds == ["float32"] else f", stored as {_list(kinds)}, kept in float32"
    return tensors, (*notes, f"{which}{stored}")


def _values(state: Any) -> Iterable[Any]:
    return state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()


def _list(words: Any) -> str:
    return ", ".join(words)
