"""The inference family for discrete data, Appendix A: eqs. (17) to (21).

Data are ids, int64 (...), of K categories; distributions over them are float64 (..., K). Functions that accept ids
also accept distributions. alpha_bar is the probability that a token is unchanged; otherwise it is drawn from pi, which
is uniform in the paper and can be any distribution here (all its mass on one id, the mask, is absorbing diffusion).

Sigma has the opposite direction from real-valued data: the largest sigma is the least random member, sigma = 0 the
most random.
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
    """The categories of x_t and the noise distribution pi over them.

    Args:
        pi: float64, (K,), >= 0, sums to 1.
        mask: The id that stands for "unknown" and never occurs in x_0; pi[mask] is 1. None without a mask.
        carry_over: Whether a token that is not the mask equals x_0 with certainty.

    Raises:
        ValueError: If pi is not a distribution, pi[mask] is not 1, or `carry_over` is set without a mask.
    """

    pi: Tensor
    mask: int | None = None
    carry_over: bool = False

    def __post_init__(self) -> None:
        if self.pi.ndim != 1 or not bool((self.pi >= 0).all()) or not abs(float(self.pi.sum()) - 1) < 1e-9:
            raise ValueError("pi is not a distribution over the categories")
        if self.mask is not None and float(self.pi[self.mask]) != 1:
            raise ValueError("pi[mask] is not 1")
        if self.carry_over and self.mask is None:
            raise ValueError("carry_over needs a mask")

    @property
    def size(self) -> int:
        """K, including the mask."""
        return len(self.pi)

    @property
    def weights(self) -> tuple[float, ...]:
        """Pi as Python floats."""
        return tuple(self.pi.tolist())

    @classmethod
    def uniform(cls, size: int) -> Alphabet:
        """K categories with uniform noise, as in the paper."""
        return cls(torch.full((size,), 1 / size, dtype=torch.float64))

    @classmethod
    def masked(cls, size: int, carry_over: bool = False) -> Alphabet:
        """K data categories and a mask with id K: absorbing diffusion."""
        pi = torch.zeros(size + 1, dtype=torch.float64)
        pi[size] = 1
        return cls(pi, size, carry_over)


def marginal(x0: Tensor, level: Level, pi: Tensor | None = None) -> Tensor:
    """Eq. (17): q(x_t | x_0) = Cat(abar_t x_0 + (1 - abar_t) pi).

    Args:
        x0: Ids (...), or distributions (..., K), which are averaged over.
        level: The level of x_t.
        pi: The noise distribution, (K,), sums to 1; uniform if None (then x0 must be distributions).

    Returns:
        float64, (..., K).

    Raises:
        ValueError: If K cannot be inferred, or differs.
    """
    pi = _noise(pi, x0)
    return level.alpha_bar * _distribution(x0, pi) + level.variance * pi


def noised(x0: Tensor, keep: float | Tensor, u: Tensor, pi: Tensor) -> Tensor:
    """A sample of x_t from `marginal`, computed from uniform numbers.

    Args:
        x0: Ids (...).
        keep: abar_t, a number or one per id.
        u: Uniform on [0, 1), (..., 2 or more): the first decides whether an id is replaced, the second by which.
        pi: The noise distribution, (K,).

    Returns:
        int64, (...).
    """
    return torch.where(u[..., 0] < keep, x0, sample_categorical(u[..., 1], pi))


def sigma_largest(now: Level, next: Level) -> float:
    """The largest valid sigma of a step: min(abar_next / abar_now, (1 - abar_next) / (1 - abar_now)).

    The second is smaller whenever `next` is cleaner. At that sigma no fresh noise is drawn: the least random step.

    Args:
        now: The level at the start of the step.
        next: The level at its end.
    """
    by_x0 = next.alpha_bar / now.alpha_bar if now.alpha_bar > 0 else math.inf
    by_noise = next.variance / now.variance if now.variance > 0 else math.inf
    return min(by_x0, by_noise)


def mixture_weights(now: Level, next: Level, sigma: float) -> tuple[float, float, float]:
    """Eq. (18): q_sigma(x_next | x_now, x_0) as a mixture of x_now, x_0, and fresh noise from pi.

    Args:
        now: The level of x_now.
        next: The level of x_next.
        sigma: The probability of keeping x_now, 0 <= sigma <= `sigma_largest(now, next)`.

    Returns:
        (keep, to_x0, fresh) = (sigma, abar_next - sigma abar_now, (1 - abar_next) - sigma (1 - abar_now)); each >= 0,
        summing to 1.

    Raises:
        ValueError: If sigma is out of range, which would make a weight negative.
    """
    largest = sigma_largest(now, next)
    if not 0 <= sigma <= largest * (1 + 1e-12):
        raise ValueError(f"sigma = {sigma} is outside 0..{largest} from t = {now.t:g} to {next.t:g}")
    to_x0 = next.alpha_bar - sigma * now.alpha_bar
    fresh = next.variance - sigma * now.variance
    return sigma, max(to_x0, 0.0), max(fresh, 0.0)


def posterior(x_t: Tensor, x0_probs: Tensor, now: Level, next: Level, sigma: float, pi: Tensor | None = None) -> Tensor:
    """Eq. (19): q_sigma(x_next | x_now, x_0) = Cat(keep x_now + to_x0 x_0 + fresh pi), with the weights of eq. (18).

    Args:
        x_t: x_now, ids (...).
        x0_probs: x_0, distributions (..., K), or ids (...) if pi is given.
        now: The level of x_now.
        next: The level of x_next; it need not be the adjacent timestep.
        sigma: As for `mixture_weights`.
        pi: The noise distribution, (K,), sums to 1; uniform if None.

    Returns:
        float64, (..., K).

    Raises:
        ValueError: If sigma is out of range, or K cannot be inferred or differs.
    """
    pi = _noise(pi, x0_probs)
    keep, to_x0, fresh = mixture_weights(now, next, sigma)
    return keep * _distribution(x_t, pi) + to_x0 * _distribution(x0_probs, pi) + fresh * pi


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) of distributions (..., K): float64, (...), in nats; inf if p is 0 somewhere q is not."""
    # 0 log 0 = 0, also in the gradient: where q is 0, p does not matter.
    log_q, log_p = (torch.where(q > 0, probs, 1.0).log() for probs in (q, p))
    return (q * (log_q - log_p)).sum(-1)


