"""Helpers of several tests: tiny networks with nonzero weights, images, the command line."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddim.data.image_set import ImageSet
from ddim.data.policy import ImagePolicy
from ddim.data.text import TextPolicy, TextSet
from ddim.model.config import CategoricalConfig, ModelConfig, ScheduleConfig, TrainConfig
from ddim.model.load import build_model, load
from ddim.nn.base import Network
from ddim.nn.transformer import TransformerConfig
from ddim.nn.unet import UNetConfig

KINDS = ("pictures", "levels", "text", "masked text")
CATEGORICAL = KINDS[1:]
LETTERS = " abdeno"
LENGTH = 12
COUNT = 20


def tiny_network(**changes: Any) -> UNetConfig:
    """A network for 1x8x8 images that runs in a millisecond."""
    shape: dict[str, Any] = {"in_channels": 1, "height": 8, "width": 8, "channels": 16, "groups": 4}
    shape |= {"multipliers": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.0}
    return UNetConfig(**(shape | changes))


def tiny_config(kind: str = "pictures", predicts: str = "v", **changes: Any) -> ModelConfig:
    """The configuration of a tiny model of images, of images with 4 grey levels, or of text over `LETTERS`.

    `changes` are the network's, except `schedule`; models of discrete data predict x_0.
    """
    schedule = {"name": "linear" if kind == "pictures" else "cosine"} | changes.pop("schedule", {})
    if kind in ("pictures", "levels"):
        categorical = None if kind == "pictures" else CategoricalConfig(categories=4)
        network = tiny_network(**({"categories": 4} if categorical else {}), **changes)
        policy: Any = ImagePolicy(height=network.height, width=network.width, channels=network.in_channels)
    else:
        masked = kind == "masked text"
        schedule |= {"zero_terminal_snr": True} if masked else {}
        categorical = CategoricalConfig(categories=len(LETTERS), pi="mask" if masked else "uniform", carry_over=masked)
        shape: dict[str, Any] = {"categories": categorical.size, "length": LENGTH, "width": 16, "depth": 1, "heads": 2}
        network = TransformerConfig(**(shape | changes))
        policy = TextPolicy(length=network.length, characters=LETTERS)
    return ModelConfig(
        network=network,
        data=policy,
        categorical=categorical,
        predicts="x0" if categorical else predicts,
        schedule=ScheduleConfig(**schedule),
    )


def wake(network: Network, seed: int = 0) -> Network:
    """Give small random weights to the layers that start at zero, so that every part has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def new_network(config: UNetConfig | TransformerConfig, seed: int = 0) -> Any:
    """A network with random weights, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return wake(config.build(), seed)


def tiny_model(
    seed: int = 0,
    dtype: Any = "float32",
    predicts: str = "v",
    kind: str = "pictures",
    micro_batch: int | None = None,
    **changes: Any,
) -> Any:
    """A model with random weights, in memory."""
    config = tiny_config(kind, predicts, **changes)
    return build_model(new_network(config.network, seed), config, "cpu", dtype=dtype, micro_batch=micro_batch)


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A model folder with random weights."""
    tiny_model(**changes).save(folder)
    return folder


def load_tiny(folder: Path, **settings: Any) -> Any:
    """Load a folder's model in float32."""
    return load(folder, "cpu", **({"dtype": "float32"} | settings))


def recipe(**changes: Any) -> TrainConfig:
    """A recipe of a few steps in float32."""
    plain: dict[str, Any] = {"steps": 12, "batch": 8, "lr": 2e-3, "warmup": 4, "ema": 0.9, "gamma": "v"}
    plain |= {"flip": False, "precision": "float32", "checkpoint_every": 4, "preview_every": 0, "log_every": 3}
    return TrainConfig(**(plain | changes))


@functools.cache
def stripes(count: int = 20, size: int = 8, channels: int = 1) -> np.ndarray:
    """Distinct images: uint8, (count, size, size, channels)."""
    place = np.indices((count, size, size, channels))
    return ((place[0] * 37 + place[1] * 29 + place[2] * 13 * (place[0] % 3) + place[3] * 50) % 256).astype(np.uint8)


class Stripes:
    """The source of the images of `tiny_set`."""

    def __len__(self) -> int:
        return COUNT

    def source(self, index: int) -> bytes:
        return stripes(COUNT)[index].tobytes()

    def name(self, index: int) -> str:
        return f"stripes[{index}]"


def tiny_set(kind: str = "pictures", labelled: bool = False) -> ImageSet | TextSet:
    """Data for a tiny model: `COUNT` images, or windows of a text."""
    policy = tiny_config(kind).data
    if isinstance(policy, TextPolicy):
        places = np.arange(COUNT + LENGTH - 1)
        return TextSet("words.txt", "train", policy, (places**3 // 5 + places**2 // 3) % len(LETTERS))
    labels = np.arange(COUNT) % 3 if labelled else None
    return ImageSet("stripes", "train", policy, Stripes(), stripes(COUNT), labels)


def write_pictures(folder: Path, count: int = 3, size: int = 8) -> list[Path]:
    """Grey PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path, image in zip(paths, stripes(count, size)[:, :, :, 0], strict=True):
        Image.fromarray(image).save(path)
    return paths


def ddim(*words: object) -> int:
    """Run a command in this process: its exit code."""
    from ddim.cli.main import main

    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def process(*words: object) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a real `ddim` process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return [sys.executable, "-m", "ddim", *(str(word) for word in words)], env


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except hidden ones."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
