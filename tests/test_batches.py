"""Training batches are the same wherever the data are stored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ddim.process import rng
from ddim.train.batches import SLICE, BatchLoader
from models import COUNT, stripes

LABELS = np.arange(COUNT) % 3


def loader(storage: str, batch: int = 7, labels: bool = True) -> BatchLoader:
    images = stripes(COUNT)
    return BatchLoader(lambda indices: images[indices], COUNT, batch, 5, LABELS if labels else None, "cpu", storage)


@pytest.mark.parametrize("batch", [1, 7, 20, 45])
def test_batches_are_the_same_on_the_device_and_on_the_host(batch: int) -> None:
    host, device = (loader(storage, batch).batches(2) for storage in ("host", "device"))
    for step, first, second in zip(range(2, 9), host, device):
        order = loader("host", batch).indices(step)
        assert torch.equal(first[0], torch.from_numpy(stripes(COUNT)[order]))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], torch.from_numpy(LABELS[order]))
        assert torch.equal(first[1], second[1])
    host.close()


def test_without_labels_batches_have_none() -> None:
    for storage in ("host", "device"):
        batches = loader(storage, labels=False).batches(0)
        assert next(batches)[1] is None
        batches.close()


def test_data_on_the_device_are_read_once() -> None:
    count, requests = 2 * SLICE + 3, []

    def images(indices: np.ndarray) -> np.ndarray:
        requests.append(indices)
        return indices.astype(np.int64)[:, None]

    on_device = BatchLoader(images, count, 64, 0, storage="device")
    read = np.concatenate(requests[1:])
    assert (read == np.arange(count)).all()
    before = len(requests)
    for _, (batch, _) in zip(range(200), on_device.batches(0)):
        assert len(batch) == 64
    assert len(requests) == before


def test_by_default_data_stay_on_the_host_for_a_cpu() -> None:
    assert loader("auto").resident is None


def test_the_order_is_the_permutation_of_the_seed() -> None:
    order = np.concatenate([loader("host").indices(step) for step in range(6)])
    assert (order[:COUNT] == rng.permutation(5, 0, COUNT)).all()
    assert (order[COUNT : 2 * COUNT] == rng.permutation(5, 1, COUNT)).all()
    assert any(
        (first != second).any() for first, second in itertools.pairwise([order[:COUNT], order[COUNT : 2 * COUNT]])
    )


def test_a_read_error_is_raised_by_the_step_that_needs_the_sample() -> None:
    def images(indices: np.ndarray) -> np.ndarray:
        if 3 in indices:
            raise OSError("gone")
        return stripes(COUNT)[indices]

    batch_loader = BatchLoader(images, COUNT, 4, 5)
    failing = next(step for step in range(5) if 3 in batch_loader.indices(step))
    batches = batch_loader.batches(0)
    for _ in range(failing):
        next(batches)
    with pytest.raises(OSError, match="gone"):
        next(batches)
