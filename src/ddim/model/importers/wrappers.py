"""Find networks in state dicts that were saved together with their wrappers.

| prefix of a name                       | added by                                                          |
|----------------------------------------|-------------------------------------------------------------------|
| `_orig_mod.`                           | torch.compile, of the whole network or a part                     |
| `module.`                              | DataParallel, DistributedDataParallel, `torch.optim.swa_utils`    |
| `_fsdp_wrapped_module.` and similar    | FSDP, activation checkpoints, Lightning's strategies              |
| `model.`, `net.`, `unet.`, any other   | the class that trained it, such as a LightningModule              |
| `ema_model.`, `averaged_model.`, ...   | moving averages                                                   |

A network is identified by a few of its tensor names, its signature; whatever precedes them is the prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.errors import DdimError

Tensors = dict[str, Tensor]
Signatures = Mapping[str, tuple[str, ...]]

_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module"}
_AVERAGED = re.compile(r"(^|[._])(ema|avg|averaged?|shadow|swa|polyak)(?![a-z])", re.IGNORECASE)
_MAX_DEPTH = 4
_COUNTERS = {"n_averaged", "initted", "step", "decay", "num_updates"}  # of moving-average wrappers
_LIST = "shadow_params"  # of torch_ema and its copies: a list of averaged parameters without names


@dataclass(frozen=True)
class NetworkWeights:
    """A network in a file.

    Args:
        where: The keys and prefix of the network in the file; "" if it is the whole file.
        tensors: The network's state dict without the prefix.
        averaged: Whether it is a moving average of weights.
        unrelated: Names of other tensors that belong to no network.
    """

    where: str
    tensors: Tensors
    averaged: bool
    unrelated: tuple[str, ...] = ()


def networks(state: Any, signatures: Signatures, path: Path) -> list[NetworkWeights]:
    """Every network in the content of a weights file.

    Args:
        state: A state dict, or lists and dicts that contain state dicts.
        signatures: Tensor names that identify networks, by library.
        path: The file, for errors.

    Returns:
        The networks; empty if no signature was found.

    Raises:
        DdimError: If a name occurs twice, with and without a wrapper's part.
    """
    result, pointers = list[NetworkWeights](), set[int]()
    for where, tensors in _dicts(state):
        for network in _split(where, _without_wrappers(tensors, path), signatures):
            first = next(iter(network.tensors.values())).data_ptr()
            if first not in pointers:  # one state dict may be stored under two keys
                pointers.add(first)
                result.append(network)
    if isinstance(state, list | tuple) and len(state) > 1:  # the DDIM authors' format: [model, optimizer, ..., average]
        result = [
            NetworkWeights(f.where, f.tensors, f.where.startswith(f"{len(state) - 1}."), f.unrelated) for f in result
        ]
    trained = [network for network in result if not network.averaged]
    if len(trained) == len(result) == 1:
        result += _unnamed(state, trained[0])
    return result


def choose(networks: Sequence[NetworkWeights], ema: bool, path: Path) -> tuple[Tensors, str, tuple[str, ...]]:
    """Select the averaged or the raw weights of a file.

    Args:
        networks: The networks of a file, at least one.
        ema: Whether to take averaged weights if the file has both averaged and raw ones.
        path: The file, for errors.

    Returns:
        The weights, a note on which were taken, and further notes.

    Raises:
        DdimError: If several networks qualify, or there are only averaged weights and `ema` is False.
    """
    averaged, trained = ([network for network in networks if network.averaged is wanted] for wanted in (True, False))
    if not ema and not trained:
        raise DdimError(path, "contains only averaged weights", "do not request the raw ones")
    candidates = averaged if averaged and (ema or not trained) else trained
    if len(candidates) > 1:
        places = ", ".join(network.where or "the file itself" for network in candidates)
        raise DdimError(path, f"contains several networks, under {places}", "save only the one to use")
    [chosen] = candidates
    which = "averaged (EMA)" if chosen.averaged else "the only ones in the file, averaged or not"
    if averaged and not chosen.averaged:
        which = "raw; the averaged ones (EMA) are ignored, as requested"
    notes = [f"location in the file: under {chosen.where}"] if chosen.where else []
    if chosen.unrelated:
        more = f" and {len(chosen.unrelated) - 3} more" if len(chosen.unrelated) > 3 else ""
        notes.append(f"tensors outside the network, ignored: {', '.join(chosen.unrelated[:3])}{more}")
    return chosen.tensors, f"weights: {which}", tuple(notes)


def _dicts(state: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, Tensors]]:
    """Every dict of tensors, with its key path."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(state, Mapping):
        tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors:
            yield where, tensors
    if isinstance(state, Mapping | list | tuple):
        inner = state.items() if isinstance(state, Mapping) else enumerate(state)
        for key, value in inner:
            if isinstance(value, Mapping | list | tuple):
                yield from _dicts(value, f"{where}{key}.", depth + 1)


