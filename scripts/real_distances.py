"""Measures distances between sets of real images in a bundled feature space, for docs/evaluation.md.

python scripts/real_distances.py ./mnist digits28
python scripts/real_distances.py ./fashion_mnist clothing28
"""

from __future__ import annotations

import sys

import numpy as np

from ddim import data, evaluation


def main(source: str, name: str) -> None:
    extractor = evaluation.load_extractor(name)
    train, test = (data.load(source, split=split) for split in ("train", "test"))
    mixed = evaluation.from_data(train)
    images = np.concatenate([*mixed.make(range(mixed.count))])
    halves = [evaluation.measure(images[k::2], extractor).moments for k in (0, 1)]
    whole, held_out = evaluation.measure(train, extractor).moments, evaluation.measure(test, extractor).moments
    print(f"one half and the other: {evaluation.frechet(*halves):.5f}")
    print(f"training and test set: {evaluation.frechet(whole, held_out):.5f}")
    print(f"a half and itself: {evaluation.frechet(halves[0], halves[0]):.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
