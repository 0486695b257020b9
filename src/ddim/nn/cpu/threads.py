"""State shared by calls of the kernels: reusable buffers, and the choice of the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """A pool of output tensors: after the first step nothing is allocated."""

    def __init__(self) -> None:
        self.free: dict[tuple[int, ...], list[Tensor]] = {}

    def acquire(self, *shape: int) -> Tensor:
        """A float32 tensor of a shape, with undefined contents."""
        free = self.free.get(shape)
        return free.pop() if free else torch.empty(shape)

    def release(self, *tensors: Tensor | None) -> None:
        """Return tensors to the pool; None is ignored."""
        for tensor in tensors:
            if tensor is not None:
                self.free.setdefault(tuple(tensor.shape), []).append(tensor)


class ThreadTuner:
    """Chooses the faster number of threads, all or one: both are timed at first, and again every `AGAIN` calls.

    On a machine with other load, threads that wait for each other are slower than a single one, and the load may change
    at any time.

    Args:
        most: The largest number of threads.
    """

    AGAIN = 40

    def __init__(self, most: int):
        self.seconds: dict[int, float | None] = {most: None, 1: None}
        self.nfe = 0

    def threads(self) -> int:
        """The number of threads for the next call."""
        self.nfe += 1
        timed = {number: seconds for number, seconds in self.seconds.items() if seconds is not None}
        if self.nfe <= 2 or len(timed) < len(self.seconds):  # the first two calls are not counted: caches are cold
            return [*self.seconds][self.nfe % len(self.seconds)]
        best = min(timed, key=lambda number: timed[number])
        others = [number for number in timed if number != best]
        return others[0] if others and self.nfe % self.AGAIN == 0 else best

    def took(self, threads: int, seconds: float) -> None:
        """Record the time of a call: averaged half and half with the past for the faster number, else replacing it."""
        before = self.seconds[threads]
        if self.nfe > 2:
            fresh = before is None or before > min(value for value in self.seconds.values() if value is not None)
            self.seconds[threads] = seconds if fresh or before is None else (before + seconds) / 2
