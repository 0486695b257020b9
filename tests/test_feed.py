"""The batches of a training are the same wherever the data lie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ddim.process import rng
from ddim.train.batches import SLICE, BatchLoader
from models import COUNT, stripes

LABELS = np.arange(COUNT) % 3


def feed(place: str, batch: int = 7, labels: bool = True) -> BatchLoader:
    pictures = stripes(COUNT)
    return BatchLoader(lambda indices: pictures[indices], COUNT, batch, 5, LABELS if labels else None, "cpu", place)


@pytest.mark.parametrize("batch", [1, 7, 20, 45])
def test_on_the_device_and_on_the_host_the_batches_are_the_same(batch: int) -> None:
    host, device = (feed(place, batch).batches(2) for place in ("host", "device"))
    for step, one, other in zip(range(2, 9), host, device):
        order = feed("host", batch).indices(step)
        assert torch.equal(one[0], torch.from_numpy(stripes(COUNT)[order]))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], torch.from_numpy(LABELS[order]))
        assert torch.equal(one[1], other[1])
    host.close()


def test_without_labels_there_are_none() -> None:
    for place in ("host", "device"):
        batches = feed(place, labels=False).batches(0)
        assert next(batches)[1] is None
        batches.close()


def test_held_on_the_device_the_data_are_read_once() -> None:
    count, asked = 2 * SLICE + 3, []

    def pictures(indices: np.ndarray) -> np.ndarray:
        asked.append(indices)
        return indices.astype(np.int64)[:, None]

    held = BatchLoader(pictures, count, 64, 0, place="device")
    read = np.concatenate(asked[1:])
    assert (read == np.arange(count)).all()
    before = len(asked)
    for _, (batch, _) in zip(range(200), held.batches(0)):
        assert len(batch) == 64
    assert len(asked) == before


def test_unasked_data_stay_on_the_host_of_a_cpu() -> None:
    assert feed("auto").held is None


def test_the_order_is_that_of_the_seed() -> None:
    order = np.concatenate([feed("host").indices(step) for step in range(6)])
    assert (order[:COUNT] == rng.permutation(5, 0, COUNT)).all()
    assert (order[COUNT : 2 * COUNT] == rng.permutation(5, 1, COUNT)).all()
    assert any((one != other).any() for one, other in itertools.pairwise([order[:COUNT], order[COUNT : 2 * COUNT]]))


def test_what_cannot_be_read_is_said_by_the_step_that_needs_it() -> None:
    def pictures(indices: np.ndarray) -> np.ndarray:
        if 3 in indices:
            raise OSError("gone")
        return stripes(COUNT)[indices]

    some = BatchLoader(pictures, COUNT, 4, 5)
    bad = next(step for step in range(5) if 3 in some.indices(step))
    batches = some.batches(0)
    for _ in range(bad):
        next(batches)
    with pytest.raises(OSError, match="gone"):
        next(batches)
