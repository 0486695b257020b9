"""Training states, RUN/state/00000500.safetensors: everything the next step depends on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddim._io.atomic import remove_file
from ddim._io.reading import parse_json
from ddim._io.safetensors import read_tensors, write_tensors
from ddim.errors import DdimError, warn

FOLDER = "state"
_NAME = re.compile(r"\d{8,}\.safetensors")


def path_of(run: Path, step: int) -> Path:
    """The path of a step's state."""
    return run / FOLDER / f"{step:08d}.safetensors"


def write(run: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write the state of a step.

    Raises:
        DdimError: If it cannot be written.
    """
    path = path_of(run, step)
    write_tensors(path, tensors, {"step": step, **meta})
    return path


def resume(run: Path, load: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> set[Path]:
    """Load the newest state that is complete and whose step matches its file name.

    Args:
        run: The run directory.
        load: Called with the tensors and the metadata. It raises KeyError, RuntimeError, TypeError, ValueError or
            AttributeError for the state of another run, and is then called again with an older one.

    Returns:
        The newer files that could not be loaded; empty if there is no state at all.

    Raises:
        DdimError: If there are states, but none can be loaded.

    Warns:
        DdimWarning: For each newer file that could not be loaded.
    """
    rejected: dict[Path, str] = {}
    for step, path in reversed(_listed(run)):
        try:
            tensors, meta = read_tensors(path)
            if not meta["step"] == int(tensors["step"]) == step:
                raise ValueError(f"it has the state of step {meta['step']}")
            load(tensors, meta)
        except (DdimError, KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            rejected[path] = error.problem if isinstance(error, DdimError) else (str(error).splitlines() or ["?"])[0]
            continue
        for newer, reason in rejected.items():
            warn(f"{newer}: is not a state of this run ({reason}); resuming from the previous state, step {step}")
        return {*rejected}
    if rejected:
        path, reason = next(iter(rejected.items()))
        problem = f"is not a state of this run ({reason}), and there is no earlier one"
        raise DdimError(path, problem, f"remove the folder {path.parent} to train from the beginning")
    return set()


def last_step(run: Path) -> int:
    """The step of the newest state whose file name and metadata agree; 0 if there is none."""
    for step, path in reversed(_listed(run)):
        with contextlib.suppress(OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError):
            with safe_open(path, "pt") as file:
                meta = parse_json((file.metadata() or {})["ddim"], path)
            if meta["step"] == step:
                return step
    return 0


def prune(run: Path, step: int, keep: int, rejected: set[Path]) -> None:
    """Remove all but the newest `keep` states up to a step.

    Args:
        run: The run directory.
        step: Step of the newest state; files with a later step in their name are not removed.
        keep: Number of states to keep.
        rejected: Files that could not be loaded; they do not count towards `keep`.
    """
    states = [path for number, path in _listed(run) if number <= step]
    counted = [path for path in states if path not in rejected]
    if len(counted) > keep:
        for path in states[: states.index(counted[-keep])]:
            remove_file(path)


def _listed(run: Path) -> list[tuple[int, Path]]:
    """(step, path) of the files named like a state, sorted by step."""
    files = (path for path in (run / FOLDER).glob("*.safetensors") if _NAME.fullmatch(path.name))
    return sorted((int(path.stem), path) for path in files)