def _without_wrappers(tensors: Tensors, path: Path) -> Tensors:
    """Remove the parts of names that wrappers insert at any position."""
    stripped: Tensors = {}
    for key, tensor in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPER_PARTS)
        if name in stripped:
            problem = f"contains {name} twice, with and without the name of a wrapper"
            raise DdimError(path, problem, "save only the network's state dict")
        stripped[name] = tensor
    return stripped


def _split(where: str, tensors: Tensors, signatures: Signatures) -> Iterator[NetworkWeights]:
    """The networks of one state dict, separated by the prefixes before their signatures."""
    prefixes = sorted({prefix for names in signatures.values() for prefix in _prefixes(tensors, names)}, key=len)
    networks: dict[str, Tensors] = {prefix: {} for prefix in prefixes}
    unrelated = list[str]()
    for key, tensor in tensors.items():
        prefix = next((candidate for candidate in reversed(prefixes) if key.startswith(candidate)), None)
        if prefix is None:
            unrelated.append(key)
        else:
            networks[prefix][key.removeprefix(prefix)] = tensor
    others = tuple(key for key in unrelated if key.rsplit(".", 1)[-1] not in _COUNTERS)
    for prefix, network in networks.items():
        counted = f"{prefix.removesuffix('module.')}n_averaged"
        averaged = bool(_AVERAGED.search(where + prefix)) or (prefix.endswith("module.") and counted in tensors)
        yield NetworkWeights(where + prefix, network, averaged, others)
    if len(networks) == 1 and not _AVERAGED.search(where):
        yield from _flattened(where, *networks.popitem(), tensors)


def _prefixes(tensors: Tensors, names: tuple[str, ...]) -> Iterator[str]:
    first = names[0]
    for key in tensors:
        if key == first or key.endswith(f".{first}"):
            prefix = key.removesuffix(first)
            if all(f"{prefix}{name}" in tensors for name in names):
                # A diffusion wrapper stores its schedule next to its network.
                around = prefix.removesuffix("model.")
                yield around if prefix != around and f"{around}betas" in tensors else prefix


def _flattened(where: str, prefix: str, trained: Tensors, tensors: Tensors) -> Iterator[NetworkWeights]:
    """A moving average whose names have no dots, as stored by latent diffusion's training."""
    parts = prefix.split(".")[:-1]
    for average in sorted({key.split(".")[0] for key in tensors if _AVERAGED.search(key.split(".")[0])}):
        for depth in range(len(parts) + 1):
            inner = "".join(parts[depth:])
            names = {key: f"{average}.{inner}{key.replace('.', '')}" for key in trained}
            if all(name in tensors for name in names.values()):
                yield NetworkWeights(f"{where}{average}.", {key: tensors[name] for key, name in names.items()}, True)
                return


def _unnamed(state: Any, trained: NetworkWeights) -> list[NetworkWeights]:
    """Averaged parameters stored as a list, in the order of the trained ones; empty if shapes differ."""
    averages = _lists(state)
    inner = "model." if any(key.startswith("model.") for key in trained.tensors) else ""
    names = [key for key in trained.tensors if key.startswith(inner)]
    for where, parameters in averages:
        if [tensor.shape for tensor in parameters] == [trained.tensors[name].shape for name in names]:
            averaged = trained.tensors | dict(zip(names, parameters, strict=True))
            return [NetworkWeights(where, averaged, True, trained.unrelated)]
    return []


def _lists(state: Any, where: str = "", depth: int = 0) -> list[tuple[str, list[Tensor]]]:
    lists = list[tuple[str, list[Tensor]]]()
    if isinstance(state, Mapping) and depth <= _MAX_DEPTH:
        for key, value in state.items():
            if key == _LIST and isinstance(value, list | tuple) and all(isinstance(item, Tensor) for item in value):
                lists.append((f"{where}{key}", list(value)))
            else:
                lists += _lists(value, f"{where}{key}.", depth + 1)
    return lists


def unmatched(state: Any) -> str:
    """The key path of averaged parameters stored as a list; "" if there are none."""
    return next((where for where, parameters in _lists(state) if parameters), "")
