"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


class EMA(Generic[Net]):
    """A second set of weights that follows the first: ema <- decay ema + (1 - decay) weights.

    The decay is warmed up as (1 + n) / (10 + n) after n updates, so that the first weights are soon forgotten.

    Args:
        module: The network to follow.
        decay: The final decay, in [0, 1).
    """

    def __init__(self, module: Net, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not in [0, 1)")
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def decay_at(self, updates: int) -> float:
        """The decay of an update; `updates` is how many came before it."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, module: Net, updates: int) -> None:
        """Move towards the network's weights; `updates` as for `decay_at`."""
        weight = 1 - self.decay_at(updates)
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)
