"""The recipe of `ddim train` as text: --show, --set help, --config and --save-config."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim.cli._recipe import configure
from ddim.errors import DdimError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from ddim.train.presets import Preset

PARTS = ("data", "network", "schedule", "categorical", "train")
_VALUES = ("preset", "predicts", "labels")
_VOCABULARY = {"characters", "tokenizer"}
_LIST = "tag:yaml.org,2002:seq"
_SHOWN = 10_000  # a larger bound only guards against typing errors


def changed(recipe: Preset, changes: dict[str, dict[str, Any]], predicts: str | None, labels: bool | None) -> Preset:
    """A preset with changes, as a preset that further changes can be made to.

    Raises:
        DdimError: If a value is invalid.
    """
    of_text = len(recipe.data.shape) == 1
    parts: dict[str, dict[str, Any]] = {part: {**changes.get(part, {})} for part in PARTS}
    if "budget" in parts["train"]:
        parts["train"].setdefault("steps", None)
    elif "steps" in parts["train"]:
        parts["train"]["budget"] = None
    own_vocabulary = parts["data"].keys() & _VOCABULARY
    if of_text and not own_vocabulary:  # it is taken from the data later
        parts["data"]["characters"] = "ab"
    model, train = configure(recipe, parts, predicts)
    update: dict[str, Any] = {part: getattr(model, part) for part in PARTS[:-1]} | {"train": train}
    if of_text and not own_vocabulary:
        update["data"] = model.data.model_copy(update={"characters": ""})
    update |= {"predicts": model.predicts} | ({} if labels is None else {"labels": labels})
    return recipe.model_copy(update=update)


def as_values(name: str, recipe: Preset) -> dict[str, Any]:
    """A recipe as the values of a recipe file, without what follows from the data."""
    values: dict[str, Any] = {"preset": name, "predicts": recipe.predicts, "labels": recipe.labels}
    for part in PARTS:
        config: BaseModel | None = getattr(recipe, part)
        if config is not None:
            content = config.model_dump(mode="json")
            values[part] = {key: content[key] for key in content if key not in _derived(recipe, part)}
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """The values of a recipe as YAML, with each list on one line."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Writes mappings as blocks, and lists on one line."""

    Dumper.add_representer(list, lambda dumper, each: dumper.represent_sequence(_LIST, each, flow_style=True))
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)
    return text


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file: YAML, or JSON, with any of the keys that `ddim train --show` prints.

    Raises:
        DdimError: If it cannot be read, or has an unknown key.
    """
    import yaml

    from ddim._io.reading import TEXT_BYTES, read_text

    text = read_text(path, TEXT_BYTES >> 10, "write one with `ddim train --preset NAME --show > recipe.yaml`")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise DdimError(path, "has a reference (*name)", "write the value out")
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        problem = f"is not YAML: {getattr(error, 'problem', '') or 'bad text'}{where}"
        raise DdimError(path, problem, "correct it") from None
    if not isinstance(values, dict):
        raise DdimError(path, "is not a recipe", "write keys such as train and network, as `ddim train --show` does")
    for key, value in values.items():
        if key not in (*_VALUES, *PARTS):
            raise DdimError(path, f"has an unknown key {key}", nearest(str(key), (*_VALUES, *PARTS)))
        kind = dict if key in PARTS else bool if key == "labels" else str
        if not isinstance(value, kind):
            raise DdimError(path, f"{key} is not {_NAMES[kind]}", "write it as `ddim train --show` does")
    return values


_NAMES = {dict: "a group of keys and values", bool: "true or false", str: "a text"}


def check_keys(recipe: Preset, keys: Iterable[tuple[str, str]]) -> None:
    """Check that a recipe has the settings of --set or of a file.

    Args:
        recipe: The preset.
        keys: The subject of an error and the key, such as "train.lr".

    Raises:
        DdimError: For the first unknown key, with the nearest name.
    """
    known = [f"{part}.{name}" for part, fields in _fields(recipe).items() for name in fields]
    for subject, key in keys:
        if key not in known:
            raise DdimError(subject, f"{key or 'nothing'} is not a setting", nearest(key, known))


def nearest(key: str, known: Sequence[str]) -> str:
    """The hint for an unknown key: the known keys with the nearest name, in the same part or else in any."""
    near = difflib.get_close_matches(key, known, n=1) if "." in key or "." not in known[-1] else []
    if not near:
        name = difflib.get_close_matches(key.split(".")[-1], [other.split(".")[-1] for other in known], n=1)
        near = [other for other in known if [other.split(".")[-1]] == name]
    return f"did you mean {' or '.join(near)}?" if near else "`ddim train --set help` lists the keys"


def settings_of(recipe: Preset | None) -> list[dict[str, str]]:
    """All keys of --set, each with its value in a preset and the values it can have.

    Args:
        recipe: The preset; if None, the defaults of an image model are listed.
    """
    rows = []
    for part, fields in _fields(recipe).items():
        config = None if recipe is None else getattr(recipe, part)
        if recipe is not None and config is None:
            continue
        for key, field in fields.items():
            if key not in _derived(recipe, part):
                value = field.get_default() if config is None else getattr(config, key)
                required = config is None and field.is_required()
                shown = "-" if required else _shown(value)
                rows.append({"key": f"{part}.{key}", "default": shown, "values": _values(field)})
    return rows


def listing(name: str | None, settings: list[dict[str, str]]) -> str:
    """The settings of a preset as a table; `name` is the preset's."""
    rows = [("key", name or "default", "values"), *(tuple(setting.values()) for setting in settings)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)


def _fields(recipe: Preset | None) -> dict[str, dict[str, FieldInfo]]:
    """The fields of each part of a recipe."""
    from ddim.data.policy import ImagePolicy
    from ddim.model.config import CategoricalConfig, ScheduleConfig, TrainConfig
    from ddim.nn.unet import UNetConfig

    data: type[BaseModel] = ImagePolicy if recipe is None else type(recipe.data)
    network: type[BaseModel] = UNetConfig if recipe is None else type(recipe.network)
    kinds: tuple[type[BaseModel], ...] = (data, network, ScheduleConfig, CategoricalConfig, TrainConfig)
    return {part: {**kind.model_fields} for part, kind in zip(PARTS, kinds, strict=True)}


def _derived(recipe: Preset | None, part: str) -> set[str]:
    """The settings of a part that follow from others."""
    of_text = recipe is not None and len(recipe.data.shape) == 1
    network = {"kind", "classes", "categories", *(("length",) if of_text else ("in_channels", "height", "width"))}
    return {"data": _VOCABULARY, "network": network, "categorical": {"categories"} if of_text else set()}.get(
        part, set()
    )


def _shown(value: Any) -> str:
    """A value as --set takes it."""
    import json

    return value if isinstance(value, str) and value else json.dumps(value).replace(" ", "")


def _values(field: FieldInfo) -> str:
    """The values a field can have, in words."""
    bounds = {name: getattr(item, name) for item in field.metadata for name in _BOUNDS if hasattr(item, name)}
    limits = [f"{_BOUNDS[name]} {bound:g}" for name, bound in bounds.items() if abs(bound) <= _SHOWN]
    kind, *rest = _kind(field.annotation).split(" or ", 1) if limits else [_kind(field.annotation)]
    return " or ".join([f"{kind} {' and '.join(limits)}".rstrip(), *rest])


_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
_KINDS = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is tuple:
        return f"list of {_kind(arguments[0])}s" + ("" if arguments[-1] is ... else f" ({len(arguments)})")
    return _KINDS.get(annotation, str(annotation))
