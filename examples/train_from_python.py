"""Train a network of your own on data of any shape, here points on a circle, with `Trainer` and with `ddim.fit`."""

import sys
import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ddim
from ddim.model.config import TrainConfig
from ddim.objective.mse import Objective
from ddim.train.trainer import Trainer


class Net(nn.Module):
    """x (B, 2) and the time (B,), int64 in 0..T - 1, to an output of the shape of x."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        u = time[:, None] / 1000
        x = torch.cat([x, u, u.sqrt()], dim=1)
        for layer in self.hidden:
            x = nn.functional.silu(layer(x))
        return self.out(x)


def main(steps: int = 1000) -> tuple[Tensor, Tensor]:
    angles = 6.2832 * torch.rand(4096, 1, generator=torch.Generator().manual_seed(0))
    points = torch.cat([angles.cos(), angles.sin()], dim=1)

    # The parts: a loader, an objective, a trainer, and the trained network wrapped for sampling.
    loader = DataLoader(TensorDataset(points), batch_size=256, shuffle=True)
    schedule = ddim.schedule.linear()
    recipe = TrainConfig(steps=steps, lr=3e-3, warmup=20, decay="cosine", ema=0.98, precision="float32")
    trainer = Trainer(Net(), Objective(schedule, "v", "v"), loader, recipe=recipe)
    for update in trainer.updates():
        if update.step % 250 == 0:
            print(f"step {update.step}: loss {float(update.loss):.3f}")
    model = ddim.wrap(trainer.ema.module, schedule, predicts="v", shape=(2,))
    by_hand = model.sample(500, steps=20)

    # The same with checkpoints, logging and resuming, in a folder that ddim.load(folder, network=Net()) reads.
    with tempfile.TemporaryDirectory() as folder:
        mine = ddim.fit(points, Net(), out=f"{folder}/run", steps=steps, batch=256, lr=3e-3, log="none")
    return by_hand, mine.sample(500, steps=20)


if __name__ == "__main__":
    for samples in main(*(int(word) for word in sys.argv[1:])):
        radius = samples.norm(dim=1)
        print(f"radius of 500 samples: {radius.mean():.2f} +- {radius.std():.2f}")
