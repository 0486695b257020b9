"""Small things that several tests use: tiny networks with weights that do something, pictures, the command line."""

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

from ddim.config import ModelConfig, TrainConfig
from ddim.data.policy import ImagePolicy
from ddim.model import Model, load
from ddim.nn.unet import UNet, UNetConfig


def tiny_network(**changes: Any) -> UNetConfig:
    """A network for 1x8x8 pictures that runs in a millisecond."""
    shape: dict[str, Any] = {"in_channels": 1, "height": 8, "width": 8, "channels": 16, "groups": 4}
    shape |= {"multipliers": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.0}
    return UNetConfig(**(shape | changes))


def wake(network: UNet, seed: int = 0) -> UNet:
    """Give small random weights to the layers that start at zero, so that every part of the network acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def new_network(config: UNetConfig, seed: int = 0) -> UNet:
    """A network with random weights, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return wake(UNet(config), seed)


def tiny_model(seed: int = 0, dtype: Any = "float32", predicts: str = "v", **changes: Any) -> Model:
    """A model with random weights, in memory."""
    micro_batch = changes.pop("micro_batch", None)
    network = tiny_network(**changes)
    policy = ImagePolicy(height=network.height, width=network.width, channels=network.in_channels)
    config = ModelConfig(network=network, data=policy, predicts=predicts)
    return Model(new_network(network, seed), config, dtype=dtype, micro_batch=micro_batch)


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A model folder with random weights."""
    tiny_model(**changes).save(folder)
    return folder


def load_tiny(folder: Path, **settings: Any) -> Model:
    """That folder's model, computing in float32."""
    return load(folder, "cpu", **({"dtype": "float32"} | settings))


def recipe(**changes: Any) -> TrainConfig:
    """A recipe of a few steps in float32."""
    plain: dict[str, Any] = {"steps": 12, "batch": 8, "lr": 2e-3, "warmup": 4, "ema": 0.9, "gamma": "v"}
    plain |= {"flip": False, "precision": "float32", "checkpoint_every": 4, "preview_every": 0, "log_every": 3}
    return TrainConfig(**(plain | changes))


@functools.cache
def stripes(count: int = 20, size: int = 8, channels: int = 1) -> np.ndarray:
    """Pictures that differ: uint8, (count, size, size, channels)."""
    place = np.indices((count, size, size, channels))
    return ((place[0] * 37 + place[1] * 29 + place[2] * 13 * (place[0] % 3) + place[3] * 50) % 256).astype(np.uint8)


def write_pictures(folder: Path, count: int = 3, size: int = 8) -> list[Path]:
    """Grey PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path, picture in zip(paths, stripes(count, size)[:, :, :, 0], strict=True):
        Image.fromarray(picture).save(path)
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
    """Every file below a folder, hidden ones left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
