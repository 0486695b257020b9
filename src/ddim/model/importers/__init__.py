"""At home in the ecosystem: models of other codes read and written, and our plans inside diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path

from ddim.model.importers import diffusers
from ddim.model.importers.types import CheckpointHints as CheckpointHints
from ddim.model.importers.types import ImportedModel as ImportedModel

SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")


def is_importable(name: str | Path) -> bool:
    """Whether a path is a diffusers folder, or a file of weights."""
    path = Path(name)
    if path.is_dir():
        return diffusers.unet_folder(path) is not None
    return path.is_file() and path.suffix in SUFFIXES


def read(name: str | Path, hints: CheckpointHints | None = None, kind: str | None = None) -> ImportedModel:
    """Another code's model as ours. Nothing in it is ever executed.

    Args:
        name: A diffusers folder, or a file of weights.
        hints: What a file of weights does not say of itself.
        kind: "official", "openai" or "lucidrains", to read a file as that code's; found by its names if None.

    Raises:
        DdimError: If it is damaged, would need code to run, or is a network that ours cannot be.
    """
    path = Path(name)
    if path.is_dir():
        return diffusers.read(path)
    from ddim.model.importers import detect

    return detect.read(path, hints or CheckpointHints(), kind)
