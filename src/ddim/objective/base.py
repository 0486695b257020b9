"""The interface of training objectives, for every modality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ddim.objective.timestep_sampling import TimestepSampler
from ddim.process.schedule import Schedule


class Loss(Protocol):
    """A training loss: `ddim.objective.Objective` for real-valued data, `ddim.objective.CrossEntropy` for discrete."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""

    @property
    def times(self) -> TimestepSampler:
        """The sampler of training timesteps, with the loss weight of each."""

    def draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The random numbers that `error` needs to noise x0, (B, ...)."""

    def error(self, network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The error of each sample, float32, (B,)."""

    def eps_mse(self, error: Tensor, t: Tensor) -> Tensor:
        """The error of each sample in the unit of the error table, (B,)."""
