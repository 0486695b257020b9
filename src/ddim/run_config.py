"""What a training run is, and whose folder it is: started again with another recipe, it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ddim.config import ModelConfig, TrainConfig, parse, to_json
from ddim.errors import DdimError, say
from ddim.files import strangers, write_atomic

RUN = "run.json"
RHYTHM = ("checkpoint_every", "keep", "preview_every", "log_every")


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
    if strangers(folder) and not (folder / RUN).exists():
        raise DdimError(folder, "holds something that is not a run", "choose an empty or new folder")


def claim(folder: Path, config: RunConfig) -> None:
    """Write `run.json`, or see that the one there says the same.

    What weights do not depend on (how often is saved, shown and logged) may change, and there may be other steps.

    Raises:
        DdimError: If the folder holds another run, or one that is already longer.
    """
    path = folder / RUN
    text = to_json(config).encode()
    if not path.exists():
        write_atomic(path, text)
        return
    old = parse(RunConfig, path.read_bytes(), path)
    if old == config:
        return
    kept = {name: getattr(old.train, name) for name in ("steps", *RHYTHM)}
    same = config.model_copy(update={"train": config.train.model_copy(update=kept)})
    if same != old:
        key, was, now = _first_difference(old.model_dump(), same.model_dump())
        wrong = f"holds a run with {key} {was!r}, not {now!r}"
        raise DdimError(folder, wrong, "choose another folder or the same settings")
    if old.train.steps != config.train.steps:
        made = max((int(state.stem) for state in folder.glob("state/*.safetensors") if state.stem.isdigit()), default=0)
        if config.train.steps < made:
            wrong = f"has made {made} steps, more than {config.train.steps}"
            raise DdimError(folder, wrong, "ask for as many or more, or choose another folder")
        decay = "" if config.train.decay == "none" else "; the learning rate falls at the new end"
        say(f"{folder}: was a run of {old.train.steps} steps, goes on to {config.train.steps}{decay}")
    write_atomic(path, text)


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            found = _first_difference(old[name], new.get(name), f"{key}.{name}" if key else name)
            if found[0]:
                return found
        return "", None, None
    return (key, old, new) if old != new else ("", None, None)
