"""The inference family q_sigma for real-valued data: eqs. (3), (4), (7), (8), (16) and Lemma 1.

The joint distribution over many levels, eq. (6), is in `ddim.joint`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ddim.process.schedule import Level, Scales


def log_normal(x: Tensor, mean: Tensor | float, std: float) -> Tensor:
    """log N(x; mean, std^2 I) in nats for each sample of (N, ...): (N,), in the dtype of x."""
    terms = -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    return terms.reshape(len(x), -1).sum(dim=1)


def diffuse(x0: Tensor, eps: Tensor, level: Scales) -> Tensor:
    """Eq. (4): x_t = signal x_0 + noise eps, a sample of q(x_t | x_0) = N(signal x_0, noise^2 I).

    Args:
        x0: Clean data, any shape.
        eps: Standard normal, the shape of x0.
        level: The level of x_t, or one signal and noise per sample.

    Returns:
        x_t, the shape of x0.
    """
    return x0 * level.signal + eps * level.noise


def posterior_weights(now: Level, next: Level, sigma: float) -> tuple[float, float]:
    """Eq. (7): the mean of q_sigma(x_next | x_now, x_0) as weights of x_0 and of eps = (x_now - signal x_0) / noise.

    Args:
        now: The level of x_now.
        next: The level of x_next.
        sigma: The standard deviation of x_next, 0 <= sigma^2 <= 1 - alpha_bar_next.

    Returns:
        (signal_next, sqrt(1 - alpha_bar_next - sigma^2)): the weights of x_0 and of eps in the mean.

    Raises:
        ValueError: If sigma is out of range.
    """
    left = next.variance - sigma**2
    if not (sigma >= 0 and left >= -1e-12 * next.variance):
        raise ValueError(f"sigma = {sigma} is outside 0..{next.noise} at t = {next.t:g}")
    return next.signal, math.sqrt(max(left, 0.0))


def weight_of_x0(now: Level, next: Level, sigma: float) -> float:
    """The total weight of x_0 in the mean of eq. (7): directly, and through eps.

    c = sqrt(abar_next) - sqrt(1 - abar_next - sigma^2) sqrt(abar_now) / sqrt(1 - abar_now). An error in f_theta is
    multiplied by c, an error in eps_theta by -c noise_now / signal_now.

    Args:
        now: The level of x_now, not clean data.
        next: The level of x_next.
        sigma: Its standard deviation, 0 <= sigma^2 <= 1 - alpha_bar_next.

    Raises:
        ValueError: If sigma is out of range.
    """
    of_x0, of_eps = posterior_weights(now, next, sigma)
    return of_x0 - of_eps * now.signal / now.noise


def sigma(now: Level, next: Level, eta: float = 1.0) -> float:
    """Eq. (16): sigma = eta sqrt((1 - abar_next) / (1 - abar_now)) sqrt(1 - abar_now / abar_next).

    eta multiplies the standard deviation. eta = 1 is the posterior of Ho et al. ("fixed small").

    Args:
        now: The level at the start of the step.
        next: The cleaner level at its end.
        eta: 0 for DDIM, 1 for DDPM, or any value whose sigma is in range.
    """
    return eta * math.sqrt(next.variance / now.variance) * sigma_hat(now, next)


def sigma_hat(now: Level, next: Level) -> float:
    """Section 5: sigma-hat = sqrt(1 - abar_now / abar_next), the larger noise, Ho et al.'s "fixed large".

    Args:
        now: The level at the start of the step.
        next: The cleaner level at its end.
    """
    return math.sqrt(-math.expm1(now.log_alpha_bar - next.log_alpha_bar))


def chain_weights(now: Level, next: Level) -> tuple[float, float]:
    """Eq. (3): the Markov chain of DDPM between two levels, q(x_next | x_now) = N(of_x x_now, std^2 I).

    Accurate for levels close together, where 1 - abar_next / abar_now would cancel.

    Args:
        now: The level of x_now; clean data gives eq. (4).
        next: The noisier level of x_next.

    Returns:
        (of_x, std) = (sqrt(abar_next / abar_now), sqrt(1 - abar_next / abar_now)).

    Raises:
        ValueError: If `next` is not the noisier level.
    """
    _check_noisier(now, next)
    return math.exp((next.log_alpha_bar - now.log_alpha_bar) / 2), sigma_hat(next, now)


def forward_weights(now: Level, next: Level, sigma: float) -> tuple[float, float, float]:
    """Eq. (8): q_sigma(x_next | x_now, x_0) = N(of_x x_now + of_x0 x_0, std^2 I), by Bayes' rule from (7) and (4).

    Given x_0, the noises eps of both levels are standard normal with correlation rho = sqrt(1 - sigma^2 / noise_now^2),
    so x_next = signal_next x_0 + noise_next (rho eps_now + sqrt(1 - rho^2) z). At sigma = 0 this is deterministic; at
    eta = 1, of_x0 = 0 and it is the Markov chain of eq. (3). Clean data do not determine eps: from t = 0 it is eq. (4).

    Args:
        now: The level s of x_now.
        next: The noisier level t of x_next.
        sigma: The standard deviation of q_sigma(x_s | x_t, x_0), eq. (7), 0 <= sigma^2 <= 1 - alpha_bar_now.

    Returns:
        (of_x, of_x0, std).

    Raises:
        ValueError: If sigma is out of range (from t = 0 it must be 0), or `next` is not the noisier level.
    """
    _check_noisier(now, next)
    _, direction = posterior_weights(next, now, sigma)
    if now.variance == 0:
        return 0.0, next.signal, next.noise
    of_x = next.noise * direction / now.variance
    return of_x, next.signal - of_x * now.signal, next.noise * sigma / now.noise


def marginal_after(signal: float, variance: float, now: Level, next: Level, sigma: float) -> tuple[float, float]:
    """Eqs. (22), (23), (24) and (25): Lemma 1, one step of its induction: a Gaussian through the kernel of eq. (7).

    If x_now | x_0 is N(signal x_0, variance I), then x_next | x_0 is N(signal' x_0, variance' I) (Bishop 2006,
    eq. 2.115: variance' is the variance of the kernel's mean plus sigma^2). The lemma: the marginal (4) at `now` gives
    the marginal (4) at `next`, for every sigma in range.

    Args:
        signal: The factor of x_0 in the mean of x_now.
        variance: The variance of x_now given x_0.
        now: The level of x_now, not clean data.
        next: The level of x_next.
        sigma: The kernel's standard deviation, 0 <= sigma^2 <= 1 - alpha_bar_next.

    Returns:
        (signal', variance').

    Raises:
        ValueError: If sigma is out of range, or `now` is clean data, for which eq. (7) is undefined.
    """
    if now.variance == 0:
        raise ValueError("eq. (7) is undefined at t = 0, which has no noise")
    of_x0, of_eps = posterior_weights(now, next, sigma)
    kappa = of_eps / now.noise
    return of_x0 + kappa * (signal - now.signal), kappa**2 * variance + sigma**2


def _check_noisier(now: Level, next: Level) -> None:
    if not next.log_snr < now.log_snr:
        raise ValueError(f"t = {next.t:g} is not noisier than t = {now.t:g}, as a forward step needs")
