"""Training batches, one per step: prefetched on the host, or indexed on the device if the whole dataset is there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ddim.errors import DdimError, warn
from ddim.names import Residency
from ddim.process import rng

MAX_FRACTION = 0.25  # largest fraction of a GPU's free memory that the dataset may take with "auto"
SLICE = 2048  # samples copied to the device at a time

Data = Tensor | np.ndarray | Dataset[Any] | DataLoader[Any] | Iterable[Any]
"""Training data of any shape.

- A tensor or array of samples, (N, ...), or a torch Dataset (any object with a length and items): the batches are drawn
  from a permutation per epoch, a function of the seed and the step, so that a resumed run is bit-exact.
- A DataLoader, or any other object that can be iterated again and again: each item is a batch, (B, ...), used in the
  object's own order. A resumed run starts a new pass over it.

If an item is a tuple or list, such as (image, label), its first entry is the sample or batch.
"""


def is_stream(data: Any) -> bool:
    """Whether training data are iterated batch by batch, not indexed sample by sample."""
    indexed = isinstance(data, Tensor | np.ndarray) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    return isinstance(data, DataLoader | IterableDataset) or not (indexed or callable(data))


def loader_of(
    data: Data | Callable[[np.ndarray], np.ndarray],
    count: int | None,
    batch: int,
    seed: int,
    labels: np.ndarray | None,
    device: torch.device,
    storage: Residency,
) -> BatchLoader | StreamLoader:
    """The loader of training data.

    Args:
        data: The data, or a function from indices (B,) to a batch.
        count: Number of samples, if `data` is a function.
        batch: Samples per step; a DataLoader or iterable has its own.
        seed: Seed of the data order.
        labels: int64, (count,), or None.
        device: Device of the batches.
        storage: Where the dataset is stored, see `ddim.model.config.TrainConfig`.

    Raises:
        DdimError: If the data are empty or of an unknown type, or the arguments do not fit together.
    """
    if is_stream(data):
        if not isinstance(data, Iterable):
            raise DdimError(
                "data", f"are {type(data).__name__}", "pass a tensor, a Dataset, a DataLoader or an iterable"
            )
        if labels is not None:
            raise DdimError("labels", "cannot be matched with batches of an iterable", "pass a tensor or a Dataset")
        return StreamLoader(data, device)
    samples = _Samples(data) if not callable(data) or isinstance(data, Dataset) else data
    number = len(samples) if isinstance(samples, _Samples) else count
    if not number:
        raise DdimError("data", "have no samples" if number == 0 else "are a function", "pass data, or their count")
    return BatchLoader(samples, number, batch, seed, labels, device, storage)


def first_entry(item: Any) -> Tensor:
    """The tensor of an item of a Dataset or DataLoader: the item itself, or its first entry.

    Raises:
        DdimError: If it is not a tensor, array or number.
    """
    value = item[0] if isinstance(item, tuple | list) and len(item) else item
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        hint = "return a tensor, or a tuple that starts with one"
        raise DdimError("data", f"have items of type {type(item).__name__}", hint) from None


class _Samples:
    """Function from indices to a batch, for a tensor, an array or a Dataset."""

    def __init__(self, data: Any):
        self.data = torch.from_numpy(data) if isinstance(data, np.ndarray) else data

    def __len__(self) -> int:
        return len(self.data)

    def __call__(self, indices: np.ndarray) -> Any:
        if isinstance(self.data, Tensor):
            return self.data[torch.from_numpy(indices)].detach().cpu()
        items = [first_entry(self.data[int(index)]) for index in indices]
        for item in items:
            if item.shape != items[0].shape:
                problem = f"have samples of shapes {tuple(items[0].shape)} and {tuple(item.shape)}"
                raise DdimError("data", problem, "use samples of one shape")
        return torch.stack(items)


class StreamLoader:
    """The batches of a DataLoader or of another object that can be iterated again.

    Args:
        data: The object.
        device: Device of the batches.
    """

    def __init__(self, data: Iterable[Any], device: torch.device):
        self.data, self.device = data, device

    def batches(self, step: int) -> Generator[tuple[Tensor, None]]:
        """An endless iterator over the batches on the device; every call starts a new pass over the data.

        Raises:
            DdimError: If a pass has no batch.

        Warns:
            DdimWarning: If `step` is not 0: which batches the steps before had is not known.
        """
        if step:
            warn(f"data: an iterable has no position; step {step + 1} starts a new pass over it")
        while True:
            batch = None
            for item in self.data:
                batch = first_entry(item)
                yield batch.to(self.device, non_blocking=True), None
            if batch is None:
                hint = "pass an object that can be iterated again, such as a DataLoader, not a generator"
                raise DdimError("data", "have no batch, or no second pass", hint)


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
        images: Callable[[np.ndarray], Any],
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
        return int(self.images(np.arange(1)).nbytes) * self.count <= MAX_FRACTION * free

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
