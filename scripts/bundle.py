"""Put a trained model into the package: `python scripts/bundle.py runs/mnist mnist`.

Weights are stored in bfloat16, in which the network runs where the processor is fast at it; at most 8 MB.
"""

import sys
from pathlib import Path

import torch

import ddim

LIMIT = 8_000_000


def main(run: str, name: str) -> None:
    folder = Path(ddim.__file__).parent / "weights" / name
    model = ddim.load(run, "cpu")
    if any(word.startswith(("/", "~")) for word in model.config.provenance.command.split()):
        raise SystemExit(f"error: {run}: its command holds a path of this machine; train with relative paths")
    model.save(folder, torch.bfloat16)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LIMIT:
        raise SystemExit(f"error: {folder}: is {size} bytes, more than {LIMIT}; train a smaller network")
    print(f"{folder}: {size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
