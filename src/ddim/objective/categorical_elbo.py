"""The variational bound of discrete data: exact divergences between categorical distributions, step by step.

All numbers are in nats, summed over tokens; `ddim.evaluation.likelihood_run` converts them to bits per token.

-log p_theta(x_0) <= KL(q(x_T | x_0) || pi) + sum_t KL(q(x_s | x_t, x_0) || p_theta(x_s | x_t)) - log p_theta(x_0 | x_1)

for both kernels of a `ddim.CategoricalPlan`, on any sub-sequence of timesteps. For "markov", p_theta averages the
reverse chain over the predicted x_0. For "ddim" with eta > 0, where sigma is a fixed fraction of the largest one, each
step redraws tokens that the step before had determined, and the bound grows with S without limit. At eta = 0 it does
not, but it is larger than the bound of the Markov chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.plan.categorical import CategoricalPlan, CategoricalRow
from ddim.process.categorical import divergence, kl, marginal, markov_posterior, noised
from ddim.process.parameterization import AnyDenoiser


def check_bound(plan: CategoricalPlan) -> CategoricalPlan:
    """Check that a plan has a bound: it ends at clean data and does not sharpen its predictions. Returns the plan.

    Raises:
        DdimError: If it does not.
    """
    if plan.end.t != 0:
        raise DdimError("plan", f"ends at t = {plan.end.t:g}", "use a plan that ends at t = 0")
    if plan.hook is not None:
        raise DdimError("plan", "has a temperature or top-p", "remove them: they change the model")
    return plan


def prior_term(plan: CategoricalPlan, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || pi) for each sample: float64, (N,), in nats.

    Args:
        plan: The plan; its start is T.
        x0: Ids (N, ...).
    """
    pi = torch.tensor(plan.pi, dtype=torch.float64, device=x0.device)
    each = divergence(marginal(torch.arange(len(pi), device=x0.device), plan.start, pi), pi)
    return each[x0].flatten(1).sum(1)


def row_term(denoise: AnyDenoiser, plan: CategoricalPlan, row: CategoricalRow, x0: Tensor, fresh: Tensor) -> Tensor:
    """The divergence of a row, or -log p_theta(x_0 | x_t) for the step to clean data, at one sample of x_t (eq. (17)).

    Args:
        denoise: The denoiser.
        plan: The plan, for its kernel and pi.
        row: The row.
        x0: Ids (N, ...).
        fresh: Uniform on [0, 1), (N, ..., 2 or more).

    Returns:
        float64, (N,), in nats.
    """
    pi = torch.tensor(plan.pi, dtype=torch.float64, device=x0.device)
    x = noised(x0, row.now.alpha_bar, fresh, pi)
    predicted = denoise(x, row.query).x0.double()
    if plan.kernel == "ddim":
        each = kl(x, x0, predicted, row.now, row.next, row.keep, pi)
    else:
        q, p = (markov_posterior(x, clean, row.now, row.next, pi) for clean in (x0, predicted))
        each = divergence(q, p)
    return each.flatten(1).sum(1)


def terms(denoise: AnyDenoiser, plan: CategoricalPlan, x0: Tensor, fresh: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """The terms of the bound, float64, (N,) each, in nats: `prior_term`, then `row_term` of each row.

    Args:
        denoise: The denoiser.
        plan: See `check_bound`.
        x0: Ids (N, ...).
        fresh: Maps a row's index to its random numbers, see `row_term`.

    Raises:
        DdimError: See `check_bound`.
    """
    check_bound(plan)
    yield prior_term(plan, x0)
    for k, row in enumerate(plan.rows):
        yield row_term(denoise, plan, row, x0, fresh(k))
