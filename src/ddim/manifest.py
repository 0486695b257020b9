"""The manifest of a folder of pictures or figures: what made them, and which of them are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddim
from ddim.checksum import unseal, write_json
from ddim.engine import Engine
from ddim.errors import DdimError, say
from ddim.files import strangers
from ddim.table import Table

MANIFEST = "manifest.json"


def claim(folder: Path, what: dict[str, Any], start: int, n: int, kind: str = "pictures") -> bool:
    """Write a folder's manifest, or see that the one there is of the same run, and add the new range.

    Args:
        folder: The folder, locked.
        what: What the pictures depend on; "software" may differ, which is said, and the model's name too.
        start: The first index that is to be there.
        n: How many.
        kind: What the folder holds, for messages.

    Returns:
        Whether the folder was claimed by a version of this library that wrote no checksums.

    Raises:
        DdimError: If the folder holds pictures of another run, or something else.
    """
    path = folder / MANIFEST
    ranges, data = [[start, start + n]], b""
    if path.exists():
        data = path.read_bytes()
        text = unseal(data, path)
        try:
            old = json.loads(text)
            found = old["ranges"]
            ranges = _merge([*old.pop("ranges"), *ranges])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DdimError(path, f"is not a manifest of {kind}", "choose another folder") from None
        for key, value in what.items():
            was = old.get(key)
            if was == value:
                continue
            if key == "software":
                say(f"{folder}: was begun with {was}, goes on with {value}; bytes may differ")
                continue
            if key == "model" and isinstance(was, dict) and {**was, "name": ""} == {**value, "name": ""}:
                continue
            shown = ("another", "this") if key in ("plan", "data_sha256") else (repr(was), repr(value))
            wrong = f"holds {kind} of another run: {key} is {shown[0]}, not {shown[1]}"
            raise DdimError(folder, wrong, "choose another folder, or the same settings")
    elif strangers(folder):
        raise DdimError(folder, f"is not empty and holds no {MANIFEST}", "choose an empty or new folder")
    earlier = bool(data) and text is data
    if not data or earlier or {**old, "ranges": found} != json.loads(json.dumps({**what, "ranges": ranges})):
        write_json(path, {**what, "ranges": ranges})
    return earlier


def identity(model: Engine, plan: Table[Any], name: str) -> dict[str, Any]:
    """What a model and a plan make depends on, for a manifest."""
    versions = {"ddim": ddim.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {
        "model": {"name": name, "sha256": model.fingerprint, "predicts": model.config.predicts},
        "plan": json.loads(plan.to_json()),
        "plan_name": plan.name,
        "network_calls": plan.calls,
        "shape": list(model.shape),
        **{key: model.conditions[key] for key in ("dtype", "device", "compile", "micro_batch")},
        "software": {**versions, "threads": model.conditions["threads"]},
    }


def _merge(ranges: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([first, end])
    return merged
