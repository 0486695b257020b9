"""Adds a trained model to the package: `python scripts/bundle.py runs/mnist mnist`.

Weights are stored in bfloat16, at most 12 MB of them. A larger model, of at most 64 MB, goes into the folder
`models` of the checkout, which is not part of the package:
`python scripts/bundle.py runs/cifar10 cifar10 --beside`.
"""

import sys
from pathlib import Path

import torch

import ddim

LIMITS = {"weights": 12_000_000, "models": 64_000_000}


def main(run: str, name: str, beside: str = "") -> None:
    package = Path(ddim.__file__).parent
    folder = (package.parents[1] / "models" if beside == "--beside" else package / "weights") / name
    model = ddim.load(run, "cpu")
    if any(word.startswith(("/", "~")) for word in model.config.provenance.command.split()):
        raise SystemExit(f"error: {run}: its command has an absolute path; train with relative paths")
    model.save(folder, torch.bfloat16)
    size = sum(path.stat().st_size for path in folder.iterdir())
    limit = LIMITS[folder.parent.name]
    if size > limit:
        raise SystemExit(f"error: {folder}: has {size} bytes, more than {limit}; train a smaller network")
    print(f"{folder}: {size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
