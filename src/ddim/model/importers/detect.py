"""Files of weights of other codes: what is in them, whose they are, and which of them are taken."""

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
    """A file of weights as a model of ours. Nothing in it is ever executed.

    Args:
        path: A state dict, or what the code's training writes: a list or dict with state dicts in it.
        hints: What a file of weights does not say of itself.
        kind: "official", "openai" or "lucidrains"; found by its names if None.

    Raises:
        DdimError: If it cannot be read, is of no known code, or is a network that ours cannot be.
    """
    if kind not in (None, *READERS):
        raise DdimError(f"--from {kind}", "is no code whose files of weights are known", f"known are {_list(READERS)}")
    tensors, told = _chosen(path, read_state(path), hints.ema)
    found = kind or _kind(path, tensors)
    made = READERS[found](path, tensors, hints)
    return replace(made, notes=(f"code: {found}, {'as told' if kind else 'by its names'}", *made.notes, *told))


def _kind(path: Path, tensors: Tensors) -> str:
    """Whose state dict it is, by its names."""
    names = {key.removeprefix("model.") for key in tensors} if "model.init_conv.weight" in tensors else tensors.keys()
    for kind, signs in _SIGNS.items():
        if all(sign in names for sign in signs):
            return kind
    looked = "; ".join(f"{' and '.join(signs)} ({kind})" for kind, signs in _SIGNS.items())
    wrong = f"is of no known code: looked for {looked}; its first names are {_list([*tensors][:3])}"
    raise DdimError(path, wrong, "wrap the network itself with ddim.wrap")


def _chosen(path: Path, state: Any, ema: bool) -> tuple[Tensors, tuple[str, ...]]:
    """The averaged weights of a file, or those as trained, and notes on which they are."""
    found = wrappers.networks(state, _SIGNS, path)
    if not found:  # of no code that is known by its names
        flat = tensors_of(state) or next((f for f in map(tensors_of, _values(state)) if f is not None), None)
        if flat is None:
            keys = f", its keys are {_list(str(key) for key in [*state][:5])}" if isinstance(state, Mapping) else ""
            raise DdimError(path, f"holds no state dict{keys}", "save the network's state dict alone")
        found = [wrappers.Found("", flat, False)]
    if ema and not any(one.averaged for one in found) and (where := wrappers.unmatched(state)):
        wrong = f"holds averaged weights without names ({where}) that do not fit the network's in number and shape"
        raise DdimError(path, wrong, "take those as trained: `ddim convert FILE --no-ema`")
    taken, which, notes = wrappers.choose(found, ema, path)
    kinds = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in taken.values() if tensor.is_floating_point()}
    )
    stored = "" if kinds == ["float32"] else f", stored as {_list(kinds)}, kept in float32"
    return taken, (*notes, f"{which}{stored}")


def _values(state: Any) -> Iterable[Any]:
    return state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()


def _list(words: Any) -> str:
    return ", ".join(words)
