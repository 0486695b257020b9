"""Likelihood by the probability-flow ODE: the trace of its Jacobian is integrated together with the state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.data.pixels import BIN
from ddim.objective.elbo import last_term
from ddim.plan.plan import Plan
from ddim.process.gaussian import diffuse, log_normal
from ddim.process.parameterization import Denoiser, Prediction, x0_from_eps
from ddim.process.schedule import Level
from ddim.sampling.loop import run


@dataclass(frozen=True, slots=True)
class Traced:
    """A denoiser of augmented states (N, d + 1): the last component is the integral of the trace of the ODE's Jacobian.

    Along eq. (14), d xbar / d v = eps_theta, the log-density of xbar changes by -tr(d eps_theta / d xbar) dv (Chen et
    al. 2018). The trace is an additional component of eps, so that any plan integrates it with the usual sampling loop.

    Args:
        denoise: The denoiser of states (N, *shape), differentiable.
        shape: Shape of one sample.
        probes: Hutchinson probes (K, N, d) with mean 0 and covariance I; the trace is estimated as
            mean_k p_k^T J p_k. None for the exact trace, with d backward passes per evaluation.
    """

    denoise: Denoiser
    shape: tuple[int, ...]
    probes: Tensor | None = None

    def __call__(self, state: Tensor, level: Level, /) -> Prediction:
        """The prediction for augmented states (N, d + 1)."""
        with torch.enable_grad():
            x = state[:, :-1].detach().requires_grad_()
            eps = self.denoise(x.reshape(-1, *self.shape), level).eps.flatten(1)
            trace = self._trace(eps, x) * level.signal  # d / d xbar = signal d / d x
        augmented = torch.cat([eps.detach(), trace[:, None]], 1)
        return Prediction(x0_from_eps(augmented, state, level), augmented)

    def _trace(self, eps: Tensor, x: Tensor) -> Tensor:
        if self.probes is None:
            rows = torch.eye(x.shape[1], dtype=eps.dtype, device=eps.device)[:, None].expand(-1, len(x), -1)
        else:
            rows = self.probes.to(eps)
        total = torch.zeros(len(x), dtype=eps.dtype, device=eps.device)
        for k, row in enumerate(rows):
            [pulled] = torch.autograd.grad(eps, x, row, retain_graph=k < len(rows) - 1)
            total = total + (pulled * row).sum(1)
        return total if self.probes is None else total / len(rows)


def standard_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I) of each sample of (N, d)."""
    return log_normal(x, 0.0, 1.0)


def log_density(
    denoise: Denoiser,
    plan: Plan,
    x: Tensor,
    probes: Tensor | None = None,
    prior: Callable[[Tensor], Tensor] = standard_normal,
) -> Tensor:
    """The log-density of a model by the ODE (14) and the change of variables.

    Args:
        denoise: The denoiser, differentiable.
        plan: A plan without noise or clipping with increasing t > 0, from the level of x to the noisiest, such as
            `samplers.runge_kutta`. It determines the accuracy: compare with a plan of half the steps.
        x: States at the plan's first level, (N, ...).
        probes: Hutchinson probes, see `Traced`.
        prior: The log-density of states (N, d) at the plan's last level.

    Returns:
        Log-density of x itself (not of xbar = x / signal) in nats, float64, (N,).

    Raises:
        ValueError: If the plan has noise or clipping, or t does not increase from above 0.
    """
    if plan.stochastic or plan.clip_x0 or plan.start.t == 0 or not plan.end.log_snr < plan.start.log_snr:
        raise ValueError("the change of variables needs a plan of increasing t > 0, without noise or clipping")
    flat = x.flatten(1).double()
    state = torch.cat([flat, torch.zeros_like(flat[:, :1])], 1)
    final = run(Traced(denoise, tuple(x.shape[1:]), probes), plan, state)
    scale = flat.shape[1] * math.log(plan.end.signal / plan.start.signal)
    return prior(final[:, :-1]) + scale + final[:, -1] / plan.end.signal


def bits(nats: Tensor, dimensions: int) -> Tensor:
    """Convert negative log-likelihoods in nats, summed over the dimensions, to bits per dimension."""
    return nats / (dimensions * math.log(2))


def discrete_nats(
    density: Callable[[Tensor], Tensor],
    denoise: Denoiser,
    first: Level,
    x0: Tensor,
    eps: Tensor,
    last_sigma: float | None = None,
) -> Tensor:
    """One-sample estimate of an upper bound on -log P(x_0) of 8-bit data, from a continuous density at the first level.

    With `last_sigma` the data are dequantised by the diffusion's noise: x_1 = eq. (4) of x_0, and
    -log P(x_0) <= E[log q(x_1 | x_0) - log p(x_1) - log P(x_0 | x_1)], where the last factor is the discretised
    Gaussian of the variational bound, so that the two methods differ only in -log p(x_1). Without it the data are
    dequantised by uniform noise of one bin's width, and the result is used as xbar at the first level.

    Args:
        density: log p of states at `first`, a function from (N, ...) to (N,).
        denoise: The denoiser.
        first: The first level above clean data.
        x0: 8-bit data in [-1, 1], (N, ...).
        eps: Standard normal noise with the shape of x0.
        last_sigma: sigma_1 of the discretised last step; None for uniform dequantisation.

    Returns:
        float64, (N,), in nats.

    Raises:
        ValueError: If last_sigma is not > 0.
    """
    dimensions = x0[0].numel()
    if last_sigma is None:
        uniform = torch.special.ndtr(eps.double()) - 0.5
        x = (x0.double() + BIN * uniform) * first.signal
        return -density(x) - dimensions * math.log(BIN * first.signal)
    x = diffuse(x0, eps, first)
    log_q = standard_normal(eps.double().flatten(1)) - dimensions * math.log(first.noise)
    with torch.no_grad():
        mean = denoise(x, first).x0
    return log_q - density(x) + last_term(x0, mean, last_sigma, BIN)
