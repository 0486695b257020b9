"""Train a bundled feature extractor on a data set's labels: `src/ddim/extractors/NAME`.

    python scripts/train_extractor.py digits28 ./mnist
    python scripts/train_extractor.py clothing28 ./fashion_mnist
    python scripts/train_extractor.py colour32 ./cifar10 --epochs 12

The test accuracy is that of the weights as they are stored, and is written beside them with all that made it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ddim import data, seeds
from ddim.nn.classifier import Classifier, ClassifierConfig
from ddim.pixels import to_float
from ddim.tensors import write_tensors

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "digits28": ClassifierConfig(in_channels=1, side=28, widths=(24, 48, 64), classes=10),
    "clothing28": ClassifierConfig(in_channels=1, side=28, widths=(24, 48, 64), classes=10),
    "colour32": ClassifierConfig(in_channels=3, side=32, widths=(48, 96, 128), classes=10),
}


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored half of the time and shifted by up to 4 pixels, each picture by its own."""
    n, _, h, w = x.shape
    mirrored = torch.where((torch.rand(n, generator=generator) < 0.5)[:, None, None, None], x.flip(3), x)
    wide = F.pad(mirrored, (4, 4, 4, 4), mode="reflect")
    down = torch.randint(0, 9, (n,), generator=generator)[:, None] + torch.arange(h)
    right = torch.randint(0, 9, (n,), generator=generator)[:, None] + torch.arange(w)
    rows = wide[torch.arange(n)[:, None], :, down]  # (N, H, C, W + 8)
    return rows.gather(3, right[:, None, None, :].expand(n, h, rows.shape[2], w)).permute(0, 2, 1, 3)


def accuracy(network: Classifier, found: data.ImageSet) -> float:
    network.eval()
    right = 0
    with torch.no_grad():
        for first in range(0, len(found), 500):
            some = list(range(first, min(first + 500, len(found))))
            right += int((network(to_float(found.batch(some))).argmax(1) == torch.tensor(found.labels[some])).sum())
    return right / len(found)


def main(name: str, source: str, epochs: int, batch: int, lr: float, seed: int) -> None:
    shape = SHAPES[name]
    policy = data.ImagePolicy(height=shape.side, width=shape.side, channels=shape.in_channels, fit="exact")
    train, test = data.load(source, policy, "train"), data.load(source, policy, "test")
    with seeds.forked("cpu", seed):
        network = Classifier(shape).to(memory_format=torch.channels_last)
    generator = seeds.generator("cpu", seed)
    steps = epochs * (len(train) // batch)
    optimiser = torch.optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2)
    begun = time.monotonic()
    for epoch in range(epochs):
        network.train()
        order, total = seeds.permutation(seed, epoch, len(train)), 0.0
        for step in range(len(train) // batch):
            some = order[step * batch : (step + 1) * batch]
            x = to_float(train.batch(some))
            if shape.in_channels == 3:  # of digits and clothes a mirrored or shifted one would be another picture
                x = augmented(x, generator)
            loss = F.cross_entropy(network(x), torch.tensor(train.labels[some]), label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        told = f"epoch {epoch + 1}/{epochs}: loss {total / (step + 1):.4f}, test {accuracy(network, test):.4f}"
        print(f"{told}, {time.monotonic() - begun:.0f} s", flush=True)
    stored = {key: value.bfloat16() for key, value in network.state_dict().items() if value.is_floating_point()}
    network.load_state_dict({key: value.float() for key, value in stored.items()}, strict=False)
    folder = ROOT / "src" / "ddim" / "extractors" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", stored, {})
    about = {
        "name": name,
        "network": shape.model_dump(),
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "trained_on": {
            "data": train.name,
            "split": "train",
            "pictures": len(train),
            "fingerprint": train.fingerprint(),
        },
        "test_accuracy": accuracy(network, test),
        "recipe": {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed, "torch": torch.__version__},
    }
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{folder.relative_to(ROOT)}: test accuracy {about['test_accuracy']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.name, given.data, given.epochs, given.batch, given.lr, given.seed)