def kl(
    x_t: Tensor, x0: Tensor, predicted: Tensor, now: Level, next: Level, sigma: float, pi: Tensor | None = None
) -> Tensor:
    """Eqs. (20) and (21): KL(q_sigma(x_next | x_now, x_0) || p_theta(x_next | x_now)), exact.

    p_theta is eq. (19) with the predicted distribution in place of x_0. At next.t = 0 this is
    -log p_theta(x_0 | x_now). By convexity it is at most to_x0 = abar_next - sigma abar_now times the cross-entropy
    -log predicted[x_0].

    Args:
        x_t: x_now, ids (...).
        x0: x_0, ids (...).
        predicted: f_theta(x_now), distributions (..., K).
        now: The level of x_now.
        next: The level of x_next.
        sigma: As for `mixture_weights`.
        pi: The noise distribution, (K,), sums to 1; uniform if None.

    Returns:
        float64, (...), in nats; inf if p_theta is 0 somewhere q is not.

    Raises:
        ValueError: As for `posterior`.
    """
    pi = _noise(pi, predicted)
    q = posterior(x_t, x0, now, next, sigma, pi)
    p = posterior(x_t, predicted, now, next, sigma, pi)
    return divergence(q, p)


def _distribution(x: Tensor, pi: Tensor) -> Tensor:
    """Ids as one-hot distributions, distributions unchanged; float64."""
    if not x.is_floating_point():
        return torch.nn.functional.one_hot(x, len(pi)).to(torch.float64)
    if x.shape[-1] != len(pi):
        raise ValueError(f"distributions over {x.shape[-1]} categories, pi over {len(pi)}")
    return x.to(torch.float64)


