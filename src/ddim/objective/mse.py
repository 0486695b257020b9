"""The training objective L_gamma for networks that predict eps, x_0 or v."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.names import LossWeight, Predicts, TimestepDraw
from ddim.nn.base import as_timed
from ddim.objective.elbo import x0_weights
from ddim.objective.timestep_sampling import TimestepSampler
from ddim.process.gaussian import diffuse, sigma
from ddim.process.parameterization import v_from_pair
from ddim.process.schedule import Schedule

# gamma_t and (d eps / d output)^2 as exponents of (alpha_bar, 1 - alpha_bar). The exponents are added, because at zero
# terminal SNR the product of the two factors can be infinity times 0.
_GAMMA = {"v": (-1, 0), "x0": (-1, 1), "p2": (0, 1), "theorem1": (-1, 1)}
_OUTPUT = {"eps": (0, 0), "v": (1, 0), "x0": (1, -1)}


def weights(schedule: Schedule, predicts: Predicts, gamma: LossWeight = "simple") -> np.ndarray:
    """The weights of the squared error of the network's output for which the loss is L_gamma.

    gamma_t is the weight of the error in eps, as in eq. (5); lambda is the log-SNR:

    - "simple": 1, the paper's training objective;
    - "v": 1 / alpha_bar, the unweighted error in v (the SNR + 1 weighting of x_0 of Salimans & Ho 2022);
    - "x0": (1 - alpha_bar) / alpha_bar, the unweighted error in x_0;
    - "min-snr": min(SNR, 5) / SNR (Hang et al. 2023);
    - "p2": 1 / (1 + SNR) (Choi et al. 2022, k = 1 and gamma = 1);
    - "vlb": (lambda_{t-1/2} - lambda_{t+1/2}) / 2, half the decrease of the log-SNR over one step, one-sided at 1 and
      T: the continuous-time bound, per step (Kingma et al. 2021; the likelihood weighting of Song et al. 2021);
    - "sigmoid": "vlb" times sigmoid(2 - lambda) (Kingma & Gao 2023, bias 2);
    - "theorem1": the gamma of Theorem 1 at the sigma of eta = 1 over all T steps, the bound J_sigma itself; sigma_1,
      which is 0 in eq. (16), is set to sigma_2 (as in the code of Ho et al. 2020).

    The last three scale with the step size. Adam-like optimisers are invariant to that, but gradient clipping by norm
    is not.

    Args:
        schedule: The schedule.
        predicts: What the network predicts.
        gamma: The name of gamma.

    Returns:
        float64, (T,), for t = 1..T.

    Raises:
        DdimError: If a weight is infinite, which can happen at zero terminal SNR.
    """
    p, q = (a + b for a, b in zip(_GAMMA.get(gamma, (0, 0)), _OUTPUT[predicts], strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        table = _powers(schedule, p, q)
        if gamma == "min-snr":
            table = table * np.minimum(1.0, 5.0 * _powers(schedule, -1, 1))
        elif gamma == "theorem1":
            table = table * _theorem1(schedule)
        elif gamma in ("vlb", "sigmoid"):
            table = table * _half_fall(schedule)
        if gamma == "sigmoid":
            table = table / (1.0 + np.exp(schedule.log_snr - 2.0))
    if not np.isfinite(table).all():
        problem = f"is infinite for a network that predicts {predicts} on {schedule.name}"
        raise DdimError(f"loss weight {gamma}", problem, "choose another weight or schedule")
    return np.asarray(table)


def _powers(schedule: Schedule, p: int, q: int) -> np.ndarray:
    """alpha_bar^p (1 - alpha_bar)^q at t = 1..T."""
    variance = np.array([schedule.level(t).variance for t in range(1, schedule.T + 1)])
    return np.asarray(schedule.alpha_bar[1:] ** p * variance**q)


def _half_fall(schedule: Schedule) -> np.ndarray:
    """-1/2 d lambda / dt at t = 1..T by central differences, one-sided at both ends; infinite if T = 1."""
    return -np.gradient(schedule.log_snr) / 2 if schedule.T > 1 else np.array([np.inf])


def _theorem1(schedule: Schedule) -> np.ndarray:
    """The weight of the error in x_0 by Theorem 1 at t = 1..T for eta = 1; infinite if T = 1."""
    if schedule.T == 1:
        return np.array([np.inf])
    levels = schedule.levels(range(schedule.T, -1, -1))
    sigmas = [sigma(now, following) for now, following in itertools.pairwise(levels)]
    return x0_weights(levels, [*sigmas[:-1], sigmas[-2]])[::-1]


@dataclass(frozen=True)
class Objective:
    """L_gamma on batches.

    Args:
        schedule: The schedule.
        predicts: What the network predicts.
        gamma: The name of gamma, see `weights`.
        device: The device of the batches.
        drawn: The distribution of training timesteps, see `ddim.objective.timestep_sampling`.

    Attributes:
        times: The sampler of training timesteps, with their weights.

    Raises:
        DdimError: See `weights`.
    """

    schedule: Schedule
    predicts: Predicts
    gamma: LossWeight = "simple"
    device: torch.device | str = "cpu"
    drawn: TimestepDraw = "uniform"
    times: TimestepSampler = field(init=False, repr=False, compare=False)
    _table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        levels = [self.schedule.level(t) for t in range(1, self.schedule.T + 1)]
        columns = [
            [level.signal for level in levels],
            [level.noise for level in levels],
            _powers(self.schedule, *_OUTPUT[self.predicts]),
            weights(self.schedule, self.predicts, self.gamma),
        ]
        table = torch.tensor(np.array(columns), dtype=torch.float64).to(torch.float32).to(self.device)
        object.__setattr__(self, "_table", table[:3])
        object.__setattr__(self, "times", TimestepSampler(table[3], self.drawn))

    def loss(self, network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Eq. (5): gamma_t || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t) ||^2 per sample.

        The norm is a mean over dimensions; the mean over the batch replaces the sum over t.

        Args:
            network: Called as network(x_t, t - 1), with x_t (B, ...) and int64 times in 0..T - 1 (B,), as by
                `ddim.wrap`; a bundled network is passed t. Returns the shape of x_t.
            x0: Clean data, float32, (B, ...).
            t: Timesteps, int64, (B,), in 1..T.
            eps: Standard normal, the shape of x0.

        Returns:
            float32, (B,).
        """
        return self.times.weights[t - 1] * self.error(network, x0, t, eps)

    def draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The random numbers that noise x0 (B, ...): standard normal, the shape of x0."""
        return torch.randn(x0.shape, generator=generator, device=x0.device)

    def error(self, network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The squared error of the network's output per dimension; arguments and shape as for `loss`."""
        signal, noise = self._table[:2, t - 1].unbind()
        shape = (-1, *[1] * (x0.ndim - 1))
        level = _Batch(signal.view(shape), noise.view(shape))
        output = as_timed(network)(diffuse(x0, eps, level), t).float()
        if output.shape != x0.shape:
            problem = f"returns {tuple(output.shape)} for data of {tuple(x0.shape)}"
            raise DdimError("network", problem, "train one without learned variance")
        target = {"eps": eps, "x0": x0}.get(self.predicts)
        error = output - (v_from_pair(x0, eps, level) if target is None else target)
        return error.square().flatten(1).mean(1)

    def eps_mse(self, error: Tensor, t: Tensor) -> Tensor:
        """The entry of the error table for each sample, (B,): || eps - eps_theta ||^2 / d, scaled from `error`."""
        return self._table[2, t - 1] * error


class _Batch(NamedTuple):
    signal: Tensor
    noise: Tensor
