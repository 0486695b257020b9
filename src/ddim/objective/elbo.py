"""The variational bound J_sigma as a sum of exact terms, and its relation to L_gamma by Theorem 1.

All numbers are in nats and summed over dimensions; `ddim.likelihood` converts them to bits per dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.plan.base import as_planned
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.gaussian import diffuse, log_normal, weight_of_x0
from ddim.process.parameterization import Denoiser, Prediction
from ddim.process.schedule import Level

Power = TypeVar("Power", float, Tensor)


def gamma_from_sigma(levels: Sequence[Level], sigma: Sequence[float]) -> np.ndarray:
    """Theorem 1: the gamma for which J_sigma = L_gamma + C, for any valid sigma > 0 and any sub-sequence of timesteps.

    For a step t -> s, x_0 enters the mean of eq. (7) in two terms, with the total weight
    c = sqrt(abar_s) - sqrt(1 - abar_s - sigma^2) sqrt(abar_t) / sqrt(1 - abar_t), so that the KL divergence is
    c^2 ||x_0 - f||^2 / (2 sigma^2) = gamma ||eps - eps_theta||^2 with gamma = c^2 (1 - abar_t) / abar_t / (2 sigma^2).
    The norm is a sum over dimensions; there is no 1/d. The last step, s = 0, has c = 1.

    Args:
        levels: S + 1 levels, falling, the last one clean data.
        sigma: S standard deviations > 0, one per step; the last one is the sigma_1 of p_theta(x_0 | x_1).

    Returns:
        float64, (S,), > 0; the noisiest step first; infinite at zero signal, see `x0_weights`.

    Raises:
        ValueError: If a sigma is out of range.
    """
    return np.asarray(x0_weights(levels, sigma) * [now.ratio**2 for now in levels[:-1]])


def x0_weights(levels: Sequence[Level], sigma: Sequence[float]) -> np.ndarray:
    """The gamma of Theorem 1 as weights of the error in x_0, c^2 / (2 sigma^2), which are finite at zero signal too.

    Args:
        levels: As for `gamma_from_sigma`.
        sigma: As for `gamma_from_sigma`.

    Returns:
        float64, (S,), the noisiest step first.

    Raises:
        ValueError: As for `gamma_from_sigma`.
    """
    if len(sigma) != len(levels) - 1:
        raise ValueError(f"{len(sigma)} sigmas for {len(levels) - 1} steps")
    weights = []
    for (now, next), std in zip(itertools.pairwise(levels), sigma, strict=True):
        if not std > 0:
            raise ValueError(f"sigma = {std} at t = {now.t:g}: Theorem 1 needs sigma > 0")
        # The last step is N(f_theta, sigma^2 I), whose sigma has no upper bound.
        c = 1.0 if next.t == 0 else weight_of_x0(now, next, std)
        weights.append(c**2 / (2 * std**2))
    return np.array(weights)


def constant(levels: Sequence[Level], sigma: Sequence[float], dimensions: int, power: float) -> float:
    """The constant C of Theorem 1, J_sigma = L_gamma + C, which does not depend on the network.

    It is KL(q(x_T | x_0) || N(0, I)), averaged over the data, plus d/2 log(2 pi sigma_1^2) from the last step.

    Args:
        levels: S + 1 levels, falling, the last one clean data.
        sigma: S standard deviations > 0.
        dimensions: d.
        power: E ||x_0||^2 of the data.
    """
    return _prior(power, dimensions, levels[0]) + 0.5 * dimensions * math.log(2 * math.pi * sigma[-1] ** 2)


def kernel_mean(row: Row, prediction: Prediction) -> Tensor:
    """Eq. (10): the mean of p_theta(x_s | x_t) = q_sigma(x_s | x_t, f_theta(x_t)), eq. (7) with f_theta for x_0.

    At the last step, to s = 0, it is f_theta(x_1) itself. With the true (x_0, eps) it is the mean of eq. (7).

    Args:
        row: A plan's row with one weight on x_0 and one on eps.
        prediction: The pair (f_theta, eps_theta) at x_t.
    """
    return prediction.x0 * row.x0[0] + prediction.eps * row.eps[0]


def step_kl(row: Row, truth: Prediction, predicted: Prediction) -> Tensor:
    """Eqs. (30), (31) and (32): KL(q_sigma(x_s | x_t, x_0) || p_theta(x_s | x_t)) of one step, for each sample.

    Both are Gaussians. If the plan's noise z equals the kernel's sigma, only the means differ, in both terms that
    contain x_0; otherwise (sigma-hat, the optimal variance) the variances differ as well.

    Args:
        row: The step, to a level that is not clean data, with sigma > 0.
        truth: (x_0, eps) of x_t, each (N, ...).
        predicted: (f_theta, eps_theta) at x_t, each (N, ...).

    Returns:
        float64, (N,), >= 0, in nats.

    Raises:
        ValueError: If the step is deterministic, which makes the divergence infinite.
    """
    if not (row.sigma > 0 and row.z > 0):
        raise ValueError(f"the step from t = {row.now.t:g} to {row.next.t:g} adds no noise: its divergence is infinite")
    error = Prediction(truth.x0.double() - predicted.x0.double(), truth.eps.double() - predicted.eps.double())
    distance = kernel_mean(row, error).square().flatten(1).sum(1)
    ratio = (row.sigma / row.z) ** 2
    dimensions = truth.x0[0].numel()
    return distance / (2 * row.z**2) + 0.5 * dimensions * (ratio - 1 - math.log(ratio))


def last_term(x0: Tensor, mean: Tensor, sigma: float, bin_width: float | None = None) -> Tensor:
    """Eqs. (33) and (34): -log p_theta(x_0 | x_1), a Gaussian N(f_theta(x_1), sigma_1^2 I) at the data.

    With a bin width it is the discretised Gaussian of Ho et al. (2020): the probability of the value's bin, where the
    first and the last bin (at -1 and 1) extend to infinity. Then the bound is on the probability of 8-bit data.

    Args:
        x0: The data, (N, ...); with bins, in [-1, 1] and at bin centres.
        mean: f_theta(x_1), the shape of x0.
        sigma: sigma_1 > 0.
        bin_width: Width of a bin, 2/255 for 8-bit images; None for a density.

    Returns:
        float64, (N,), in nats.

    Raises:
        ValueError: If sigma is not > 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma = {sigma}: the last term needs sigma > 0")
    difference = x0.double() - mean.double()
    if bin_width is None:
        return -log_normal(difference, 0.0, sigma)
    half = bin_width / 2
    upper = torch.where(x0 > 1 - half, math.inf, (difference + half) / sigma)
    lower = torch.where(x0 < -1 + half, -math.inf, (difference - half) / sigma)
    return -log_interval(lower, upper).flatten(1).sum(1)


