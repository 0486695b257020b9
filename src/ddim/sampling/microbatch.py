"""Running a plan in micro-batches of one fixed size, so that a sample's bits do not depend on other samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddim._io.arguments import whole
from ddim._io.limits import MICRO_BATCH, check_samples
from ddim.errors import DdimError
from ddim.plan.base import BasePlan
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise
from ddim.sampling.loop import run

Label = int | Literal["each"] | None
"""One label for all samples, "each" for the labels in turn, or None."""


def size_of(micro_batch: int | None, device: torch.device | None, shape: Sequence[int] | None = None) -> int:
    """The micro-batch size: `micro_batch`, or by default the largest power of two that fits the limits below.

    | device | at least | at most | values in a larger micro-batch |
    |--------|----------|---------|--------------------------------|
    | CPU    | 8        | 1024    | 4096                           |
    | GPU    | 64       | 4096    | 32768                          |

    So it is 8 on a CPU from 512 values per sample on, 64 for 64 values, and 1024 for up to 4. It depends on nothing
    else, so that a sample's bits do not depend on the number of samples.

    Args:
        micro_batch: The size that was asked for, or None.
        device: The device of the network; a CPU if None.
        shape: Shape of one sample; None for the least size.

    Raises:
        DdimError: If it is less than 1, or more than `ddim._io.limits.MICRO_BATCH` (limited because the last
            micro-batch is padded to this size).
    """
    if micro_batch is None:
        least, most, values = (8, 1024, 4096) if device is None or device.type == "cpu" else (64, MICRO_BATCH, 32768)
        fitting = 0 if shape is None else values // max(math.prod(shape), 1)
        return min(max(least, 1 << fitting.bit_length() >> 1), most)
    return whole(micro_batch, "micro-batch", 1, MICRO_BATCH)


def labels_of(label: Label, indices: Sequence[int], classes: int) -> list[int] | None:
    """The labels of samples: the same for all, or with "each" label i mod classes for index i.

    Args:
        label: See `Label`.
        indices: The samples' indices, (N,).
        classes: Number of labels of the network.

    Raises:
        DdimError: If `label` is "each" and the network has no labels.
    """
    if label == "each":
        if not classes:
            raise DdimError("label each", "this model was trained without labels", "remove it")
        return [index % classes for index in indices]
    return None if label is None else [label] * len(indices)


def per_sample_labels(labels: Any, n: int) -> list[int] | None:
    """The labels of n samples, from one label for all, one label per sample, or None.

    Raises:
        DdimError: If they are not integers, or their number is not n.
    """
    if labels is None:
        return None
    values = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    if not isinstance(values, Sequence) or isinstance(values, str):
        return [whole(values, "label")] * n
    if len(values) != n:
        raise DdimError("labels", f"are {len(values)} for {n} samples", "pass one, or one per sample")
    return [whole(label, "label") for label in values]


def check_request(n: int, plan: Any, settings: Any) -> None:
    """Validate the number of samples, and that a plan is not combined with settings.

    Raises:
        DdimError: If n is not an integer or out of range, or a plan is passed together with sampling settings.
    """
    check_samples(whole(n, "n", 0))
    if plan is not None and settings:
        raise DdimError("plan", "is passed with steps or settings", "pass one or the other")


def sample_micro_batches(
    denoiser: Callable[[Tensor], AnyDenoiser],
    plan: BasePlan[Any],
    noise: Callable[[Sequence[int]], Noise],
    indices: Sequence[int],
    size: int,
    varies: bool = False,
    origin: Tensor | None = None,
    padded: bool = True,
    through: Callable[[AnyDenoiser, BasePlan[Any], Tensor, Noise], Tensor] = run,
) -> Iterator[Tensor]:
    """Draw samples in micro-batches of one size; the last one is padded with copies that are dropped.

    Args:
        denoiser: Creates the denoiser of a micro-batch from its positions in `indices`, int64, (size,).
        plan: The plan.
        noise: Creates the `Noise` of a list of indices.
        indices: The samples' indices, (N,).
        size: Samples per micro-batch.
        varies: Whether denoisers depend on the positions; if not, one is created for all micro-batches.
        origin: x_0 to start from, partly noised, instead of pure noise: (1, ...) for all or (N, ...).
        padded: Whether the last micro-batch is padded; not needed if bits do not depend on the micro-batch size.
        through: The function that runs a plan, such as `ddim.loop.run`, or replays a recorded run, see
            `ddim.model.cuda_graphs`.

    Yields:
        (up to size, ...), in the order of `indices`.
    """
    constant = None if varies else denoiser(torch.arange(0))
    for first in range(0, len(indices), size):
        batch = range(first, min(first + size, len(indices)))
        places = [*batch, *[batch[-1]] * (size - len(batch) if padded else 0)]
        batch_noise = noise([indices[place] for place in places])
        denoise = constant or denoiser(torch.tensor(places))
        start = batch_noise.start()
        if origin is not None:
            x0 = origin if len(origin) == 1 else origin[places]
            start = x0.to(start) * plan.start.signal + start * plan.start.noise
        yield through(denoise, plan, start, batch_noise)[: len(batch)]


def map_micro_batches(
    function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], size: int, padded: bool = True
) -> Iterator[tuple[Tensor, ...]]:
    """Apply a function to tensors, (N, ...) each, in micro-batches of one size; the last one is padded with copies.

    Args:
        function: Maps tensors (size, ...), one for each of `tensors`, to tensors (size, ...).
        tensors: The inputs.
        size: Samples per micro-batch.
        padded: Whether the last micro-batch is padded, see `sample_micro_batches`.

    Yields:
        The outputs of each micro-batch, (up to size, ...) each, without the copies.
    """
    if not len(tensors[0]):
        return
    for parts in zip(*(torch.split(tensor, size) for tensor in tensors), strict=True):
        missing = size - len(parts[0]) if padded else 0
        full = [torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part for part in parts]
        yield tuple(output[: len(parts[0])] for output in function(*full))
