"""The inference family for categorical data, Appendix A: eqs. (17) to (21).

Data are ids, int64 (...), of K categories; distributions over them are float64 (..., K). alpha_bar is the
probability that a category has been kept; what was not kept is drawn from pi: uniform in the paper, any distribution
here (all of it on one id, the mask, is absorbing diffusion). Wherever ids are taken, distributions are too.

The direction differs from real-valued data: the largest sigma is the least random member, sigma = 0 the most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.process.rng import sample_categorical
from ddim.process.schedule import Level


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The categories of x_t and what noise draws them from.

    Args:
        pi: float64, (K,), >= 0, of sum 1.
        mask: The id that stands for "unknown", which no x_0 is; pi is all on it. None where there is none.
        carry_over: Whether a token that is not the mask is taken for x_0 with certainty.

    Raises:
        ValueError: If pi is no distribution, or is not all on the mask, or there is no mask to carry over from.
    """

    pi: Tensor
    mask: int | None = None
    carry_over: bool = False

    def __post_init__(self) -> None:
        if self.pi.ndim != 1 or not bool((self.pi >= 0).all()) or not abs(float(self.pi.sum()) - 1) < 1e-9:
            raise ValueError("pi is not a distribution over the categories")
        if self.mask is not None and float(self.pi[self.mask]) != 1:
            raise ValueError("noise that is a mask draws nothing else")
        if self.carry_over and self.mask is None:
            raise ValueError("without a mask no token is known to be kept")

    @property
    def size(self) -> int:
        """K, the mask included."""
        return len(self.pi)

    @property
    def weights(self) -> tuple[float, ...]:
        """Pi as plain numbers."""
        return tuple(self.pi.tolist())

    @classmethod
    def uniform(cls, size: int) -> Alphabet:
        """The paper's: noise draws every one of K categories alike."""
        return cls(torch.full((size,), 1 / size, dtype=torch.float64))

    @classmethod
    def masked(cls, size: int, carry_over: bool = False) -> Alphabet:
        """K categories of data and a mask, whose id is K: absorbing diffusion."""
        pi = torch.zeros(size + 1, dtype=torch.float64)
        pi[size] = 1
        return cls(pi, size, carry_over)


def marginal(x0: Tensor, level: Level, pi: Tensor | None = None) -> Tensor:
    """Eq. (17): q(x_t | x_0) = Cat(abar_t x_0 + (1 - abar_t) pi).

    Args:
        x0: Ids (...), or distributions (..., K), which are averaged over.
        level: The time t.
        pi: What noise is drawn from, (K,), sums to 1; uniform if None (then x0 must be distributions).

    Returns:
        float64, (..., K).

    Raises:
        ValueError: If K cannot be told, or differs.
    """
    pi = _noise(pi, x0)
    return level.alpha_bar * _distribution(x0, pi) + level.variance * pi


def noised(x0: Tensor, keep: float | Tensor, u: Tensor, pi: Tensor) -> Tensor:
    """A draw of x_t from `marginal`, given uniform numbers.

    Args:
        x0: Ids (...).
        keep: abar_t, a number or one for each id.
        u: Uniform on [0, 1), (..., 2 or more): whether an id is kept, and what it becomes if not.
        pi: What noise is drawn from, (K,).

    Returns:
        int64, (...).
    """
    return torch.where(u[..., 0] < keep, x0, sample_categorical(u[..., 1], pi))


def sigma_largest(now: Level, next: Level) -> float:
    """The largest legal sigma of a step: min(abar_next / abar_now, (1 - abar_next) / (1 - abar_now)).

    The second is the smaller one whenever `next` is cleaner. There no fresh noise is drawn: the least random step.

    Args:
        now: The level a step starts from.
        next: The level it goes to.
    """
    by_x0 = next.alpha_bar / now.alpha_bar if now.alpha_bar > 0 else math.inf
    by_noise = next.variance / now.variance if now.variance > 0 else math.inf
    return min(by_x0, by_noise)


