"""Import models of other libraries: diffusers, the DDIM authors' code, OpenAI's code and lucidrains."""

from __future__ import annotations

from pathlib import Path

from ddim.model.importers import diffusers
from ddim.model.importers.types import CheckpointHints as CheckpointHints
from ddim.model.importers.types import ImportedModel as ImportedModel

SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")


def is_importable(name: str | Path) -> bool:
    """Whether a path is a diffusers folder or a file of weights."""
    path = Path(name)
    if path.is_dir():
        return diffusers.unet_folder(path) is not None
    return path.is_file() and path.suffix in SUFFIXES


def read(name: str | Path, hints: CheckpointHints | None = None, library: str | None = None) -> ImportedModel:
    """Convert another library's model. No code in it is ever executed.

    Args:
        name: A diffusers folder, or a file of weights.
        hints: Metadata that a file of weights lacks.
        library: The format of a file, "official", "openai" or "lucidrains"; detected from tensor names if None.

    Raises:
        DdimError: If it is damaged, needs code to run, or is a network that this library does not support.
    """
    path = Path(name)
    if path.is_dir():
        return diffusers.read(path)
    from ddim.model.importers import detect

    return detect.read(path, hints or CheckpointHints(), library)
