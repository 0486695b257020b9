"""The training objective L_gamma, whatever the network predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim.denoiser import Predicts, v_from_pair
from ddim.gaussian import diffuse
from ddim.schedule import Schedule

Gamma = Literal["simple", "v", "x0", "min-snr"]

# gamma_t and (d eps / d output)^2 as powers of (alpha_bar, 1 - alpha_bar): the sum of two exponents of 0 is exact
# where a product of an infinity and a zero would not be (zero terminal SNR).
_GAMMA = {"simple": (0, 0), "v": (-1, 0), "x0": (-1, 1), "min-snr": (0, 0)}
_OUTPUT = {"eps": (0, 0), "v": (1, 0), "x0": (1, -1)}


def weights(schedule: Schedule, predicts: Predicts, gamma: Gamma = "simple") -> np.ndarray:
    """The weight of the squared error of the network's own output that makes L_gamma.

    gamma_t is what eq. (5) calls it, the weight of the error in eps:

    - "simple": 1, the paper's training objective;
    - "v": 1 / alpha_bar, the plain error in v (Salimans & Ho 2022's SNR + 1 weighting of x_0);
    - "x0": (1 - alpha_bar) / alpha_bar, the plain error in x_0;
    - "min-snr": min(SNR, 5) / SNR (Hang et al. 2023).

    Args:
        schedule: The schedule.
        predicts: What the network predicts.
        gamma: The name of gamma.

    Returns:
        float64, (T,), for t = 1..T.
    """
    alpha_bar = schedule.alpha_bar[1:]
    variance = np.array([schedule.level(t).variance for t in range(1, schedule.T + 1)])
    p, q = (a + b for a, b in zip(_GAMMA[gamma], _OUTPUT[predicts], strict=True))
    with np.errstate(divide="ignore"):
        table = alpha_bar**p * variance**q
        if gamma == "min-snr":
            table = table * np.minimum(1.0, 5.0 * variance / alpha_bar)
    if not np.isfinite(table).all():
        raise ValueError(f"gamma {gamma!r} is infinite for a network that predicts {predicts} on {schedule.name}")
    return np.asarray(table)


@dataclass(frozen=True)
class Objective:
    """L_gamma on batches.

    Args:
        schedule: The schedule.
        predicts: What the network predicts.
        gamma: The name of gamma, see `weights`.
        device: Where the batches are.
    """

    schedule: Schedule
    predicts: Predicts
    gamma: Gamma = "simple"
    device: torch.device | str = "cpu"
    _table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        levels = [self.schedule.level(t) for t in range(1, self.schedule.T + 1)]
        columns = [
            [level.signal for level in levels],
            [level.noise for level in levels],
            weights(self.schedule, self.predicts, self.gamma),
        ]
        table = torch.tensor(np.array(columns), dtype=torch.float64).to(torch.float32).to(self.device)
        object.__setattr__(self, "_table", table)

    def loss(self, network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Eq. (5): gamma_t || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t) ||^2 per sample.

        The norm is a mean over dimensions; the mean over the batch's t stands for the sum over t.

        Args:
            network: (x_t (B, C, H, W), t (B,)) to its output, the shape of x_t.
            x0: Clean pictures, float32, (B, C, H, W).
            t: Whole times, int64, (B,), in 1..T.
            eps: Standard normal, the shape of x0.

        Returns:
            float32, (B,).
        """
        signal, noise, weight = self._table[:, t - 1].unbind()
        shape = (-1, *[1] * (x0.ndim - 1))
        level = _Batch(signal.view(shape), noise.view(shape))
        output = network(diffuse(x0, eps, level), t).float()
        target = {"eps": eps, "x0": x0}.get(self.predicts)
        error = output - (v_from_pair(x0, eps, level) if target is None else target)
        return weight.mul(error.square().flatten(1).mean(1))


class _Batch(NamedTuple):
    signal: Tensor
    noise: Tensor


def draw_times(batch: int, T: int, generator: torch.Generator, antithetic: bool = True) -> Tensor:
    """Training times, int64, (B,), uniform on 1..T; antithetic draws come in pairs t, T + 1 - t."""
    device = generator.device
    if not antithetic:
        return torch.randint(1, T + 1, (batch,), generator=generator, device=device)
    half = torch.randint(1, T + 1, ((batch + 1) // 2,), generator=generator, device=device)
    return torch.cat([half, T + 1 - half])[:batch]