def _noise(pi: Tensor | None, like: Tensor) -> Tensor:
    """Pi on the device of `like`, or the uniform distribution over its last axis; float64."""
    if pi is not None:
        if pi.ndim != 1:
            raise ValueError(f"pi is {tuple(pi.shape)}, expected one probability per category, (K,)")
        return pi.to(like.device, torch.float64)
    if not like.is_floating_point():
        raise ValueError("ids do not determine the number of categories: pass pi or distributions")
    return torch.full((like.shape[-1],), 1 / like.shape[-1], dtype=torch.float64, device=like.device)


def markov_weights(now: Level, next: Level) -> tuple[float, float, float]:
    """The weights of the reverse Markov chain q(x_next | x_now, x_0) when x_0 differs from x_now.

    The forward chain leaves a token unchanged from `next` to `now` with probability abar_now / abar_next.
    q(x_next | x_now, x_0) is proportional to q(x_now | x_next) q(x_next | x_0), which is a mixture with these weights
    for x_now != x_0, and with those of `markov_fresh` for x_now = x_0. No sigma of eq. (18) gives both, except with a
    mask, where the largest sigma does.

    Args:
        now: The level of x_now.
        next: The level of x_next, cleaner.

    Returns:
        (keep, to_x0, fresh), summing to 1.
    """
    ratio = next.variance / now.variance
    return now.alpha_bar / next.alpha_bar * ratio, 1 - ratio, _replaced(now, next) * ratio


def markov_fresh(now: Level, next: Level, pi: Tensor) -> Tensor:
    """The weight of fresh noise in the reverse Markov chain when x_0 = x_now; otherwise the token is unchanged.

    Args:
        now: The level of x_now.
        next: The level of x_next, cleaner.
        pi: The probability of the token x_now under the noise distribution, (...).

    Returns:
        The shape of pi; 0 for a token that cannot occur at `now`.
    """
    chance = now.alpha_bar + now.variance * pi
    return torch.where(chance > 0, _replaced(now, next) * next.variance * pi / chance, 0.0)


def _replaced(now: Level, next: Level) -> float:
    """1 - abar_now / abar_next, without cancellation near clean data."""
    return (now.variance - next.variance) / next.alpha_bar


def markov_posterior(x_t: Tensor, x0_probs: Tensor, now: Level, next: Level, pi: Tensor | None = None) -> Tensor:
    """The reverse Markov chain averaged over the predicted x_0: sum_{x_0} q(x_next | x_now, x_0) p(x_0 | x_now).

    The kernel of multinomial diffusion (Hoogeboom et al. 2021), averaged over x_0 as in D3PM (Austin et al. 2021). It
    is not a member of the family of eq. (19).

    Args:
        x_t: x_now, ids (...).
        x0_probs: p(x_0 | x_now), distributions (..., K), or ids (...) if pi is given.
        now: The level of x_now.
        next: The level of x_next, cleaner.
        pi: The noise distribution, (K,), sums to 1; uniform if None.

    Returns:
        float64, (..., K).

    Raises:
        ValueError: If K cannot be inferred, or differs.
    """
    pi = _noise(pi, x0_probs)
    here, probs = _distribution(x_t, pi), _distribution(x0_probs, pi)
    same = (here * probs).sum(-1, keepdim=True)
    keep, to_x0, fresh = markov_weights(now, next)
    again = markov_fresh(now, next, pi[x_t])[..., None]
    other = keep * (1 - same) * here + to_x0 * (probs - same * here) + fresh * (1 - same) * pi
    return other + same * ((1 - again) * here + again * pi)


def sharpen(probabilities: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Temperature and top-p (nucleus) truncation of distributions.

    Args:
        probabilities: (..., K), sums to 1.
        temperature: > 0; 1 has no effect, below 1 is sharper.
        top_p: In (0, 1]: only the most likely categories, up to the first cumulative probability that reaches top_p,
            can be drawn (Holtzman et al. 2020); always at least one.

    Returns:
        The same shape and dtype, sums to 1.
    """
    if temperature != 1:
        # Scaling by the maximum prevents all the powers from underflowing to 0.
        scaled = probabilities / probabilities.amax(-1, keepdim=True)
        probabilities = scaled.pow(1 / temperature)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if top_p < 1:
        order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        truncated = torch.zeros_like(probabilities).scatter(-1, order.indices, order.values * (before < top_p))
        probabilities = truncated / truncated.sum(-1, keepdim=True)
    return probabilities
