"""What every training objective offers, whatever the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ddim.objective.timestep_sampling import TimestepSampler
from ddim.process.schedule import Schedule


class Loss(Protocol):
    """What a network is trained on: `ddim.objective.Objective` for real-valued data, `ddim.objective.CrossEntropy`."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""

    @property
    def times(self) -> TimestepSampler:
        """The training times: how they are drawn, and what an error at each counts for."""

    def draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The randomness that noises x0, (B, ...)."""

    def error(self, network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The error of each sample, float32, (B,)."""

    def eps_mse(self, error: Tensor, t: Tensor) -> Tensor:
        """What the table of errors holds of each sample, (B,)."""
