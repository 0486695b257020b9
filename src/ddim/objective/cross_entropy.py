"""The training objective of discrete data: the cross-entropy of p(x_0 | x_t), and its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.names import TimestepDraw
from ddim.nn.base import as_timed
from ddim.objective.timestep_sampling import TimestepSampler
from ddim.process.categorical import Alphabet, noised
from ddim.process.parameterization import log_probabilities
from ddim.process.schedule import Schedule

Weight = Literal["simple", "vlb"]


def token_weights(schedule: Schedule, weight: Weight) -> np.ndarray:
    """The weight of the cross-entropy at t = 1..T.

    - "simple": 1;
    - "vlb": T (abar_{t-1} - abar_t) / (1 - abar_t), T times its factor in eqs. (20) and (21) at the largest sigma. The
      mean over t then bounds the sum of the divergences; for a mask with `carry_over` it equals that sum.

    Raises:
        DdimError: If the weight is unknown.
    """
    if weight not in ("simple", "vlb"):
        raise DdimError(f"loss weight {weight}", "is not for discrete data", "choose simple or vlb")
    if weight == "simple":
        return np.ones(schedule.T)
    levels = schedule.levels(range(schedule.T + 1))
    pairs = zip(levels[1:], levels, strict=False)
    return np.array([schedule.T * (next.alpha_bar - now.alpha_bar) / now.variance for now, next in pairs])


@dataclass(frozen=True)
class CrossEntropy:
    """The weighted cross-entropy -log p_theta(x_0 | x_t) on batches.

    Times to_x0 it is an upper bound on the divergence of eq. (21), see `ddim.categorical.kl`.

    Args:
        schedule: The schedule.
        alphabet: The categories.
        weight: See `token_weights`.
        device: The device of the batches.
        drawn: The distribution of training timesteps, see `ddim.objective.timestep_sampling`.

    Attributes:
        times: The sampler of training timesteps, with their weights.

    Raises:
        DdimError: See `token_weights`.
    """

    schedule: Schedule
    alphabet: Alphabet
    weight: Weight = "simple"
    device: torch.device | str = "cpu"
    drawn: TimestepDraw = "uniform"
    times: TimestepSampler = field(init=False, repr=False, compare=False)
    _keep: Tensor = field(init=False, repr=False, compare=False)
    _pi: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        columns = np.array([self.schedule.alpha_bar[1:], token_weights(self.schedule, self.weight)])
        keep, weights = torch.tensor(columns, dtype=torch.float32, device=self.device).unbind()
        object.__setattr__(self, "_keep", keep)
        object.__setattr__(self, "times", TimestepSampler(weights, self.drawn))
        object.__setattr__(self, "_pi", self.alphabet.pi.to(self.device))

    def draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The random numbers that noise ids x0 (B, ...): uniform on [0, 1), (B, ..., 2)."""
        return torch.rand((*x0.shape, 2), generator=generator, device=x0.device)

    def error(self, network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """-log p_theta(x_0 | x_t), averaged over tokens, in nats, with x_t sampled from eq. (17).

        Args:
            network: Called as network(x_t, t - 1), with x_t (B, ...) and int64 times in 0..T - 1 (B,); a bundled
                network is passed t. Returns logits, (B, ..., K).
            x0: Clean ids, int64, (B, ...).
            t: Timesteps, int64, (B,), in 1..T.
            noise: The output of `draw`.

        Returns:
            float32, (B,).
        """
        keep = self._keep[t - 1].view(-1, *[1] * (x0.ndim - 1))
        x = noised(x0, keep, noise, self._pi)
        log_p = log_probabilities(as_timed(network)(x, t), x, self.alphabet)
        return -log_p.gather(-1, x0[..., None]).flatten(1).mean(1)

    def eps_mse(self, error: Tensor, t: Tensor) -> Tensor:
        """The entry of the error table for each sample, (B,): the cross-entropy itself."""
        return error