def log_interval(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)) of the standard normal, accurate far out in both tails.

    Args:
        lower: float64, (...), may be -inf.
        upper: float64, (...), > lower, may be inf.
    """
    # By symmetry, move both ends to the lower tail, where log_ndtr is accurate.
    flip = lower + upper > 0
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    top = torch.special.log_ndtr(high)
    log_difference: Tensor = top + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - top))
    return log_difference


def prior_term(x0: Tensor, top: Level) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) for each sample: float64, (N,), in nats."""
    x = x0.double().flatten(1)
    return _prior(x.square().sum(1), x.shape[1], top)


def _prior(power: Power, dimensions: int, top: Level) -> Power:
    return 0.5 * (top.alpha_bar * power + dimensions * (top.variance - 1 - math.log(top.variance)))


def check_bound(plan: Plan, last_sigma: float) -> Plan:
    """Check that a plan has a finite bound: it ends at clean data, and every row has the form of eq. (12).

    Every step except the last must add noise. Returns the plan.

    Raises:
        DdimError: If a condition does not hold.
    """
    if plan.end.t != 0:
        raise DdimError("plan", f"ends at t = {plan.end.t:g}", "use a plan that ends at t = 0")
    for row in plan.rows:
        where = f"the step from t = {row.now.t:g} to {row.next.t:g}"
        if row.x or len(row.x0) != 1 or len(row.eps) != 1:
            raise DdimError(where, "is not of the form of eq. (12)", "use a plan of samplers.ddim")
        if row.next.t > 0 and not (row.sigma > 0 and row.z > 0):
            raise DdimError(where, "has sigma 0, so the bound is infinite", "use eta > 0, or the method ode")
    check_last_sigma(last_sigma)
    return plan


