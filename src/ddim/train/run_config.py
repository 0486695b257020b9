"""Configuration of a training run; a run directory with another one is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from ddim._io.atomic import unexpected_entries, write_atomic
from ddim._io.checksum import read_sealed, seal
from ddim.data.image_set import ImageSet
from ddim.data.labels import missing_labels
from ddim.data.text import TextSet
from ddim.errors import DdimError, warn
from ddim.model.config import ModelConfig, TrainConfig, parse, to_json
from ddim.model.network_config import NetworkConfig
from ddim.train.states import last_step

RUN = "run.json"
INTERVALS = ("checkpoint_every", "keep", "preview_every", "log_every")
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


class NetworkRunConfig(BaseModel):
    """Everything that identifies a run of `ddim.fit`; training again with the same configuration resumes it.

    Args:
        kind: Always "fit"; the runs of `ddim train` have no kind.
        data: The type of the data.
        data_fingerprint: Hash of the content of a tensor or array, of the type and sizes of other data.
        model: The network and its schedule.
        train: The recipe.
        init_from: Always None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["fit"]
    data: str
    data_fingerprint: str
    model: NetworkConfig
    train: TrainConfig
    init_from: None = None


def check_data(config: RunConfig, data: ImageSet | TextSet) -> None:
    """Check that the recipe fits the data, before the run directory is created.

    Raises:
        DdimError: If the recipe needs labels that the data do not have, has no steps left, or flips text.
    """
    classes = config.model.network.classes
    if classes and data.labels is None:
        columns = data.label_columns if isinstance(data, ImageSet) else ()
        raise DdimError(config.data, *missing_labels(columns, "train without classes, or use labelled data"))
    if classes and data.labels is not None and int(data.labels.max()) >= classes:
        problem = f"has the label {int(data.labels.max())}, but the network has {classes} classes"
        raise DdimError(config.data, problem, "use at least as many classes as labels")
    if config.init_from and config.train.steps is not None and config.train.steps <= config.init_from.steps:
        problem = f"are not more than the {config.init_from.steps} of the initial model"
        raise DdimError(f"{config.train.steps} steps", problem, "use more steps: counting continues")
    if config.train.flip and len(config.model.network.shape) == 1:
        raise DdimError("train.flip", "is for images, but the data are text", "set it to false")


def check_run_dir(folder: Path) -> None:
    """Check that a path is new, an empty folder, or a run directory.

    Raises:
        DdimError: If it is anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise DdimError(folder, "is a file", "use an empty or new folder")
    if unexpected_entries(folder) and not (folder / RUN).exists():
        raise DdimError(folder, "contains files that are not a run", "use an empty or new folder")


AnyRunConfig = TypeVar("AnyRunConfig", bound=RunConfig | NetworkRunConfig)


def write_or_verify(folder: Path, config: AnyRunConfig) -> None:
    """Write `run.json`, or verify that the existing one has the same configuration.

    Settings that do not affect the weights (intervals of checkpoints, previews and logging) may change, and so may the
    length of the run.

    Raises:
        DdimError: If the folder holds another run, or one that already has more steps.
    """
    path = folder / RUN
    text = seal(to_json(config))
    if (old := read_run(folder, type(config))) is None:
        write_atomic(path, text)
        return
    if old == config:
        return
    changeable = {name: getattr(old.train, name) for name in (*LENGTH, *INTERVALS)}
    comparable = config.model_copy(update={"train": config.train.model_copy(update=changeable)})
    if comparable != old:
        key, before, now = first_difference(old.model_dump(), comparable.model_dump())
        problem = f"contains a run with {key} {before!r}, not {now!r}"
        raise DdimError(folder, problem, "use another folder or the same settings")
    if length(old.train) != length(config.train):
        steps_done = last_step(folder)
        if config.train.steps is not None and config.train.steps < steps_done:
            problem = f"has trained {steps_done} steps, more than {config.train.steps}"
            raise DdimError(folder, problem, "use at least as many steps, or another folder")
        decay = "" if config.train.decay == "none" else "; the learning rate decays to the new end"
        warn(f"{folder}: was a run of {length(old.train)} and is resumed to {length(config.train)}{decay}")
    write_atomic(path, text)


def read_run(folder: Path, kind: type[AnyRunConfig]) -> AnyRunConfig | None:
    """The configuration of the run in a folder, of the class `kind`; None if there is no run.

    Raises:
        DdimError: If its file is damaged.
    """
    path = folder / RUN
    return parse(kind, read_sealed(path), path) if path.exists() else None


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
