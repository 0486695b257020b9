"""Read and write model folders, `model.safetensors` + `config.json`; no pickle is ever loaded or saved."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ddim._io.atomic import new_folder, sha256, unexpected_entries, write_atomic
from ddim._io.checksum import read_sealed, seal
from ddim._io.reading import TEXT_BYTES, check_file, memory, parse_json, read_bytes
from ddim._io.safetensors import read_tensors
from ddim._io.temporary import interrupted, remove_tree
from ddim.errors import DdimError, shorten, warn
from ddim.model.config import ModelConfig, parse, to_json
from ddim.model.network_config import NetworkConfig
from ddim.names import PRESET_NAMES

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
AnyConfig = TypeVar("AnyConfig", ModelConfig, NetworkConfig)


def bundled() -> dict[str, Path]:
    """The models shipped with the package, and in a checkout also those in `models`: name to folder."""
    package = Path(str(importlib.resources.files("ddim")))
    roots = [package / "weights"]
    if (package.parents[1] / "pyproject.toml").is_file():
        roots.append(package.parents[1] / "models")
    folders = (path for root in roots for path in sorted(root.glob("*")))
    return {path.name: path for path in folders if (path / CONFIG).is_file()}


def find(name: str | Path) -> Path:
    """Resolve a name to a model folder: a bundled model, a model folder, or the `model` folder of a run.

    Raises:
        DdimError: If there is no such model.
    """
    models = bundled()
    path = Path(name)
    for folder in (path, path / "model"):
        for candidate in (folder, interrupted(folder), _old(folder)) if folder.name else (folder,):
            if candidate is not None and (candidate / CONFIG).is_file():
                return candidate
    if isinstance(name, str) and name in models:
        return models[name]
    names = ", ".join(models) or "none"
    if not path.exists():
        if is_path(str(name)):
            raise DdimError(name, *_missing(path))
        hint = f"use a model folder or a bundled model ({names})"
        recipe = next((preset for preset in (f"{name}-fast", str(name)) if preset in PRESET_NAMES), "")
        if recipe:
            hint += f", or train one: ddim train DATA --preset {recipe} --out runs/{name}"
        raise DdimError(name, "no such model", hint)
    if path.is_file():
        raise DdimError(name, "is a file, not a model folder", f"use the folder with {WEIGHTS} and {CONFIG}")
    raise DdimError(name, f"contains no {CONFIG}", f"use a model folder, a run that has saved one, or one of: {names}")


def is_path(name: str) -> bool:
    """Whether a name can only be a local path: it begins with ".", "/" or "~", or has more than one separator."""
    return name.startswith((".", "/", "~")) or name.rstrip("/").count("/") > 1


def _missing(path: Path) -> tuple[str, str]:
    """The problem and the hint for a path that does not exist."""
    hint = "check the path; `ddim runs` lists models and runs"
    if path.parts[:1] == ("~",):
        return "no such folder: the shell has not replaced ~", f"write the path out, such as {path.expanduser()}"
    first = next((part for part in reversed(path.parents) if not part.exists()), path)
    return "no such folder" if first == path else f"no such folder: {first} does not exist", hint


def read(name: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a model's configuration and weights and verify the checksum.

    Args:
        name: A bundled model's name or a folder.

    Raises:
        DdimError: If something is missing or invalid, does not match its checksum, or is not finite.
    """
    folder = find(name)
    return _read(folder, read_config(folder / CONFIG))


def read_network(name: str | Path) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Read the configuration and weights of a user's network, and verify the checksum; its code is never imported.

    Raises:
        DdimError: As for `read`.
    """
    folder = find(name)
    return _read(folder, parse(NetworkConfig, read_sealed(folder / CONFIG), folder / CONFIG))


def has_network(name: str | Path) -> bool:
    """Whether a folder or run has a user's network, not a model of this library."""
    with contextlib.suppress(DdimError):
        path = find(name) / CONFIG
        return _is_network(read_sealed(path), path)
    return False


def _is_network(text: bytes, path: Path) -> bool:
    content = parse_json(text, path)
    return isinstance(content, dict) and content.get("format") == NetworkConfig.model_fields["format"].default


def _read(folder: Path, config: AnyConfig) -> tuple[AnyConfig, dict[str, Tensor]]:
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise DdimError(weights, "no such file", "copy the whole model folder")
    check_file(weights)
    if config.sha256 != sha256(weights):
        raise DdimError(weights, f"does not match the checksum in {CONFIG}", "copy the model folder again")
    tensors, _ = read_tensors(weights)
    check_finite(tensors, weights)
    return config, tensors


def read_config(path: Path) -> ModelConfig:
    """Read a model's configuration and verify its checksum if it has one.

    Raises:
        DdimError: If it is not a configuration, is damaged or was edited.
    """
    text = read_sealed(path)
    if _is_network(text, path):
        raise DdimError(path, "is of a network of the user's", "load it in Python: ddim.load(folder, network=...)")
    return parse(ModelConfig, text, path)


