"""The distances of real pictures from each other in a bundled feature space: for docs/evaluation.md.

python scripts/real_distances.py ./mnist digits28
python scripts/real_distances.py ./fashion_mnist clothing28
"""

from __future__ import annotations

import sys

import numpy as np

from ddim import data, evaluation


def main(source: str, name: str) -> None:
    space = evaluation.load_extractor(name)
    train, test = (data.load(source, split=split) for split in ("train", "test"))
    mixed = evaluation.from_data(train)
    pictures = np.concatenate([*mixed.make(range(mixed.count))])
    halves = [evaluation.measure(pictures[k::2], space).moments for k in (0, 1)]
    whole, held_out = evaluation.measure(train, space).moments, evaluation.measure(test, space).moments
    print(f"one half against the other: {evaluation.frechet(*halves):.5f}")
    print(f"training against test set: {evaluation.frechet(whole, held_out):.5f}")
    print(f"a half against itself: {evaluation.frechet(halves[0], halves[0]):.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
