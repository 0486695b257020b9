"""Files of weights of other codes: what is in them, whose they are, and which of them are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.errors import DdimError
from ddim.interop import lucidrains, official, openai
from ddim.interop.foreign import Foreign, Hints, read_state, tensors_of

Tensors = dict[str, Tensor]
READERS: dict[str, Callable[[Path, Tensors, Hints], Foreign]] = {
    "official": official.read,
    "openai": openai.read,
    "lucidrains": lucidrains.read,
}
_SIGNS = {"official": official.SIGNS, "openai": openai.SIGNS, "lucidrains": lucidrains.SIGNS}
_AVERAGED, _TRAINED = "ema_model.", "online_model."  # in a state dict of the package ema-pytorch


def read(path: Path, hints: Hints, kind: str | None = None) -> Foreign:
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
    tensors, note = _chosen(path, read_state(path), hints.ema)
    found = kind or _kind(path, tensors)
    made = READERS[found](path, tensors, hints)
    return replace(made, notes=(f"code: {found}, {'as told' if kind else 'by its names'}", *made.notes, note))


def _kind(path: Path, tensors: Tensors) -> str:
    """Whose state dict it is, by its names."""
    names = {key.removeprefix("model.") for key in tensors} if "model.init_conv.weight" in tensors else tensors.keys()
    for kind, signs in _SIGNS.items():
        if all(sign in names for sign in signs):
            return kind
    looked = "; ".join(f"{' and '.join(signs)} ({kind})" for kind, signs in _SIGNS.items())
    wrong = f"is of no known code: looked for {looked}; its first names are {_list([*tensors][:3])}"
    raise DdimError(path, wrong, "wrap the network itself with ddim.wrap")


def _chosen(path: Path, state: Any, ema: bool) -> tuple[Tensors, str]:
    """The averaged weights of a file, or those as trained, and a note on which they are."""
    trained, averaged = _found(state)
    if trained is None and averaged is None:
        keys = f", its keys are {_list(str(key) for key in [*state][:5])}" if isinstance(state, Mapping) else ""
        raise DdimError(path, f"holds no state dict{keys}", "save the network's state dict alone")
    if averaged is not None and (ema or trained is None):
        if not ema:
            raise DdimError(path, "holds averaged weights alone", "leave --no-ema out")
        taken, which = averaged, "averaged (EMA)"
    else:
        assert trained is not None
        left = "" if averaged is None else "; the averaged ones (EMA) are left aside, as told"
        taken, which = trained, "as trained" + left if left else "the only ones in the file, averaged or not"
    kinds = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in taken.values() if tensor.is_floating_point()}
    )
    stored = "" if kinds == ["float32"] else f", stored as {_list(kinds)}, kept in float32"
    return taken, f"weights: {which}{stored}"


def _found(state: Any) -> tuple[Tensors | None, Tensors | None]:
    """The state dicts of a file: as trained, and averaged."""
    flat = tensors_of(state)
    if flat is not None:
        averaged = _within(flat, _AVERAGED)
        return (_within(flat, _TRAINED), averaged) if averaged else (flat, None)
    if isinstance(state, list | tuple):  # of the DDIM authors: model, optimizer, epoch, step, and maybe the average
        return (tensors_of(state[0]) if state else None), (tensors_of(state[-1]) if len(state) > 1 else None)
    if not isinstance(state, Mapping):
        return None, None
    inner = tensors_of(state.get("ema"))
    trained = next((found for key in ("model", "state_dict") if (found := tensors_of(state.get(key)))), None)
    return trained, None if inner is None else _within(inner, _AVERAGED) or inner


def _within(tensors: Tensors, prefix: str) -> Tensors | None:
    """The tensors whose names begin with a prefix, it being taken off; None if there are none."""
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return {key.removeprefix("module."): tensor for key, tensor in found.items()} or None


def _list(words: Any) -> str:
    return ", ".join(words)