def write(
    folder: Path,
    config: ModelConfig | NetworkConfig,
    weights: Mapping[str, Tensor],
    card: Callable[[ModelConfig], str] | None = None,
) -> None:
    """Write a model folder atomically: to a temporary folder, then renamed; an older model is replaced entirely.

    Args:
        folder: The folder to write.
        config: The configuration; the checksum is filled in.
        weights: The weights.
        card: Function from the final configuration to a model card, `README.md`. If None, an existing card is kept.

    Raises:
        DdimError: If the folder cannot be written, or contains something other than a model.

    Warns:
        DdimWarning: If an existing card is kept.
    """
    _write_folder(folder, config, _bytes(weights), card)


def copy(name: str | Path, folder: Path, config: ModelConfig) -> None:
    """Write a model folder with another model's weights file, byte for byte, and a new configuration.

    Args:
        name: A bundled model's name or a folder; `folder` itself, to replace its configuration.
        folder: The folder to write.
        config: The new configuration; its checksum must be that of the weights.

    Raises:
        DdimError: As for `read` and `write`, or if the folder contains another model.
    """
    check_same_model(folder, config.sha256)
    weights = find(name) / WEIGHTS
    data = read_bytes(weights, memory())
    if hashlib.sha256(data).hexdigest() != config.sha256:
        raise DdimError(weights, f"does not match the checksum in {CONFIG}", "copy the model folder again")
    _write_folder(folder, config, data)


def check_same_model(folder: Path, sha256: str) -> None:
    """Check that a folder is free or contains a model whose weights have this checksum.

    Raises:
        DdimError: If it contains anything else.
    """
    _check_unexpected_files(folder)
    if (folder / CONFIG).is_file() and read_config(folder / CONFIG).sha256 != sha256:
        raise DdimError(folder, "contains another model", "choose another folder")


def _check_unexpected_files(folder: Path) -> None:
    card = [CARD] if (folder / CONFIG).is_file() else []  # a README.md without a model is not our card
    names = (WEIGHTS, CONFIG, *card)
    unexpected = unexpected_entries(folder, *names) or any((folder / name).is_dir() for name in names)
    if unexpected or (folder.exists() and not folder.is_dir()):
        raise DdimError(folder, "contains files that are not a model's", "choose another folder")


def _write_folder(
    folder: Path, config: ModelConfig | NetworkConfig, data: bytes, card: Callable[[ModelConfig], str] | None = None
) -> None:
    _check_unexpected_files(folder)
    config = config.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    with new_folder(folder) as part:
        write_atomic(part / WEIGHTS, data)
        write_atomic(part / CONFIG, seal(to_json(config)))
        if card is not None and isinstance(config, ModelConfig):
            write_atomic(part / CARD, card(config).encode())
        elif (folder / CARD).is_file():
            write_atomic(part / CARD, read_bytes(folder / CARD, TEXT_BYTES))
            warn(f"{folder / CARD} is kept, but describes the previous model")


def digest(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 checksum of weights that are not in a file."""
    return hashlib.sha256(_bytes(weights)).hexdigest()


def _bytes(weights: Mapping[str, Tensor]) -> bytes:
    return save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()})


def _old(folder: Path) -> Path:
    """The temporary name that version 0.1 gave to a model folder while replacing it."""
    return folder.with_name(f".{folder.name}.old")


def check_finite(weights: Mapping[str, Tensor], name: str | Path) -> None:
    """Check that all weights are finite, also after conversion to float32.

    Raises:
        DdimError: Naming the first tensor with a value that is not finite.
    """
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            problem = f"the tensor {shorten(key)} contains a value that is not finite (NaN or infinite)"
            raise DdimError(name, problem, "use weights from before the training failed, or copy the file again")


def remove_earlier_parts(folder: Path) -> None:
    """Remove temporary folders that a killed process of version 0.1 left beside a run's model folder.

    Folders with unexpected files, and an old model that was not replaced, are kept.
    """
    for leftover in (folder.with_name(f".{folder.name}.part"), _old(folder)):
        needed = leftover == _old(folder) and not folder.exists()
        if leftover.is_dir() and not needed and not unexpected_entries(leftover, WEIGHTS, CONFIG, CARD):
            remove_tree(leftover)


def fill(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    name: str | Path,
    hint: str = "use the config.json saved with it",
) -> None:
    """Copy weights into a network.

    Args:
        network: The network.
        weights: The weights.
        name: The file's or model's name in the error.
        hint: How to fix weights that do not fit.

    Raises:
        DdimError: Naming the first keys and shapes that differ.
    """
    state = network.state_dict()
    mismatches = [f"{shorten(key)} is missing" for key in state if key not in weights]
    mismatches += [f"{shorten(key)} is unexpected" for key in weights if key not in state]
    mismatches += [
        f"{key} is {list(weights[key].shape)}, not {list(value.shape)}"
        for key, value in state.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if mismatches:
        more = f" and {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
        problem = f"does not fit the network: {', '.join(mismatches[:3])}{more}"
        raise DdimError(name, problem, hint)
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(weights[key])
