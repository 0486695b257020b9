"""What calls of the kernels share: buffers, and what was learned of the machine."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Tensors to write into, used again once they are given back: a step allocates nothing after the first."""

    def __init__(self) -> None:
        self.free: dict[tuple[int, ...], list[Tensor]] = {}

    def take(self, *shape: int) -> Tensor:
        """One of that shape, float32; it holds whatever it held."""
        free = self.free.get(shape)
        return free.pop() if free else torch.empty(shape)

    def give(self, *tensors: Tensor | None) -> None:
        """Tensors that are not needed any more."""
        for tensor in tensors:
            if tensor is not None:
                self.free.setdefault(tuple(tensor.shape), []).append(tensor)


class Pace:
    """Which number of threads is the fastest, all or one: tried in the first calls, and now and then again.

    On a machine that is busy with other things, threads that wait for each other are slower than one alone.
    """

    AGAIN = 100

    def __init__(self, most: int):
        self.times: dict[int, list[float]] = {most: [], 1: []}
        self.calls = 0

    def threads(self) -> int:
        """How many the next call should use."""
        self.calls += 1
        if self.calls % self.AGAIN == 0:
            for times in self.times.values():
                times.clear()
        few = [number for number, times in self.times.items() if len(times) < 2]
        return few[0] if few else min(self.times, key=lambda number: min(self.times[number]))

    def took(self, threads: int, seconds: float) -> None:
        """How long a call took."""
        if threads in self.times:
            self.times[threads].append(seconds)
