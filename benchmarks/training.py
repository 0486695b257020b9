"""Training images per second against the inner loop of diffusers' `train_unconditional`, the same network.

`python -m benchmarks.training`
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.measuring import by_turns, write
from ddim.model.config import TrainConfig
from ddim.objective.mse import Objective
from ddim.train.trainer import Trainer


def main(names: tuple[str, ...] = ("cifar10", "mnist"), batch: int = 16, runs: int = 5) -> None:
    """Measure and write results/training.json."""
    rows = []
    for name in names:
        config, network = peers.NETWORKS[name]()
        c = config.network
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4 * batch, c.in_channels, c.height, c.width, generator=generator).clamp(-1, 1)
        jobs: dict[str, Any] = {"ours": _ours(network, config, images, batch)}
        jobs["diffusers"] = _diffusers(config, network, images, batch)
        times = by_turns(jobs, runs)
        row = {"network": name, "batch": batch, **{f"{job} (images/s)": batch / s for job, s in times.items()}}
        rows.append({**row, "ratio": times["diffusers"] / times["ours"]})
    write(
        "training",
        rows,
        "images per second of whole steps: noise, network, backward, clipped gradient, AdamW; ours "
        "with its EMA and error table, diffusers' in float32 as in the script's default without EMA",
    )


def _ours(network: torch.nn.Module, config: Any, images: torch.Tensor, batch: int) -> Any:
    recipe = TrainConfig(steps=1000, batch=batch, warmup=10, flip=False)
    objective = Objective(config.schedule.build(), config.predicts, "simple", torch.device("cpu"))
    trainer = Trainer(
        network,
        objective,
        lambda index: images[torch.from_numpy(index)].numpy(),
        len(images),
        recipe,
        read=lambda batch: batch,
    )
    steps = trainer.updates()
    return lambda: next(steps)


def _diffusers(config: Any, network: torch.nn.Module, images: torch.Tensor, batch: int) -> Any:
    """The loop of the script: add_noise, the network, mse_loss, clip_grad_norm_, AdamW."""
    unet: UNet2DModel = peers.diffusers(config, network).unet.train()
    scheduler = DDPMScheduler(prediction_type={"eps": "epsilon", "v": "v_prediction"}[config.predicts])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        clean = images[torch.randint(len(images), (batch,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(0, 1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, times)
        output = unet(noisy, times).sample
        target = noise if config.predicts == "eps" else scheduler.get_velocity(clean, noise, times)
        loss = F.mse_loss(output.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
