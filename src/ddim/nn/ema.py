"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


class EMA(Generic[Net]):
    """An exponential moving average of a network's weights: ema <- decay ema + (1 - decay) weights.

    The decay is warmed up as (1 + n) / (10 + n) after n updates, so that the initial weights are soon forgotten. With a
    half-life it is (n / (n + 1))^k instead: then the weights of update m have a weight proportional to m^(k - 1) for
    any length of the run (Karras et al. 2024, section 3.1), and k = ln 2 / -ln(1 - half_life) gives the last
    `half_life` of all updates half of the total weight.

    Args:
        module: The network to average.
        decay: The final decay, in [0, 1).
        half_life: A fraction of the updates so far, in (0, 1); None for a fixed final decay.
    """

    def __init__(self, module: Net, decay: float, half_life: float | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not in [0, 1)")
        if half_life is not None and not 0 < half_life < 1:
            raise ValueError(f"EMA half-life {half_life} is not in (0, 1)")
        self.decay = decay
        self.power = None if half_life is None else -math.log(2) / math.log1p(-half_life)
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def decay_at(self, updates: int) -> float:
        """The decay of an update; `updates` is the number of updates before it."""
        if self.power is not None:
            return float((updates / (updates + 1)) ** self.power)
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, module: Net, updates: int) -> None:
        """Update the average with the network's weights; `updates` is the number of updates before this one."""
        weight = 1 - self.decay_at(updates)
        for mine, new in zip(self.module.buffers(), module.buffers()):
            mine.copy_(new)  # such as the statistics of a batch norm
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)
