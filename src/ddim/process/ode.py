"""The ODE of DDIM: xbar = x / sqrt(abar) as a function of v = sqrt((1 - abar) / abar), which is `Level.ratio`.

In these coordinates DDIM is Euler's method, and its ODE is the probability flow of the variance-exploding SDE, whose
noise has standard deviation v. Other solvers of this ODE are in `ddim.samplers.runge_kutta`.
"""

from __future__ import annotations

from torch import Tensor

from ddim.process.parameterization import Denoiser
from ddim.process.schedule import Level


def to_xbar(x: Tensor, level: Level) -> Tensor:
    """xbar = x / sqrt(abar).

    Args:
        x: x_t, any shape.
        level: The level of x_t, with signal.

    Raises:
        ValueError: If the level has no signal: xbar is infinite there.
    """
    if level.signal == 0:
        raise ValueError(f"xbar is infinite at t = {level.t:g}, where there is no signal")
    return x / level.signal


def from_xbar(xbar: Tensor, level: Level) -> Tensor:
    """x = sqrt(abar) xbar = xbar / sqrt(v^2 + 1); the inverse of `to_xbar`.

    Args:
        xbar: x / sqrt(abar), any shape.
        level: The level of xbar.
    """
    return xbar * level.signal


def euler(xbar: Tensor, eps: Tensor, now: Level, next: Level) -> Tensor:
    """Eq. (13): xbar_next = xbar_now + (v_next - v_now) eps_theta, the DDIM step as an Euler step of eq. (14).

    Args:
        xbar: x_now / sqrt(abar_now), any shape.
        eps: eps_theta(x_now), the shape of xbar.
        now: The level at the start of the step, with signal.
        next: The level at its end, with signal; noisier when encoding.

    Returns:
        x_next / sqrt(abar_next), the shape of xbar.
    """
    return xbar + eps * (next.ratio - now.ratio)


def velocity(denoise: Denoiser, xbar: Tensor, level: Level) -> Tensor:
    """Eq. (14): d xbar / d v = eps_theta(xbar / sqrt(v^2 + 1)).

    Args:
        denoise: The denoiser.
        xbar: x / sqrt(abar), (N, ...).
        level: The level of xbar, with signal.

    Returns:
        The derivative with respect to v = sqrt((1 - abar) / abar), the shape of xbar.
    """
    return denoise(from_xbar(xbar, level), level).eps


def ve_velocity(score: Tensor, dv2_dt: float) -> Tensor:
    """Proposition 1: d xbar / d t = -1/2 (d v^2 / d t) grad log p_t(xbar), the probability flow of the VE-SDE.

    The SDE is d xbar = sqrt(d v^2 / d t) d w, so p_t is the data density convolved with N(0, v^2 I). With the ideal
    eps_theta this is eq. (14) times d v / d t, since grad log p_t(xbar) = -eps_theta / v.

    Args:
        score: grad log p_t(xbar), any shape.
        dv2_dt: The derivative of v^2 = (1 - abar) / abar with respect to t, > 0 if noise grows with t.

    Returns:
        d xbar / d t, the shape of score.
    """
    return score * (-0.5 * dv2_dt)