def check_last_sigma(last_sigma: float) -> None:
    """Check that sigma_1 is a finite number > 0.

    Raises:
        DdimError: If it is not.
    """
    if not 0 < last_sigma < math.inf:
        raise DdimError(f"sigma_1 {last_sigma:g}", "is not a number > 0", "use a positive standard deviation")


def terms(
    denoise: Denoiser,
    plan: Plan,
    x0: Tensor,
    noise: Callable[[int], Tensor],
    last_sigma: float,
    bin_width: float | None = None,
) -> Iterator[Tensor]:
    """Eqs. (11) and (29): J_sigma as a sum of exact divergences, each at one sample of x_t from eq. (4).

    J_sigma = E[log q_sigma(x_{1:T} | x_0) - log p_theta(x_{0:T})] >= -log p_theta(x_0), for any sub-sequence of
    timesteps. KL(q(x_T | x_0) || N(0, I)) is yielded first, then the terms in the order of the plan; their sum is
    J_sigma.

    Args:
        denoise: The denoiser.
        plan: A plan of eq. (12) with noise at every step except the last, see `check_bound`.
        x0: The data, (N, ...).
        noise: `noise(k)` returns the standard normal numbers of row k, the shape of x0.
        last_sigma: sigma_1, the standard deviation of p_theta(x_0 | x_1).
        bin_width: See `last_term`.

    Yields:
        float64, (N,): 1 + S tensors, in nats.

    Raises:
        DdimError: See `check_bound`.
    """
    check_bound(plan, last_sigma)
    denoise = as_planned(denoise, plan)
    yield prior_term(x0, plan.start)
    for k, row in enumerate(plan.rows):
        yield row_term(denoise, row, x0, noise(k), last_sigma, bin_width)


def row_term(
    denoise: Denoiser, row: Row, x0: Tensor, eps: Tensor, last_sigma: float, bin_width: float | None = None
) -> Tensor:
    """The term of a row in the bound at one sample of x_t, see `terms`: float64, (N,), in nats.

    Args:
        denoise: The denoiser, with the plan's hook applied.
        row: The row.
        x0: The data, (N, ...).
        eps: Standard normal, the shape of x0.
        last_sigma: sigma_1.
        bin_width: See `last_term`.
    """
    predicted = denoise(diffuse(x0, eps, row.now), row.query)
    if row.next.t > 0:
        return step_kl(row, Prediction(x0, eps), predicted)
    return last_term(x0, kernel_mean(row, predicted), last_sigma, bin_width)


def accelerated_bound(
    denoise: Denoiser,
    plan: Plan,
    x0: Tensor,
    noise: Callable[[int], Tensor],
    last_sigma: float,
    outside: Sequence[tuple[Level, float]],
) -> Tensor:
    """Eqs. (54), (55), (56), (57) and (58): the objective of Appendix C for a plan over tau and timesteps outside it.

    Its generative model is p(x_T) prod_i p_theta(x_{tau_{i-1}} | x_{tau_i}) with the kernels of eq. (10), used for
    sampling, times N(x_0; f_theta(x_t), sigma_t^2 I) for every t outside tau, used only in the objective. The entropy
    of q(x_t | x_0) at those t is omitted, because it does not depend on the network.

    Args:
        denoise: The denoiser.
        plan: The plan over tau, see `terms`.
        x0: The data, (N, ...).
        noise: `noise(k)` returns standard normal numbers, the shape of x0, first for the rows of the plan, then for
            `outside`.
        last_sigma: sigma_1.
        outside: The levels outside tau, each with its sigma_t > 0.

    Returns:
        float64, (N,), in nats: the sum of `terms`, plus -log p_theta(x_0 | x_t) for each t outside tau.

    Raises:
        DdimError: See `check_bound`.
        ValueError: If a sigma_t is not > 0.
    """
    total = torch.stack([*terms(denoise, plan, x0, noise, last_sigma)]).sum(0)
    for place, (level, sigma) in enumerate(outside):
        x = diffuse(x0, noise(len(plan) + place), level)
        total = total + last_term(x0, as_planned(denoise, plan)(x, level).x0, sigma)
    return total
