"""What calls of the kernels share: buffers, and what was learned of the machine."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Tensors to write into, used again once they are given back: a step allocates nothing after the first."""

    def __init__(self) -> None:
        self.free: dict[tuple[int, ...], list[Tensor]] = {}

    def acquire(self, *shape: int) -> Tensor:
        """One of that shape, float32; it holds whatever it held."""
        free = self.free.get(shape)
        return free.pop() if free else torch.empty(shape)

    def release(self, *tensors: Tensor | None) -> None:
        """Tensors that are not needed any more."""
        for tensor in tensors:
            if tensor is not None:
                self.free.setdefault(tuple(tensor.shape), []).append(tensor)


class ThreadTuner:
    """Which number of threads is the fastest, all or one: both are tried at first, and now and then again.

    On a machine that is busy with other things, threads that wait for each other are slower than one alone, and that
    may begin and end at any time.
    """

    AGAIN = 40

    def __init__(self, most: int):
        self.seconds: dict[int, float | None] = {most: None, 1: None}
        self.calls = 0

    def threads(self) -> int:
        """How many the next call should use."""
        self.calls += 1
        known = {number: seconds for number, seconds in self.seconds.items() if seconds is not None}
        if self.calls <= 2 or len(known) < len(self.seconds):  # of the first calls neither counts: caches are cold
            return [*self.seconds][self.calls % len(self.seconds)]
        best = min(known, key=lambda number: known[number])
        others = [number for number in known if number != best]
        return others[0] if others and self.calls % self.AGAIN == 0 else best

    def took(self, threads: int, seconds: float) -> None:
        """How long a call took; of those in use the newest counts for half, of the others it counts alone."""
        before = self.seconds[threads]
        if self.calls > 2:
            fresh = before is None or before > min(value for value in self.seconds.values() if value is not None)
            self.seconds[threads] = seconds if fresh or before is None else (before + seconds) / 2
