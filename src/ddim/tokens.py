"""Networks that predict p(x_0 | x_t) of categories: what their logits say, and the loss they are trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ddim.categorical import Alphabet, noised
from ddim.errors import DdimError
from ddim.schedule import Level, Schedule
from ddim.times import Drawn, Times

Weight = Literal["simple", "vlb"]


@dataclass(frozen=True, slots=True)
class TokenPrediction:
    """What a denoiser says of categorical x_t.

    Args:
        x0: p(x_0 | x_t), each token on its own: float, (N, ..., K).
    """

    x0: Tensor

    def with_x0(self, x0: Tensor, x: Tensor, level: Level) -> TokenPrediction:
        """The prediction with another x_0."""
        return TokenPrediction(x0)

    def towards(self, other: TokenPrediction, scale: float) -> TokenPrediction:
        """p proportional to self^(1 - scale) other^scale (Schiff et al. 2024); what both exclude stays excluded."""
        off, on = (part.x0.clamp_min(torch.finfo(part.x0.dtype).tiny).log() for part in (self, other))
        made = off.lerp(on, scale).masked_fill((self.x0 == 0) & (other.x0 == 0), -math.inf)
        return TokenPrediction(made.softmax(-1))


class TokenDenoiser(Protocol):
    """Anything that predicts x_0 from categorical x_t."""

    def __call__(self, x: Tensor, level: Level, /) -> TokenPrediction:
        """The prediction at ids x (N, ...) and one level."""
        ...


def predict_tokens(output: Tensor, x: Tensor, level: Level, alphabet: Alphabet) -> TokenPrediction:
    """A network's logits (N, ..., K) at x (N, ...) as a prediction."""
    return TokenPrediction(log_probabilities(output, x, alphabet).exp())


def log_probabilities(logits: Tensor, x: Tensor, alphabet: Alphabet) -> Tensor:
    """log p(x_0 | x_t) of a network's logits.

    No x_0 is a mask; with `carry_over` a token that is not masked is x_0 itself, with certainty (Sahoo et al. 2024).

    Args:
        logits: (N, ..., K).
        x: Ids x_t, (N, ...).
        alphabet: The categories.

    Returns:
        The dtype of the logits, at least float32, (N, ..., K); -inf where a category is excluded.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if alphabet.mask is None:
        return logits.log_softmax(-1)
    ids = torch.arange(alphabet.size, device=logits.device)
    logits = logits.masked_fill(ids == alphabet.mask, -math.inf)
    if alphabet.carry_over:
        known = (x != alphabet.mask)[..., None]
        logits = logits.masked_fill(known & (ids != x[..., None]), -math.inf)
    return logits.log_softmax(-1)


def token_weights(schedule: Schedule, weight: Weight) -> np.ndarray:
    """The weight of the cross-entropy at t = 1..T.

    - "simple": 1;
    - "vlb": T (abar_{t-1} - abar_t) / (1 - abar_t), which eqs. (20) and (21) have before it at the largest sigma; there
      the mean over t is a bound on the sum of the divergences. Where noise is a mask and tokens are carried over it
      is that sum.

    Raises:
        DdimError: If there is no such weight.
    """
    if weight not in ("simple", "vlb"):
        raise DdimError(f"loss weight {weight}", "is not one of categories", "choose simple or vlb")
    if weight == "simple":
        return np.ones(schedule.T)
    levels = schedule.levels(range(schedule.T + 1))
    pairs = zip(levels[1:], levels, strict=False)
    return np.array([schedule.T * (next.alpha_bar - now.alpha_bar) / now.variance for now, next in pairs])


@dataclass(frozen=True)
class CrossEntropy:
    """The objective of categories on batches: -log p_theta(x_0 | x_t), weighed.

    It bounds the divergence of eq. (21) from above, to_x0 times; see `ddim.categorical.kl`.

    Args:
        schedule: The schedule.
        alphabet: The categories.
        weight: See `token_weights`.
        device: Where the batches are.
        drawn: How training times are drawn, see `ddim.times`.

    Attributes:
        times: The training times and their weights.

    Raises:
        DdimError: See `token_weights`.
    """

    schedule: Schedule
    alphabet: Alphabet
    weight: Weight = "simple"
    device: torch.device | str = "cpu"
    drawn: Drawn = "uniform"
    times: Times = field(init=False, repr=False, compare=False)
    _keep: Tensor = field(init=False, repr=False, compare=False)
    _pi: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        columns = np.array([self.schedule.alpha_bar[1:], token_weights(self.schedule, self.weight)])
        keep, weights = torch.tensor(columns, dtype=torch.float32, device=self.device).unbind()
        object.__setattr__(self, "_keep", keep)
        object.__setattr__(self, "times", Times(weights, self.drawn))
        object.__setattr__(self, "_pi", self.alphabet.pi.to(self.device))

    def draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The randomness that noises ids x0 (B, ...): uniform on [0, 1), (B, ..., 2)."""
        return torch.rand((*x0.shape, 2), generator=generator, device=x0.device)

    def error(self, network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """-log p_theta(x_0 | x_t) per token, in nats, x_t drawn from eq. (17).

        Args:
            network: (x_t (B, ...), t (B,)) to logits, (B, ..., K).
            x0: Clean ids, int64, (B, ...).
            t: Whole times, int64, (B,), in 1..T.
            noise: What `draw` gave.

        Returns:
            float32, (B,).
        """
        keep = self._keep[t - 1].view(-1, *[1] * (x0.ndim - 1))
        x = noised(x0, keep, noise, self._pi)
        log_p = log_probabilities(network(x, t), x, self.alphabet)
        return -log_p.gather(-1, x0[..., None]).flatten(1).mean(1)

    def told(self, error: Tensor, t: Tensor) -> Tensor:
        """What the table of errors holds: the cross-entropy itself, (B,)."""
        return error
