"""A training preset with the changes of the options of `ddim train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ddim._io.reading import parse_json
from ddim.errors import DdimError

if TYPE_CHECKING:
    from ddim.model.config import ModelConfig, TrainConfig
    from ddim.train.presets import Preset


def add_setting(changes: dict[str, dict[str, Any]], setting: str) -> None:
    """Add a KEY=VALUE such as network.channels=96 to `changes`; the value is JSON, or else a string."""
    key, equals, text = setting.partition("=")
    part, _, name = key.partition(".")
    if not equals or part not in changes or not name:
        parts = ", ".join(changes)
        raise DdimError(f"--set {setting}", f"is not PART.NAME=VALUE with a part of {parts}", "see --help")
    if name in changes[part]:
        raise DdimError(f"--set {setting}", "is set twice", "set it once, as an option or with --set")
    try:
        changes[part][name] = parse_json(text, f"--set {key}")
    except DdimError:
        changes[part][name] = text


def configure(
    recipe: Preset, changes: dict[str, dict[str, Any]], predicts: str | None
) -> tuple[ModelConfig, TrainConfig]:
    """The model and training configurations of a preset with changes; the network's size follows the data's."""
    import torch

    from ddim._io.limits import check_batch
    from ddim.model.config import CategoricalConfig, ModelConfig, TrainConfig, build
    from ddim.model.modality import modality_of

    policy = build(type(recipe.data), recipe.data.model_dump() | changes["data"], "data")
    prediction = predicts or recipe.predicts
    training = {} if prediction == recipe.predicts else {"gamma": "v" if prediction == "v" else "simple"}
    categorical = _categorical(recipe, policy, changes["categorical"])
    network: dict[str, Any] = recipe.network.model_dump() | _network(recipe, policy) | changes["network"]
    schedule = recipe.schedule.model_dump()
    if categorical:
        noise = build(CategoricalConfig, categorical, "categorical")
        network["categories"] = noise.size
        schedule["zero_terminal_snr"] |= noise.excludes  # required by a mask; an explicit setting is checked
    schedule |= changes["schedule"]
    model: dict[str, Any] = {
        "schedule": schedule,
        "predicts": prediction,
        "network": network,
        "data": policy.model_dump(),
    }
    model["categorical"] = categorical
    train = build(TrainConfig, recipe.train.model_dump() | training | changes["train"], "training")
    config = build(ModelConfig, model, "model")
    check_batch(config.network, train)
    # Refuses a weight that is infinite, or of another modality.
    modality_of(config).loss(train.gamma, torch.device("cpu"), train.times)
    return config, train


def _network(recipe: Preset, policy: Any) -> dict[str, Any]:
    """The network settings that follow from the shape of the data."""
    if len(policy.shape) == 1:
        return {"length": policy.length}
    scale = policy.height / recipe.data.height  # type: ignore[union-attr]  # attention stays at its level
    attention = [round(side * scale) for side in recipe.network.attention]  # type: ignore[union-attr]
    shape = {"in_channels": policy.channels, "height": policy.height, "width": policy.width}
    return {"attention": attention} | shape


def _categorical(recipe: Preset, policy: Any, changes: dict[str, Any]) -> dict[str, Any] | None:
    """The categorical settings: text has as many categories as its vocabulary; None for real-valued data."""
    if recipe.categorical is None:
        if changes:
            raise DdimError("--set categorical", "applies to discrete data only", "use --preset mnist-4level or a text")
        return None
    sizes = {"categories": policy.categories} if len(policy.shape) == 1 else {}
    return recipe.categorical.model_dump() | sizes | changes
