"""Sampling of training timesteps, and the loss weight of each timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.names import TimestepDraw
from ddim.process import rng


@dataclass(frozen=True)
class TimestepSampler:
    """The distribution of training timesteps in 1..T and their loss weights.

    Args:
        weights: The weight of the error at each timestep, (T,), >= 0.
        drawn: See `TimestepDraw`.
    """

    weights: Tensor
    drawn: TimestepDraw = "uniform"

    def draw(self, batch: int, generator: torch.Generator, antithetic: bool = True) -> Tensor:
        """The timesteps of a batch: int64, (batch,), in 1..T.

        Args:
            batch: The number of timesteps.
            generator: A generator on the device of the weights.
            antithetic: Whether to draw antithetic pairs: t and T + 1 - t, or for importance sampling the timesteps of u
                and 1 - u, where u is uniform and t the inverse of the distribution function at u.
        """
        device, T = generator.device, len(self.weights)
        half = (batch + 1) // 2 if antithetic else batch
        if self.drawn == "uniform":
            t = torch.randint(1, T + 1, (half,), generator=generator, device=device)
            return torch.cat([t, T + 1 - t])[:batch] if antithetic else t
        u = torch.rand(half, generator=generator, device=device)
        u = torch.cat([u, 1 - u])[:batch] if antithetic else u
        return rng.sample_categorical(u, self.weights) + 1

    def apply_weight(self, error: Tensor, t: Tensor) -> Tensor:
        """The loss of samples with the given error (B,) at timesteps t (B,) from `draw`."""
        return self.weights[t - 1] * error if self.drawn == "uniform" else error
