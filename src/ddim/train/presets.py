"""Presets: named training configurations."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError
from ddim.model.config import CategoricalConfig, Policy, ScheduleConfig, TrainConfig
from ddim.names import Predicts
from ddim.nn.transformer import TransformerConfig
from ddim.nn.unet import UNetConfig
from ddim.train import photos


class Preset(BaseModel):
    """A training configuration.

    Args:
        about: Purpose and cost.
        data: Preprocessing of images to the network's resolution, or of text to tokens (the vocabulary is then taken
            from the data).
        network: Network architecture.
        predicts: Prediction type.
        categorical: Configuration of discrete data; None for real-valued images.
        schedule: Noise schedule.
        train: Training recipe.
        labels: Whether the model is conditioned on the data's labels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    about: str
    data: Policy
    network: UNetConfig | TransformerConfig = Field(discriminator="kind")
    predicts: Predicts = "v"
    categorical: CategoricalConfig | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    labels: bool = False


def _preset(
    about: str, size: int, channels: int, network: dict[str, Any], train: dict[str, Any], **rest: Any
) -> Preset:
    """A preset of images, which are flipped unless its recipe says otherwise."""
    data = {"height": size, "width": size, "channels": channels, **rest.pop("data", {})}
    return Preset.model_validate(
        {
            "about": about,
            "data": data,
            "network": {"kind": "unet", "in_channels": channels, "height": size, "width": size, **network},
            "train": {"flip": True, **train},
            **rest,
        }
    )


# v-networks are trained on the unweighted error in v: gamma = 1 would weight the error near T by alpha_bar, nearly 0.
_V = {"gamma": "v"}
_SMALL = {"channels": 64, "multipliers": (1, 2), "blocks": 1, "patch": 2, "attention": (7,), "dropout": 0.0}
_SMALL_TRAIN = {
    "batch": 128,
    "lr": 1e-3,
    "warmup": 500,
    "decay": "cosine",
    "decay_fraction": 0.5,
    "ema": 0.999,
    **_V,
}
# For discrete data the network predicts p(x_0 | x_t), trained with unweighted cross-entropy; the cosine schedule
# reveals the tokens evenly over time.
_TOKENS: dict[str, Any] = {"predicts": "x0", "schedule": {"name": "cosine"}}
_LSUN = {"channels": 128, "multipliers": (1, 1, 2, 2, 4, 4), "attention": (16,), "dropout": 0.0}

PRESETS: dict[str, Preset] = {
    "photos": _preset(
        "a folder of images, any size; the network and recipe follow from --budget and the measured speed",
        32,
        3,
        photos.network(photos.SCALES[0], ImagePolicy(height=32, width=32, channels=3)),
        {
            **photos.recipe(photos.SCALES[0], 1000),
            "steps": None,
            "budget": 1800.0,
            "decay": "linear",
            "decay_fraction": 0.7,
            "betas": (0.9, 0.99),
            "ema_half_life": 0.05,
            **_V,
        },
    ),
    "digits": _preset(
        "scikit-learn's 8x8 digits; for quick experiments, one or two minutes on two cores",
        8,
        1,
        {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.0, "groups": 16},
        {
            "steps": 2000,
            "batch": 64,
            "lr": 2e-3,
            "warmup": 100,
            "decay": "cosine",
            "ema": 0.995,
            "flip": False,
            "checkpoint_every": 250,
            "preview_every": 500,
            **_V,
        },
    ),
    "mnist": _preset(
        "MNIST 28x28, 2.8 M parameters; the bundled model, over an hour on one core with bf16",
        28,
        1,
        _SMALL,
        {**_SMALL_TRAIN, "steps": 6500, "flip": False, "checkpoint_every": 500, "preview_every": 1000},
    ),
    "fashion-mnist": _preset(
        "Fashion-MNIST 28x28, the network of mnist",
        28,
        1,
        _SMALL,
        {**_SMALL_TRAIN, "steps": 6500, "flip": True, "checkpoint_every": 500, "preview_every": 1000},
    ),
    "mnist-4level": _preset(
        "MNIST 28x28 in four grey levels, discrete data; the network of mnist, not trained yet",
        28,
        1,
        {**_SMALL, "categories": 4},
        {**_SMALL_TRAIN, "gamma": "simple", "steps": 4000, "flip": False, "checkpoint_every": 500},
        categorical={"categories": 4},
        **_TOKENS,
    ),
    "tinyshakespeare": Preset.model_validate(
        {
            "about": "character-level text, 2.6 M parameters, for about a megabyte; the bundled model",
            "data": {"length": 256},
            "network": {"kind": "transformer", "length": 256},
            "categorical": {"categories": 2},
            "train": {
                "steps": 5600,
                "batch": 8,
                "lr": 3e-3,
                "warmup": 200,
                "decay": "linear",
                "decay_fraction": 0.7,
                "weight_decay": 0.01,
                "betas": (0.9, 0.98),
                "ema": 0.997,
                "flip": False,
                "checkpoint_every": 250,
                "preview_every": 500,
            },
            **_TOKENS,
        }
    ),
    "cifar10": _preset(
        "CIFAR-10, the 35.7 M-parameter network and recipe of Ho et al., predicting v; for a GPU",
        32,
        3,
        {},
        {**_V},
    ),
    "cifar10-fast": _preset(
        "CIFAR-10 with labels, 19.1 M parameters, half an hour on a large GPU; use --budget 25min",
        32,
        3,
        {"channels": 96, "multipliers": (1, 2, 2), "blocks": 3, "head_channels": 48, "dropout": 0.05},
        {
            "steps": 20_000,
            "batch": 512,
            "lr": 1e-3,
            "warmup": 600,
            "decay": "linear",
            "betas": (0.9, 0.99),
            "ema_half_life": 0.05,
            "gamma": "sigmoid",
            "times": "importance",
            "label_drop": 0.12,
            "compile": True,
            "checkpoint_every": 2500,
            "preview_every": 5000,
        },
        labels=True,
    ),
    "cifar10-paper": _preset(
        "CIFAR-10 exactly as in the paper: eps, gamma = 1; for a GPU",
        32,
        3,
        {},
        {},
        predicts="eps",
    ),
    "celeba64": _preset(
        "CelebA 64x64 from the aligned 178x218 images, the authors' code's 128x128 crop; for a GPU",
        64,
        3,
        {"multipliers": (1, 2, 2, 2, 4)},
        {**_V},
        data={"box": (25, 57, 153, 185)},
    ),
    "celeba64-10k": _preset(
        "CelebA 64x64 from the 89x109 images of the 10k set, a 70x70 crop; for a GPU",
        64,
        3,
        {"multipliers": (1, 2, 2, 2, 4)},
        {**_V},
        data={"box": (10, 25, 80, 95)},
    ),
    "lsun-bedroom256": _preset(
        "LSUN bedroom 256x256, the paper's sizes; for a GPU", 256, 3, _LSUN, {"batch": 64, **_V}
    ),
    "lsun-church256": _preset("LSUN church 256x256, the paper's sizes; for a GPU", 256, 3, _LSUN, {"batch": 64, **_V}),
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        DdimError: If there is none.
    """
    if name not in PRESETS:
        raise DdimError(f"preset {name!r}", "is unknown", f"use one of {', '.join(PRESETS)}")
    return PRESETS[name]
