"""Configuration of a training run; a run directory is refused if its configuration differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from ddim._io.atomic import unexpected_entries, write_atomic
from ddim._io.checksum import read_sealed, seal
from ddim.data.image_set import ImageSet
from ddim.data.labels import complaint
from ddim.data.text import TextSet
from ddim.errors import DdimError, warn
from ddim.model.config import ModelConfig, TrainConfig, parse, to_json
from ddim.train.states import steps_made

RUN = "run.json"
RHYTHM = ("checkpoint_every", "keep", "preview_every", "log_every")
LENGTH = ("steps", "budget")


class Origin(BaseModel):
    """The model whose weights a run was initialised from.

    Args:
        sha256: Checksum of its weights.
        steps: Optimiser steps it was trained for; the run's step count continues from there.
        images_seen: Images it was trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    steps: int = 0
    images_seen: int = 0


class RunConfig(BaseModel):
    """Everything that identifies a run; training again with the same configuration resumes it.

    Args:
        data: The dataset, as passed by the user.
        split: Split of the dataset.
        limit: Largest number of images to use.
        label_column: Name of the label column, if it is not `label`.
        data_fingerprint: Hash of the dataset's content.
        model: The model to train.
        train: The recipe.
        init_from: The model whose weights the run is initialised from, if any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str
    split: str = "train"
    limit: int | None = None
    label_column: str | None = None
    data_fingerprint: str
    model: ModelConfig
    train: TrainConfig
    init_from: Origin | None = Field(None, validation_alias=AliasChoices("init_from", "begun"))  # begun: older runs


def check_data(config: RunConfig, data: ImageSet | TextSet) -> None:
    """Check that the recipe fits the data, before the run directory is created.

    Raises:
        DdimError: If the recipe needs labels that the data do not have, has no steps left, or flips text.
    """
    classes = config.model.network.classes
    if classes and data.labels is None:
        columns = data.label_columns if isinstance(data, ImageSet) else ()
        raise DdimError(config.data, *complaint(columns, "train without classes, or use labelled data"))
    if classes and data.labels is not None and int(data.labels.max()) >= classes:
        problem = f"has the label {int(data.labels.max())}, the network {classes} classes"
        raise DdimError(config.data, problem, "give the network a class for every label")
    if config.init_from and config.train.steps is not None and config.train.steps <= config.init_from.steps:
        problem = f"are no more than the {config.init_from.steps} behind the model it begins with"
        raise DdimError(f"{config.train.steps} steps", problem, "ask for more: they are counted on")
    if config.train.flip and len(config.model.network.shape) == 1:
        raise DdimError("train.flip", "is about pictures, the data are text", "set it to false")


def check_run_dir(folder: Path) -> None:
    """Check that a path is new, an empty folder, or a run directory.

    Raises:
        DdimError: If it is anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise DdimError(folder, "is a file", "choose an empty or new folder")
    if unexpected_entries(folder) and not (folder / RUN).exists():
        raise DdimError(folder, "holds something that is not a run", "choose an empty or new folder")


def write_or_verify(folder: Path, config: RunConfig) -> None:
    """Write `run.json`, or verify that the existing one has the same configuration.

    Settings that do not affect the weights (intervals of checkpoints, previews and logging) may change, and so may the
    length of the run.

    Raises:
        DdimError: If the folder holds another run, or one that already has more steps.
    """
    path = folder / RUN
    text = seal(to_json(config))
    if not path.exists():
        write_atomic(path, text)
        return
    old = parse(RunConfig, read_sealed(path), path)
    if old == config:
        return
    changeable = {name: getattr(old.train, name) for name in (*LENGTH, *RHYTHM)}
    same = config.model_copy(update={"train": config.train.model_copy(update=changeable)})
    if same != old:
        key, was, now = first_difference(old.model_dump(), same.model_dump())
        problem = f"holds a run with {key} {was!r}, not {now!r}"
        raise DdimError(folder, problem, "choose another folder or the same settings")
    if length(old.train) != length(config.train):
        steps_done = steps_made(folder)
        if config.train.steps is not None and config.train.steps < steps_done:
            problem = f"has made {steps_done} steps, more than {config.train.steps}"
            raise DdimError(folder, problem, "ask for as many or more, or choose another folder")
        decay = "" if config.train.decay == "none" else "; the learning rate falls at the new end"
        warn(f"{folder}: was a run of {length(old.train)}, goes on to {length(config.train)}{decay}")
    write_atomic(path, text)


def length(recipe: TrainConfig) -> str:
    """The length of a training as text: "800 steps", "1500 s", or "800 steps or 1500 s"."""
    parts = [] if recipe.steps is None else [f"{recipe.steps} steps"]
    return " or ".join(parts if recipe.budget is None else [*parts, f"{recipe.budget:g} s"])


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any]:
    """The first key at which two nested configurations differ, with both values; key "" if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            difference = first_difference(old[name], new.get(name), f"{key}.{name}" if key else name)
            if difference[0]:
                return difference
        return "", None, None
    return (key, old, new) if old != new else ("", None, None)
