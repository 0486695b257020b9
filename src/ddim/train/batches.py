"""Training batches, one per step: prefetched on the host, or indexed on the device if the whole dataset is there."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.names import Residency
from ddim.process import rng

MAX_FRACTION = 0.25  # largest fraction of a GPU's free memory that the dataset may take with "auto"
SLICE = 2048  # samples copied to the device at a time


class BatchLoader:
    """Batch loader: each epoch is a permutation of the dataset, and batches may span two epochs.

    Args:
        images: Function from indices (B,) to a batch of the data, such as uint8 (B, H, W, C).
        count: Number of samples.
        batch: Samples per step.
        seed: Seed of the data order.
        labels: int64, (count,), or None.
        device: Device of the batches.
        storage: Where the dataset is stored, see `ddim.model.config.TrainConfig`.

    Raises:
        DdimError: If the dataset is to be stored on the device and does not fit.
    """

    def __init__(
        self,
        images: Callable[[np.ndarray], np.ndarray],
        count: int,
        batch: int,
        seed: int,
        labels: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        storage: Residency = "auto",
    ):
        self.images, self.count, self.size, self.seed = images, count, batch, seed
        self.device = torch.device(device)
        self.labels = None if labels is None else torch.from_numpy(labels)
        self._orders: dict[int, np.ndarray] = {}
        self.resident = self._load_all() if self._fits(storage) else None

    def _fits(self, storage: Residency) -> bool:
        if storage != "auto" or self.device.type != "cuda":
            return storage == "device"
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.images(np.arange(1)).nbytes * self.count <= MAX_FRACTION * free

    def _load_all(self) -> Tensor:
        """The whole dataset as one tensor on the device."""
        first = self.images(np.arange(1))
        try:
            data = torch.empty((self.count, *first.shape[1:]), dtype=torch.as_tensor(first).dtype, device=self.device)
        except torch.OutOfMemoryError:
            size = f"{self.count * first.nbytes / 2**20:.0f} MiB"
            raise DdimError("train.data_on", f"{size} do not fit on {self.device}", "use host") from None
        for start in range(0, self.count, SLICE):
            indices = np.arange(start, min(start + SLICE, self.count))
            data[start : start + len(indices)] = torch.as_tensor(self.images(indices)).to(self.device)
        self.labels = None if self.labels is None else self.labels.to(self.device)
        return data

    def indices(self, step: int) -> np.ndarray:
        """The sample indices of a step: int64, (batch,)."""
        positions = np.arange(step * self.size, (step + 1) * self.size)
        epochs = positions // self.count
        for finished in [epoch for epoch in self._orders if epoch < epochs[0]]:
            del self._orders[finished]
        parts = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            if epoch not in self._orders:
                self._orders[epoch] = rng.permutation(self.seed, epoch, self.count)
            parts.append(self._orders[epoch][(positions % self.count)[epochs == epoch]])
        return np.concatenate(parts)

    def batches(self, step: int) -> Generator[tuple[Tensor, Tensor | None]]:
        """An endless iterator over the data and labels of each step, starting at `step`; on the device."""
        if self.resident is not None:
            while True:
                yield self._gather(step)
                step += 1
        with ThreadPoolExecutor(1) as reader:
            pending: Future[tuple[Tensor, Tensor | None]] = reader.submit(self._read, step)
            while True:
                step += 1
                data, labels = pending.result()
                pending = reader.submit(self._read, step)
                yield self._to_device(data), None if labels is None else self._to_device(labels)

    def _gather(self, step: int) -> tuple[Tensor, Tensor | None]:
        assert self.resident is not None
        indices = self._to_device(torch.from_numpy(self.indices(step)))
        return self.resident[indices], None if self.labels is None else self.labels[indices]

    def _read(self, step: int) -> tuple[Tensor, Tensor | None]:
        indices = self.indices(step)
        labels = None if self.labels is None else self.labels[torch.from_numpy(indices)]
        return torch.as_tensor(self.images(indices)), labels

    def _to_device(self, data: Tensor) -> Tensor:
        """Copy to the device; from pinned memory the copy to a GPU is asynchronous."""
        if self.device.type == "cuda":
            return data.pin_memory().to(self.device, non_blocking=True)
        return data.to(self.device)
