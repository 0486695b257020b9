"""Loading of feature extractors: the bundled ones, Inception, and custom networks."""

from __future__ import annotations

import importlib.resources
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddim._io.atomic import sha256
from ddim._io.checksum import read_sealed_json
from ddim._io.reading import check_file
from ddim._io.safetensors import read_tensors
from ddim.data.pixels import to_float
from ddim.errors import DdimError
from ddim.evaluation.features import INCEPTION, Extractor
from ddim.evaluation.inception import inception
from ddim.model import checkpoint
from ddim.nn.classifier import config_of


def bundled() -> dict[str, Path]:
    """Names and folders of the extractors included in the package."""
    root = Path(str(importlib.resources.files("ddim"))) / "extractors"
    return {path.name: path for path in sorted(root.glob("*")) if (path / "config.json").is_file()}


def load(name: str, device: torch.device | str = "cpu", weights: Path | None = None) -> Extractor:
    """Load an extractor by name or from a file.

    Args:
        name: Name of a bundled extractor; "inception" for FID; or path of a TorchScript file or exported program (.pt2)
            that maps float (B, C, H, W) in [-1, 1] to (B, D). Such a file contains code that is executed: use only
            files you trust.
        device: Device to run on.
        weights: Local file of Inception's weights; by default they are downloaded on first use.

    Raises:
        DdimError: If there is no such extractor, or its weights cannot be loaded.
    """
    if name == INCEPTION:
        return inception(weights, device)
    if weights is not None:
        raise DdimError("inception weights", f"are set for {name}", "remove them, or use --extractor inception")
    if name in bundled():
        return _bundled(name, bundled()[name], device)
    if Path(name).is_file():
        return from_file(Path(name), device)
    names = ", ".join([*bundled(), INCEPTION])
    raise DdimError(f"extractor {name}", "is unknown", f"use {names}, or a TorchScript or .pt2 file")


def choose(shape: tuple[int, int, int], data: str) -> str:
    """The name of the default extractor for images of shape (H, W, C); never "inception", which must be requested.

    Raises:
        DdimError: If no bundled extractor accepts the shape.
    """
    if shape == (28, 28, 1):
        return "clothing28" if "fashion" in data else "digits28"
    if shape == (32, 32, 3):
        return "colour32"
    shown = "x".join(map(str, shape))
    raise DdimError("extractor", f"no bundled one accepts {shown}", "use --extractor inception")


def from_module(
    module: nn.Module, name: str, shape: tuple[int, int, int] | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Use a custom network as an extractor.

    Args:
        module: Maps float (B, C, H, W) in [-1, 1] to (B, D) or (B, D, 1, 1).
        name: Label of the distances in its feature space.
        shape: Accepted image shape (H, W, C); None for any.
        device: Device to run on.

    Raises:
        DdimError: If a bundled extractor has the name, or it starts with "inception".
    """
    _check_name(name, "choose another name")
    module = module.to(device).eval()
    return Extractor(name, checkpoint.digest(module.state_dict()), _float_input(module, device), shape)


def from_file(path: Path, device: torch.device | str = "cpu") -> Extractor:
    """Load a TorchScript file or exported program (.pt2) as an extractor named after the file.

    The file contains code that is executed: use only files you trust.

    Raises:
        DdimError: If the file is neither, or has the name of another extractor.
    """
    from torch.export.passes import move_to_device_pass

    _check_name(path.stem, "rename the file")
    check_file(path)
    try:
        if not zipfile.is_zipfile(path):  # torch.export would log its own traceback
            raise ValueError("it is not an archive")
        if path.suffix == ".pt2":
            program = torch.export.load(path)
            module = move_to_device_pass(program, device).module()
        else:
            module = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # many exception types, including those of zip files
        problem = f"is neither a TorchScript file nor an exported program ({_reason(error)})"
        raise DdimError(path, problem, "write one with torch.jit.save or torch.export.save") from None
    return Extractor(path.stem, sha256(path), _float_input(module, device))


def _check_name(name: str, hint: str) -> None:
    """Raise DdimError for the name of a bundled extractor or of Inception, to keep distances distinguishable."""
    if name in bundled() or name.startswith(INCEPTION):
        raise DdimError(f"extractor {name}", "is the name of another extractor", hint)


def _reason(error: Exception) -> str:
    """The last line of an error's message, which in torch holds the actual reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _float_input(module: Callable[[Tensor], Tensor], device: torch.device | str) -> Callable[[np.ndarray], Tensor]:
    def function(images: np.ndarray) -> Tensor:
        try:
            features = module(to_float(images).to(device))
            return features.flatten(1) if features.ndim > 1 else features
        except Exception as error:  # a user's module may raise anything
            problem = f"fails on images {images.shape} ({_reason(error)})"
            raise DdimError("extractor", problem, "it must accept float (B, C, H, W) in [-1, 1]") from None

    return function


def _bundled(name: str, folder: Path, device: torch.device | str) -> Extractor:
    about = read_sealed_json(folder / "config.json", dict, again="reinstall ddim")
    weights = folder / "model.safetensors"
    check_file(weights)
    digest = sha256(weights)
    if digest != about["sha256"]:
        raise DdimError(weights, "does not match its checksum", "reinstall ddim")
    network = config_of(about["network"]).build()
    tensors, _ = read_tensors(weights)
    network.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
    network = network.to(device).eval().requires_grad_(False)
    side, channels = network.config.side, network.config.in_channels
    note = f"{about['test_accuracy']:.2%} test accuracy on {about['trained_on']['data']}"

    def function(images: np.ndarray) -> Tensor:
        return network.features(to_float(images).to(device))

    return Extractor(name, digest, function, (side, side, channels), note=note)
