"""Trains a bundled feature extractor on the labels of a dataset: `src/ddim/extractors/NAME`.

    python scripts/train_extractor.py digits28 ./mnist
    python scripts/train_extractor.py clothing28 ./fashion_mnist
    python scripts/train_extractor.py colour32 ./cifar10 --epochs 14 --batch 512 --lr 0.5

The test accuracy of the stored weights is written next to them, with the settings of the training. The same command
resumes an interrupted training after its last complete epoch (runs/extractor-NAME.pt, removed at the end).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddim import data
from ddim._io.atomic import make_folder, write_atomic
from ddim._io.safetensors import write_tensors
from ddim.data.pixels import to_float
from ddim.nn.classifier import Classifier, ClassifierConfig, ResNet, ResNetConfig
from ddim.process import rng

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, ClassifierConfig | ResNetConfig] = {
    "digits28": ClassifierConfig(in_channels=1, side=28, widths=(24, 48, 64), classes=10),
    "clothing28": ClassifierConfig(in_channels=1, side=28, widths=(24, 48, 64), classes=10),
    "colour32": ResNetConfig(in_channels=3, side=32, widths=(64, 128, 256), classes=10),
}
MOST = 2  # largest shift of a colour image in pixels


def augmented(x: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror the selected images, and shift each by a random offset of up to `MOST` pixels."""
    n, _, h, w = x.shape
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    wide = F.pad(x, (MOST,) * 4, mode="reflect")
    down, right = (torch.randint(0, 2 * MOST + 1, (2, n, 1), generator=generator) + torch.arange(max(h, w))).unbind()
    rows = wide[torch.arange(n)[:, None], :, down[:, :h]]  # (N, H, C, W + 2 MOST)
    return rows.gather(3, right[:, None, None, :w].expand(n, h, rows.shape[2], w)).permute(0, 2, 1, 3)


def batches(train: data.ImageSet, epoch: int, batch: int, seed: int, colour: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [-1, 1] and labels of an epoch. Colour images are augmented, and mirrored in every second epoch; digits
    and clothes are not, since that could change their class."""
    order, generator = rng.permutation(seed, epoch, len(train)), rng.generator("cpu", seed, epoch)
    first = torch.rand(len(train), generator=rng.generator("cpu", seed)) < 0.5
    for step in range(len(train) // batch):
        indices = order[step * batch : (step + 1) * batch]
        x = to_float(train.batch(indices))
        if colour:
            x = augmented(x, first[torch.from_numpy(indices)] ^ (epoch % 2 == 1), generator)
        yield x, torch.tensor(train.labels[indices])


def accuracy(network: Classifier | ResNet, dataset: data.ImageSet, device: str) -> float:
    network.eval()
    correct = 0
    with torch.no_grad():
        for first in range(0, len(dataset), 500):
            indices = list(range(first, min(first + 500, len(dataset))))
            predicted = network(to_float(dataset.batch(indices)).to(device)).argmax(1).cpu()
            correct += int((predicted == torch.tensor(dataset.labels[indices])).sum())
    return correct / len(dataset)


def trained(options: Any, train: data.ImageSet, test: data.ImageSet) -> Classifier | ResNet:
    shape, device = SHAPES[options.name], options.device
    with rng.temporary_seed("cpu", options.seed):
        network = shape.build()
    if isinstance(network, ResNet):
        network.whiten(to_float(train.batch(list(range(min(5000, len(train)))))))
    network = network.to(device, memory_format=torch.channels_last)
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(weights, options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = options.epochs * (len(train) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.lr, total_steps=steps, pct_start=0.2)
    state = ROOT / "runs" / f"extractor-{options.name}.pt"
    parts = {"network": network, "optimiser": optimiser, "schedule": schedule}
    done, spent = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done, spent = saved["epochs"], saved["seconds"]
    started = time.monotonic() - spent
    for epoch in range(done, options.epochs):
        network.train()
        total, logged = 0.0, time.monotonic()
        for step, (x, labels) in enumerate(
            batches(train, epoch, options.batch, options.seed, shape.in_channels == 3), 1
        ):
            with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                logits = network(x.to(device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=options.smoothing)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
            if time.monotonic() - logged > 20:
                logged = time.monotonic()
                print(f"  epoch {epoch + 1}, step {step}: loss {total / step:.4f}", flush=True)
        status = (
            f"epoch {epoch + 1}/{options.epochs}: loss {total / step:.4f}, test {accuracy(network, test, device):.4f}"
        )
        print(f"{status}, {time.monotonic() - started:.0f} s", flush=True)
        make_folder(state.parent)
        state_dicts = {name: part.state_dict() for name, part in parts.items()}
        part_file = state.with_suffix(".part")
        torch.save({**state_dicts, "epochs": epoch + 1, "seconds": time.monotonic() - started}, part_file)
        part_file.replace(state)
    return network


def main(options: Any) -> None:
    shape = SHAPES[options.name]
    policy = data.ImagePolicy(height=shape.side, width=shape.side, channels=shape.in_channels, fit="exact")
    train, test = data.load(options.data, policy, "train"), data.load(options.data, policy, "test")
    network = trained(options, train, test).cpu()
    stored = {key: value.bfloat16() for key, value in network.state_dict().items() if value.is_floating_point()}
    network.load_state_dict({key: value.float() for key, value in stored.items()}, strict=False)
    folder = make_folder(ROOT / "src" / "ddim" / "extractors" / options.name)
    write_tensors(folder / "model.safetensors", stored, {})
    recipe = {name: getattr(options, name) for name in ("epochs", "batch", "lr", "smoothing", "seed")}
    about = {
        "name": options.name,
        "network": shape.model_dump(),
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "trained_on": {
            "data": train.name,
            "split": "train",
            "pictures": len(train),
            "fingerprint": train.fingerprint(),
        },
        "test_accuracy": accuracy(network, test, "cpu"),
        "recipe": {**recipe, "device": options.device, "torch": torch.__version__},
    }
    write_atomic(folder / "config.json", (json.dumps(about, indent=1) + "\n").encode())
    (ROOT / "runs" / f"extractor-{options.name}.pt").unlink(missing_ok=True)
    print(f"{folder.relative_to(ROOT)}: test accuracy {about['test_accuracy']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
