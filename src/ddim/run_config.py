"""What a training run is, and whose folder it is: started again with another recipe, it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ddim.config import ModelConfig, TrainConfig, parse
from ddim.errors import DdimError, say
from ddim.files import write_atomic


class RunConfig(BaseModel):
    """What a run is: started again with the same one, it goes on.

    Args:
        data: The data set, as given.
        split: Its part.
        limit: At most so many pictures.
        data_fingerprint: A hash of what it held.
        model: The model to train.
        train: The recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str
    split: str = "train"
    limit: int | None = None
    data_fingerprint: str
    model: ModelConfig
    train: TrainConfig


def refuse_foreign(folder: Path) -> None:
    """Refuse a place that is neither new, nor an empty folder, nor a run.

    Raises:
        DdimError: If it is something else.
    """
    if folder.exists() and not folder.is_dir():
        raise DdimError(folder, "is a file", "choose an empty or new folder")
    strange = folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir())
    if strange and not (folder / "run.json").exists():
        raise DdimError(folder, "holds something that is not a run", "choose an empty or new folder")


def claim(folder: Path, config: RunConfig) -> RunConfig:
    """Write `run.json`, or see that the one there says the same."""
    path = folder / "run.json"
    if not path.exists():
        write_atomic(path, (config.model_dump_json(indent=2) + "\n").encode())
        return config
    old = parse(RunConfig, path.read_bytes(), path)
    if old == config:
        return config
    key, was, now = _first_difference(old.model_dump(), config.model_dump())
    if old.model_copy(update={"train": config.train.model_copy(update={"steps": old.train.steps})}) == old and (
        _first_difference(old.model_dump(exclude={"train"}), config.model_dump(exclude={"train"}))[0] == ""
    ):
        made = max((int(state.stem) for state in (folder / "state").glob("*.safetensors")), default=0)
        if config.train.steps < made:
            raise DdimError(folder, f"has made {made} steps, more than {config.train.steps}", "choose another folder")
        say(f"{folder}: was a run of {old.train.steps} steps, goes on to {config.train.steps}")
        write_atomic(path, (config.model_dump_json(indent=2) + "\n").encode())
        return config
    raise DdimError(
        folder, f"holds a run with {key} {was!r}, not {now!r}", "choose another folder or the same settings"
    )


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            found = _first_difference(old[name], new.get(name), f"{key}.{name}" if key else name)
            if found[0]:
                return found
        return "", None, None
    return (key, old, new) if old != new else ("", None, None)
