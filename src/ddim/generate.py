"""Bulk sampling into a folder of PNG files with one manifest: complete, resumable, never doubled.

Picture i is a function of (model, plan, seed, i): its bytes depend neither on how many are made at a time nor on
where an earlier run was stopped. A file under its final name is whole; what is missing is made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddim
from ddim.errors import DdimError, say
from ddim.files import lock, make_folder, remove_parts, write_atomic
from ddim.model import Model
from ddim.pixels import to_uint8
from ddim.plan import Plan
from ddim.sheet import save_png

FORMAT = "ddim-samples"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Made:
    """Where a bulk sampling stands.

    Args:
        done: Pictures of the request that are in the folder.
        total: Pictures of the request.
        found: Pictures that were there before.
    """

    done: int
    total: int
    found: int


def picture_path(folder: Path, index: int) -> Path:
    """The file of picture `index`."""
    return folder / f"{index:06d}.png"


def generate(
    model: Model,
    plan: Plan,
    folder: Path,
    n: int,
    start: int = 0,
    seed: int = 0,
    name: str = "",
    batch: int = 64,
    label: int | None = None,
    guidance: float | None = None,
) -> Iterator[Made]:
    """Make pictures start..start + n - 1 of a run, those that are not in the folder yet.

    Args:
        model: The model.
        plan: What to run.
        folder: Where to; made if it is not there.
        n: How many.
        start: The first one's index.
        seed: The run's seed.
        name: The model's name, for the metadata.
        batch: Pictures held before they are written.
        label: One label for all, for a model with labels.
        guidance: Scale of classifier-free guidance.

    Yields:
        Where it stands: once before the first picture, then after each batch.

    Raises:
        DdimError: If an argument is out of range, or the folder holds another run or is in use.
    """
    _check_numbers(n, start, batch, seed, guidance)
    model.denoiser(None if label is None else torch.tensor([label]), guidance)
    what = _identity(model, plan, seed, name, label, guidance)
    fresh = not folder.exists()
    make_folder(folder)
    with lock(folder):
        _claim(folder, what, start, n, fresh)
        remove_parts(folder)
        missing = [i for i in range(start, start + n) if not picture_path(folder, i).exists()]
        found = n - len(missing)
        yield Made(found, n, found)
        text = {"model": what["model"]["name"], "model_sha256": what["model"]["sha256"], "seed": str(seed)}
        text |= {"plan": plan.name, "plan_sha256": _digest(plan), "software": f"ddim {ddim.__version__}"}
        for first in range(0, len(missing), batch):
            part = missing[first : first + batch]
            labels = None if label is None else [label] * len(part)
            places = iter(part)
            for block in model.sample_blocks(plan, part, seed, labels, guidance):
                _refuse_nonsense(block)
                for picture in to_uint8(block):
                    index = next(places)
                    save_png(picture_path(folder, index), picture, {**text, "index": str(index)})
            yield Made(found + min(first + batch, len(missing)), n, found)


def _check_numbers(n: int, start: int, batch: int, seed: int, guidance: float | None) -> None:
    for argument, value, least in (("n", n, 1), ("start", start, 0), ("batch", batch, 1)):
        if value < least:
            raise DdimError(f"{argument} {value}", f"is less than {least}", f"give {least} or more")
    if not 0 <= seed < 2**64:
        raise DdimError(f"seed {seed}", "is outside 0..2^64-1", "choose another seed")
    if guidance is not None and not math.isfinite(guidance):
        raise DdimError(f"guidance {guidance}", "is not a finite number", "give a number such as 2")


def read_sheet(folder: Path, indices: range) -> np.ndarray:
    """Pictures of a samples folder: uint8, (N, H, W, C)."""
    from PIL import Image

    pictures = [np.asarray(Image.open(picture_path(folder, index))) for index in indices]
    return np.stack([p[:, :, None] if p.ndim == 2 else p for p in pictures])


def _identity(
    model: Model, plan: Plan, seed: int, name: str, label: int | None, guidance: float | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": 1,
        "model": {"name": name, "sha256": model.config.sha256},
        "plan": json.loads(plan.to_json()),
        "plan_name": plan.name,
        "network_calls": plan.calls,
        "seed": seed,
        "label": label,
        "guidance": guidance,
        "shape": list(model.shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "compile": model.compile,
        "micro_batch": model.micro_batch,
        "software": {"ddim": ddim.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def _claim(folder: Path, what: dict[str, Any], start: int, n: int, fresh: bool) -> None:
    """Write the manifest, or see that the one there is of the same run and add the new range."""
    path = folder / MANIFEST
    ranges = [[start, start + n]]
    if path.exists():
        try:
            old = json.loads(path.read_bytes())
            ranges = _merge([*old.pop("ranges"), *ranges])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DdimError(path, "is not a samples manifest", "choose another folder") from None
        for key, value in what.items():
            was = old.get(key)
            if was == value:
                continue
            if key == "software":
                say(f"{folder}: was begun with {was}, goes on with {value}; bytes may differ")
                continue
            if key == "model" and isinstance(was, dict) and was.get("sha256") == value["sha256"]:
                continue
            shown = ("another", "this") if key == "plan" else (repr(was), repr(value))
            wrong = f"holds samples of another run: {key} is {shown[0]}, not {shown[1]}"
            raise DdimError(folder, wrong, "choose another folder, or the same settings")
    elif not fresh and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise DdimError(folder, f"is not empty and holds no {MANIFEST}", "choose an empty or new folder")
    write_atomic(path, (json.dumps({**what, "ranges": ranges}, indent=1) + "\n").encode())


def _merge(ranges: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([first, end])
    return merged


def _digest(plan: Plan) -> str:
    return hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]


def _refuse_nonsense(block: torch.Tensor) -> None:
    if not torch.isfinite(block).all():
        raise DdimError("samples", "are not finite numbers", "use --dtype float32, --clip, or another grid")
