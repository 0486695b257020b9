"""The inference family q_sigma for real-valued data: eqs. (4), (7) and (16), each here only."""

from __future__ import annotations

import math

from torch import Tensor

from ddim.schedule import Level, Scales


def diffuse(x0: Tensor, eps: Tensor, level: Scales) -> Tensor:
    """Eq. (4): a draw of q(x_t | x_0) = N(signal x_0, noise^2 I), given its noise.

    Args:
        x0: Clean data, any shape.
        eps: Standard normal, the shape of x0.
        level: The time t: a level, or one signal and noise per sample.

    Returns:
        x_t, the shape of x0.
    """
    return x0 * level.signal + eps * level.noise


def posterior_weights(now: Level, next: Level, sigma: float) -> tuple[float, float]:
    """Eq. (7): the mean of q_sigma(x_next | x_now, x_0) as weights of x_0 and of eps = (x_now - signal x_0) / noise.

    Args:
        now: The level of x_now.
        next: The level of x_next.
        sigma: Its standard deviation, 0 <= sigma^2 <= 1 - alpha_bar_next.

    Returns:
        (signal_next, sqrt(1 - alpha_bar_next - sigma^2)); the mean is their sum over x_0 and eps.

    Raises:
        ValueError: If sigma is not legal.
    """
    left = next.variance - sigma**2
    if sigma < 0 or left < -1e-12 * next.variance:
        raise ValueError(f"sigma = {sigma} is outside 0..{next.noise} at t = {next.t:g}")
    return next.signal, math.sqrt(max(left, 0.0))


def sigma(now: Level, next: Level, eta: float = 1.0) -> float:
    """Eq. (16): sigma = eta sqrt((1 - abar_next) / (1 - abar_now)) sqrt(1 - abar_now / abar_next).

    eta multiplies the standard deviation. eta = 1 is the posterior of Ho et al. ("fixed small").

    Args:
        now: The level a step starts from.
        next: The cleaner level it goes to.
        eta: 0 for DDIM, 1 for DDPM, anything legal between or beyond.
    """
    return eta * math.sqrt(next.variance / now.variance) * sigma_hat(now, next)


def sigma_hat(now: Level, next: Level) -> float:
    """Section 5: sigma-hat = sqrt(1 - abar_now / abar_next), the larger noise, Ho et al.'s "fixed large".

    Args:
        now: The level a step starts from.
        next: The cleaner level it goes to.
    """
    return math.sqrt(-math.expm1(now.log_alpha_bar - next.log_alpha_bar))