def mixture_weights(now: Level, next: Level, sigma: float) -> tuple[float, float, float]:
    """Eq. (18): q_sigma(x_next | x_now, x_0) as a mixture: x_now kept, x_0 taken, or fresh noise from pi.

    Args:
        now: The level of x_now.
        next: The level of x_next.
        sigma: The probability of keeping x_now, 0 <= sigma <= `sigma_largest(now, next)`.

    Returns:
        (keep, to_x0, fresh) = (sigma, abar_next - sigma abar_now, (1 - abar_next) - sigma (1 - abar_now)), each >= 0,
        their sum 1.

    Raises:
        ValueError: If sigma is not legal: a weight would be negative.
    """
    largest = sigma_largest(now, next)
    if not 0 <= sigma <= largest * (1 + 1e-12):
        raise ValueError(f"sigma = {sigma} is outside 0..{largest} from t = {now.t:g} to {next.t:g}")
    to_x0 = next.alpha_bar - sigma * now.alpha_bar
    fresh = next.variance - sigma * now.variance
    return sigma, max(to_x0, 0.0), max(fresh, 0.0)


def posterior(x_t: Tensor, x0_probs: Tensor, now: Level, next: Level, sigma: float, pi: Tensor | None = None) -> Tensor:
    """Eq. (19): q_sigma(x_next | x_now, x_0) = Cat(keep x_now + to_x0 x_0 + fresh pi), the weights from eq. (18).

    Args:
        x_t: x_now, ids (...).
        x0_probs: x_0, distributions (..., K), or ids (...) if pi is given.
        now: The level of x_now.
        next: The level of x_next; any, not only the neighbour.
        sigma: As for `mixture_weights`.
        pi: What noise is drawn from, (K,), sums to 1; uniform if None.

    Returns:
        float64, (..., K).

    Raises:
        ValueError: If sigma is not legal, or K cannot be told, or differs.
    """
    pi = _noise(pi, x0_probs)
    keep, to_x0, fresh = mixture_weights(now, next, sigma)
    return keep * _distribution(x_t, pi) + to_x0 * _distribution(x0_probs, pi) + fresh * pi


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) of distributions (..., K): float64, (...), nats; inf where p excludes what q allows."""
    # 0 log 0 = 0, in the gradient as well: where q is 0, p does not matter.
    log_q, log_p = (torch.where(q > 0, probs, 1.0).log() for probs in (q, p))
    return (q * (log_q - log_p)).sum(-1)


def kl(
    x_t: Tensor, x0: Tensor, predicted: Tensor, now: Level, next: Level, sigma: float, pi: Tensor | None = None
) -> Tensor:
    """Eqs. (20) and (21): KL(q_sigma(x_next | x_now, x_0) || p_theta(x_next | x_now)), exact.

    p_theta is eq. (19) with the predicted distribution in the place of x_0. At next.t = 0 this is -log p_theta(x_0 |
    x_now). Mixtures being what they are, it is at most to_x0 = abar_next - sigma abar_now times the cross-entropy
    -log predicted[x_0].

    Args:
        x_t: x_now, ids (...).
        x0: x_0, ids (...).
        predicted: f_theta(x_now), distributions (..., K).
        now: The level of x_now.
        next: The level of x_next.
        sigma: As for `mixture_weights`.
        pi: What noise is drawn from, (K,), sums to 1; uniform if None.

    Returns:
        float64, (...), nats; inf where p_theta excludes what q allows.

    Raises:
        ValueError: As for `posterior`.
    """
    pi = _noise(pi, predicted)
    q = posterior(x_t, x0, now, next, sigma, pi)
    p = posterior(x_t, predicted, now, next, sigma, pi)
    return divergence(q, p)


def _distribution(x: Tensor, pi: Tensor) -> Tensor:
    """Ids as one-hot distributions; distributions as they are; float64."""
    if not x.is_floating_point():
        return torch.nn.functional.one_hot(x, len(pi)).to(torch.float64)
    if x.shape[-1] != len(pi):
        raise ValueError(f"distributions over {x.shape[-1]} categories, pi over {len(pi)}")
    return x.to(torch.float64)


def _noise(pi: Tensor | None, like: Tensor) -> Tensor:
    """Pi on the device of a tensor, or uniform over the categories of its last axis; float64."""
    if pi is not None:
        if pi.ndim != 1:
            raise ValueError(f"pi is {tuple(pi.shape)}, expected one probability per category, (K,)")
        return pi.to(like.device, torch.float64)
    if not like.is_floating_point():
        raise ValueError("ids alone do not say how many categories there are: give pi, or distributions")
    return torch.full((like.shape[-1],), 1 / like.shape[-1], dtype=torch.float64, device=like.device)


def markov_weights(now: Level, next: Level) -> tuple[float, float, float]:
    """The reversal of the chain that replaces tokens one time after another, given an x_0 that is not x_now.

    With a = abar_now / abar_next, the probability that the chain keeps a token from `next` to `now`, q(x_next | x_now,
    x_0) is proportional to q(x_now | x_next) q(x_next | x_0); for x_now != x_0 it is a mixture again. For x_now = x_0
    it is another one, see `markov_fresh`, so that no sigma of eq. (18) gives both; but with a mask the largest does.

    Args:
        now: The level of x_now.
        next: The level of x_next, cleaner.

    Returns:
        (keep, to_x0, fresh), their sum 1.
    """
    ratio = next.variance / now.variance
    return now.alpha_bar / next.alpha_bar * ratio, 1 - ratio, _replaced(now, next) * ratio


def markov_fresh(now: Level, next: Level, pi: Tensor) -> Tensor:
    """The weight of fresh noise in the same reversal where x_0 is x_now; with the rest the token stays as it is.

    Args:
        now: The level of x_now.
        next: The level of x_next, cleaner.
        pi: The probability of that token under the noise, (...).

    Returns:
        The shape of pi; 0 for a token that cannot be x_now.
    """
    chance = now.alpha_bar + now.variance * pi
    return torch.where(chance > 0, _replaced(now, next) * next.variance * pi / chance, 0.0)


def _replaced(now: Level, next: Level) -> float:
    """1 - abar_now / abar_next, without cancellation near clean data."""
    return (now.variance - next.variance) / next.alpha_bar


def markov_posterior(x_t: Tensor, x0_probs: Tensor, now: Level, next: Level, pi: Tensor | None = None) -> Tensor:
    """The reversal of the Markov chain with x_0 averaged over: sum_{x_0} q(x_next | x_now, x_0) p(x_0 | x_now).

    Multinomial diffusion (Hoogeboom et al. 2021) and, averaged like this, D3PM (Austin et al. 2021). Not in the family
    of eq. (19).

    Args:
        x_t: x_now, ids (...).
        x0_probs: p(x_0 | x_now), distributions (..., K), or ids (...) if pi is given.
        now: The level of x_now.
        next: The level of x_next, cleaner.
        pi: What noise is drawn from, (K,), sums to 1; uniform if None.

    Returns:
        float64, (..., K).

    Raises:
        ValueError: If K cannot be told, or differs.
    """
    pi = _noise(pi, x0_probs)
    here, probs = _distribution(x_t, pi), _distribution(x0_probs, pi)
    same = (here * probs).sum(-1, keepdim=True)
    keep, to_x0, fresh = markov_weights(now, next)
    again = markov_fresh(now, next, pi[x_t])[..., None]
    other = keep * (1 - same) * here + to_x0 * (probs - same * here) + fresh * (1 - same) * pi
    return other + same * ((1 - again) * here + again * pi)


def sharpen(probabilities: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Distributions made less random: raised to 1 / temperature, then cut to their likeliest part.

    Args:
        probabilities: (..., K), sums to 1.
        temperature: > 0; 1 leaves them, below 1 is sharper.
        top_p: In (0, 1]: the likeliest categories are kept whose probabilities first reach this sum (Holtzman et al.
            2020); at least one is.

    Returns:
        The same shape and dtype, sums to 1.
    """
    if temperature != 1:
        scaled = probabilities / probabilities.amax(-1, keepdim=True)  # so that no power underflows for all
        probabilities = scaled.pow(1 / temperature)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if top_p < 1:
        order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        kept = torch.zeros_like(probabilities).scatter(-1, order.indices, order.values * (before < top_p))
        probabilities = kept / kept.sum(-1, keepdim=True)
    return probabilities
