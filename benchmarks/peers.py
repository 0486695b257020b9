"""The same networks with the same weights, as models of this library and of diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

import ddim
from ddim.data.policy import ImagePolicy
from ddim.interop.diffusers_export import describe, scheduler_config
from ddim.model.config import ModelConfig, ScheduleConfig
from ddim.model.importers.diffusers import NAMES
from ddim.model.importers.state_dict import from_native
from ddim.model.model import Model
from ddim.nn.cpu.units import units_of
from ddim.nn.unet import UNetConfig


def fast_dtype(device: str) -> torch.dtype:
    """The dtype in which torch's own operators sample fastest: bfloat16 where the device has matrix units for it."""
    return torch.bfloat16 if units_of(device).matrix else torch.float32


def trailing(model: Model, steps: int) -> Any:
    """A plan of `steps` timesteps evenly spaced from T down, without clipping, like the pipeline's."""
    T = model.schedule.T
    return model.plan(grid=sorted({round(T - k * T / steps) for k in range(steps)}), clip_x0=False)


class Pipeline(DDIMPipeline):
    """DDIMPipeline without its progress bar."""

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler):
        super().__init__(unet, scheduler)
        self.set_progress_bar_config(disable=True)


def cifar10(**shape: Any) -> tuple[ModelConfig, torch.nn.Module]:
    """The 35.7 M-parameter network of Ho et al. with random weights, or one with other settings."""
    unet = UNetConfig(**shape)
    config = ModelConfig(
        network=unet,
        data=ImagePolicy(height=unet.height, width=unet.width, channels=unet.in_channels),
        schedule=ScheduleConfig(name="linear"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = config.network.build()
        for parameter in network.parameters():  # the layers that start at zero
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return config, network.eval()


def mnist() -> tuple[ModelConfig, torch.nn.Module]:
    """The bundled `mnist` network on its patches of 2x2 pixels, which a UNet2DModel can represent."""
    model = ddim.load("mnist", "cpu", dtype="float32")
    shape = {"in_channels": 4, "height": 14, "width": 14, "patch": 1}
    network = UNetConfig(**{**model.config.network.model_dump(), **shape})
    policy = ImagePolicy.model_construct(height=14, width=14, channels=4)
    config = model.config.model_copy(update={"network": network, "data": policy, "sha256": "", "error": None})
    built = network.build()
    built.load_state_dict(model.network.state_dict())
    return config, built.eval()


NETWORKS = {"cifar10": cifar10, "mnist": mnist}


def ours(config: ModelConfig, network: torch.nn.Module, device: str = "cpu", **settings: Any) -> Model:
    """The model of this library."""
    return Model(copy.deepcopy(network), config, device=device, **settings)  # type: ignore[arg-type]


def diffusers(
    config: ModelConfig, network: torch.nn.Module, best: bool = False, device: str = "cpu", **compiling: Any
) -> Pipeline:
    """Diffusers' pipeline: as in its documentation, or in the fastest setting it documents."""
    settings = {key: value for key, value in describe(config, Path("benchmark")).items() if not key.startswith("_")}
    unet = UNet2DModel(**settings).eval()
    unet.load_state_dict(from_native(network.state_dict(), config.network, NAMES))
    unet = unet.to(device)
    scheduler = DDIMScheduler(**{k: v for k, v in scheduler_config(config).items() if not k.startswith("_")})
    if best:
        unet = unet.to(memory_format=torch.channels_last, dtype=fast_dtype(device))
        unet = torch.compile(unet, **compiling)
    return Pipeline(unet, scheduler)


def draw(pipeline: Pipeline, n: int, steps: int) -> Tensor:
    """Sample images from a pipeline, in [0, 1]."""
    generator = torch.Generator(pipeline.unet.device).manual_seed(0)
    return pipeline(n, generator, num_inference_steps=steps, output_type="pt").images


def shown(images: Tensor) -> Tensor:
    """Images from patches of 2x2 pixels; other images unchanged."""
    return F.pixel_shuffle(images, 2) if images.shape[1] == 4 else images
