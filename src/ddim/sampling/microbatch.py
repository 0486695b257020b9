"""Running a plan in blocks of one fixed size, so that a sample's bits do not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddim._io.arguments import whole
from ddim._io.limits import MICRO_BATCH, check_samples
from ddim.errors import DdimError
from ddim.plan.base import BasePlan
from ddim.plan.plan import Plan
from ddim.process.parameterization import AnyDenoiser, Denoiser
from ddim.process.rng import Noise
from ddim.sampling.loop import run

Label = int | Literal["each"] | None
"""One label for all samples, the labels in turn, or none."""


def size_of(given: int | None, device: torch.device | None) -> int:
    """Samples in a block: as given, else 8 on a CPU and 64 on a GPU.

    Raises:
        DdimError: If it is less than 1, or more than `ddim._io.limits.MICRO_BATCH`: the last part is filled up to it.
    """
    if given is None:
        return 8 if device is None or device.type == "cpu" else 64
    return whole(given, "micro-batch", 1, MICRO_BATCH)


def labels_of(label: Label, indices: Sequence[int], classes: int) -> list[int] | None:
    """The labels of listed samples: one for all, or for "each" the labels in turn, index i having i mod classes.

    Args:
        label: See `Label`.
        indices: The samples' indices, (N,).
        classes: How many labels the network knows.

    Raises:
        DdimError: If there are none to take turns.
    """
    if label == "each":
        if not classes:
            raise DdimError("label each", "this model was trained without labels", "leave it out")
        return [index % classes for index in indices]
    return None if label is None else [label] * len(indices)


def one_each(labels: Any, n: int) -> list[int] | None:
    """The labels of n samples, where one for all, or one for each, or none is given.

    Raises:
        DdimError: If they are no whole numbers, or not as many.
    """
    if labels is None:
        return None
    given = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [whole(given, "label")] * n
    if len(given) != n:
        raise DdimError("labels", f"are {len(given)} for {n} samples", "give one, or one each")
    return [whole(label, "label") for label in given]


def check_request(n: int, plan: Any, others: Any) -> None:
    """Refuse a number of samples, or a plan, that makes no sense.

    Raises:
        DdimError: If n is no whole number, out of range, or a plan is given beside what a plan holds.
    """
    check_samples(whole(n, "n", 0))
    if plan is not None and others:
        raise DdimError("plan", "is given beside steps or settings", "give one or the other")


def sample_blocks(
    denoiser: Callable[[Tensor | None], AnyDenoiser],
    plan: BasePlan[Any],
    noise: Callable[[Sequence[int]], Noise],
    indices: Sequence[int],
    size: int,
    labels: Sequence[int] | None = None,
    origin: Tensor | None = None,
    padded: bool = True,
    through: Callable[[AnyDenoiser, BasePlan[Any], Tensor, Noise], Tensor] = run,
) -> Iterator[Tensor]:
    """Sample the listed indices in blocks of one size; the last one is filled up with copies that are dropped.

    Args:
        denoiser: Makes the denoiser of a block from its labels, int64 (size,), or None.
        plan: What to run.
        noise: Makes the randomness of listed samples.
        indices: The samples' indices, (N,).
        size: Samples in a block.
        labels: One for each index, or None.
        origin: x_0 to start from, partly noised, instead of pure noise: (1, ...) for all or (N, ...).
        padded: Whether the last block is filled up; where bits do not depend on a block's size it need not be.
        through: What runs a plan, see `ddim.loop.run`, or replays a recorded run, see `ddim.model.cuda_graphs`.

    Yields:
        (up to size, ...), in the order of `indices`.
    """
    plain = denoiser(None) if labels is None else None
    for first in range(0, len(indices), size):
        some = range(first, min(first + size, len(indices)))
        places = [*some, *[some[-1]] * (size - len(some) if padded else 0)]
        drawn = noise([indices[place] for place in places])
        denoise = plain or denoiser(torch.tensor([labels[place] for place in places] if labels is not None else []))
        start = drawn.start()
        if origin is not None:
            own = origin if len(origin) == 1 else origin[places]
            start = own.to(start) * plan.start.signal + start * plan.start.noise
        yield through(denoise, plan, start, drawn)[: len(some)]


def run_blocks(
    denoise: Denoiser, plan: Plan, states: Tensor, size: int, earlier: Sequence[Tensor] = (), padded: bool = True
) -> Iterator[Tensor]:
    """Run a noiseless plan from given states in blocks of one size; the last one is filled up with copies.

    Args:
        denoise: The denoiser.
        plan: What to run.
        states: The first states, (N, ...).
        size: Samples in a block.
        earlier: States older than the first, (N, ...) each, one for each level of `plan.before`.
        padded: As for `sample_blocks`.

    Yields:
        (up to size, ...).
    """

    def through(first: Tensor, *older: Tensor) -> tuple[Tensor, ...]:
        return (run(denoise, plan, first, earlier=older),)

    for (made,) in in_blocks(through, (states, *earlier), size, padded):
        yield made


def in_blocks(
    function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], size: int, padded: bool = True
) -> Iterator[tuple[Tensor, ...]]:
    """Apply a function to tensors, (N, ...) each, in blocks of one size; the last one is filled up with copies.

    Args:
        function: From tensors (size, ...), one for each of `tensors`, to tensors (size, ...).
        tensors: What it is applied to.
        size: Samples in a block.
        padded: As for `sample_blocks`.

    Yields:
        What it returns, (up to size, ...) each, the copies dropped.
    """
    if not len(tensors[0]):
        return
    for parts in zip(*(torch.split(tensor, size) for tensor in tensors), strict=True):
        missing = size - len(parts[0]) if padded else 0
        full = [torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part for part in parts]
        yield tuple(made[: len(parts[0])] for made in function(*full))
