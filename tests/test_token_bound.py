"""The bound for discrete data by enumeration, and the sampler with the ideal predictor, exactly."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import SCHEDULES, randn
from ddim import samplers
from ddim.errors import DdimError
from ddim.objective import categorical_elbo
from ddim.plan.categorical import CategoricalPlan
from ddim.process import timesteps
from ddim.process.categorical import Alphabet, marginal, markov_posterior, posterior
from ddim.process.parameterization import TokenPrediction
from ddim.process.schedule import Level, from_betas, zero_terminal_snr

SHORT = from_betas([0.1, 0.25, 0.3, 0.4, 0.6, 0.9], "short")
MASKED = zero_terminal_snr(SHORT)
CONVERGENCE = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "token_convergence.py"))
KERNELS: dict[str, Any] = {
    "eta 0": samplers.discrete,
    "eta 0.4": lambda levels, alphabet: samplers.discrete(levels, alphabet, 0.4),
    "markov": samplers.discrete_markov,
}
every_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)


def network(alphabet: Alphabet, levels: tuple[Level, ...], seed: int = 0) -> dict[Level, Tensor]:
    """f_theta: for each level p(x_0 | x_t), (K, K)."""
    made = {}
    for level in levels:
        logits = 2 * randn(alphabet.size, alphabet.size, seed=seed + int(level.t))
        if alphabet.mask is not None:
            logits[:, alphabet.mask] = -math.inf
        made[level] = logits.softmax(-1)
        for x in range(alphabet.size if alphabet.carry_over else 0):
            if x != alphabet.mask:
                made[level][x] = torch.nn.functional.one_hot(torch.tensor(x), alphabet.size)
    return made


def kernel(plan: CategoricalPlan, x_t: Tensor, x0: Tensor, k: int) -> Tensor:
    row, pi = plan.rows[k], torch.tensor(plan.pi, dtype=torch.float64)
    if plan.kernel == "markov":
        return markov_posterior(x_t, x0, row.now, row.next, pi)
    return posterior(x_t, x0, row.now, row.next, row.keep, pi)


@pytest.mark.parametrize("noise", ["uniform", "mask"])
@pytest.mark.parametrize("times", [(6, 5, 4, 3, 2, 1, 0), (6, 3, 1, 0), (6, 0)], ids=str)
@every_kernel
def test_the_terms_are_the_expected_log_ratio_on_paths(make: Any, times: tuple[int, ...], noise: str) -> None:
    """Averaged over x_t the terms are E_q[log q(x_{1:T} | x_0) - log p_theta(x_{0:T})], for any sub-sequence of times
    (Appendix C, discrete data), and at least -log p_theta(x_0)."""
    alphabet = Alphabet.uniform(3) if noise == "uniform" else Alphabet.masked(2, carry_over=True)
    K, data = alphabet.size, [0, 1]
    levels = (SHORT if noise == "uniform" else MASKED).levels(times)
    plan, f = make(levels, alphabet), network(alphabet, levels)
    eye, ids = torch.eye(K, dtype=torch.float64), torch.arange(K)
    p_steps = [kernel(plan, ids, f[row.now], k) for k, row in enumerate(plan.rows)]
    likelihood = alphabet.pi
    for step in p_steps:
        likelihood = likelihood @ step

    def denoise(x: Tensor, level: Level, /) -> TokenPrediction:
        return TokenPrediction(f[level][x])

    for x0 in data:
        top = marginal(ids, plan.start, alphabet.pi)[x0]
        q_steps = [kernel(plan, ids, eye[x0].expand(K, K), k) for k in range(len(plan))]
        expected = 0.0
        for path in itertools.product(range(K), repeat=len(plan)):
            q, p = float(top[path[0]]), float(alphabet.pi[path[0]])
            for k, (x_t, x_s) in enumerate(itertools.pairwise([*path, x0])):
                q, p = q * float(q_steps[k][x_t, x_s]), p * float(p_steps[k][x_t, x_s])
            expected += q * math.log(q / p) if q else 0.0
        bound = float(categorical_elbo.prior_term(plan, torch.tensor([[x0]])))
        for row in plan.rows:
            chances = marginal(ids, row.now, alphabet.pi)[x0]
            for x_t in [x for x in range(K) if chances[x] > 0]:
                # Uniform numbers that lead to this x_t: x_0 kept, or replaced by x_t.
                low = float(alphabet.pi[:x_t].sum())
                kept = x_t == x0 and row.now.alpha_bar > 0
                fresh = torch.tensor([[[0.0 if kept else 1 - 1e-12, low + float(alphabet.pi[x_t]) / 2]]])
                term = categorical_elbo.row_term(denoise, plan, row, torch.tensor([[x0]]), fresh.double())
                bound += float(chances[x_t]) * float(term)
        assert bound == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert bound >= -math.log(float(likelihood[x0])) - 1e-12


def test_terms_add_up_over_tokens_and_rows() -> None:
    alphabet, levels = Alphabet.uniform(3), SHORT.levels((6, 3, 1, 0))
    plan, f = samplers.discrete_markov(levels, alphabet), network(alphabet, levels)
    x0, u = (
        torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]]),
        torch.rand(3, 2, 4, 3, generator=torch.Generator().manual_seed(1)),
    )

    def denoise(x: Tensor, level: Level, /) -> TokenPrediction:
        return TokenPrediction(f[level][x])

    whole = [*categorical_elbo.terms(denoise, plan, x0, lambda k: u[k].double())]
    assert [term.shape for term in whole] == [(2,)] * 4
    for place in range(4):
        part = [*categorical_elbo.terms(denoise, plan, x0[:, [place]], lambda k, p=place: u[k][:, [p]].double())]
        whole = [all_ - one for all_, one in zip(whole, part, strict=True)]
    torch.testing.assert_close(torch.stack(whole), torch.zeros(4, 2).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [5, 50, 500])
def test_the_bound_of_the_markov_chain_with_the_ideal_predictor_is_the_entropy_unlike_that_of_a_fixed_eta(
    steps: int,
) -> None:
    """One token, the true p(x_0 | x_t): the Markov mixture's bound is H for every S; J at a fixed eta grows with S."""
    p0 = torch.tensor([0.55, 0.25, 0.15, 0.05], dtype=torch.float64)
    entropy = float(-(p0 * p0.log()).sum())
    alphabet, made = Alphabet.uniform(4), zero_terminal_snr(SCHEDULES["cosine"])
    levels = timesteps.sampling_levels(made, "x0", "linear", steps)
    ids, eye = torch.arange(4), torch.eye(4, dtype=torch.float64)

    def ideal(level: Level) -> Tensor:
        joint = p0[:, None] * marginal(ids, level, alphabet.pi)  # x_0, x_t
        return (joint / joint.sum(0)).T

    def bound(plan: CategoricalPlan) -> float:
        total = 0.0
        for k, row in enumerate(plan.rows):
            joint = p0[:, None] * marginal(ids, row.now, alphabet.pi)
            guess = kernel(plan, ids, ideal(row.now), k)
            for x0 in range(4):
                q = kernel(plan, ids, eye[x0].expand(4, 4), k)
                each = torch.where(q > 0, q * (q.clamp_min(1e-300) / guess).log(), 0.0).sum(1)
                total += float((joint[x0] * each).sum())
        return total

    markov = bound(samplers.discrete_markov(levels, alphabet))
    assert markov == pytest.approx(entropy, rel=1e-9)
    smallest, fixed = bound(samplers.discrete(levels, alphabet)), bound(samplers.discrete(levels, alphabet, 0.1))
    assert entropy < smallest < 1.5 * entropy
    assert entropy < fixed
    if steps == 500:
        assert fixed > 3 * smallest


@pytest.mark.parametrize("noise", ["uniform", "mask"])
@pytest.mark.parametrize("kernel_name", ["eta 0", "eta 1/S", "markov"])
def test_with_the_ideal_predictor_samples_converge_to_the_data(kernel_name: str, noise: str) -> None:
    """All 81 or 256 sequences enumerated: the distance falls by half when the steps double; first order."""
    alphabet = Alphabet.uniform(3) if noise == "uniform" else Alphabet.masked(3)
    data = CONVERGENCE["chain"](alphabet)
    made, distances = zero_terminal_snr(SCHEDULES["cosine"]), []
    for steps in (8, 16, 32):
        levels = timesteps.sampling_levels(made, "x0", "equal-angle", steps)
        if kernel_name == "markov":
            plan = samplers.discrete_markov(levels, alphabet)
        else:
            plan = samplers.discrete(levels, alphabet, 0.0 if kernel_name == "eta 0" else 1 / steps)
        _, mass = CONVERGENCE["output"](plan, data)
        assert float(mass.sum()) == pytest.approx(1, abs=1e-9)
        distances.append(CONVERGENCE["distance"](plan, data))
    assert distances[0] < 0.12
    for coarse, fine in itertools.pairwise(distances):
        assert 0.42 < fine / coarse < 0.58


def test_with_a_fixed_eta_samples_do_not_converge_to_the_data() -> None:
    """Each step redraws a fixed fraction of all tokens at once, independently: doubling S does not halve it."""
    alphabet, made = Alphabet.uniform(3), zero_terminal_snr(SCHEDULES["cosine"])
    data = CONVERGENCE["chain"](alphabet)
    distances = [
        CONVERGENCE["distance"](
            samplers.discrete(timesteps.sampling_levels(made, "x0", "equal-angle", steps), alphabet, 1.0), data
        )
        for steps in (16, 32)
    ]
    assert distances[1] / distances[0] > 0.7


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.5}, {"top_p": 0.5}],
)
def test_a_sharpened_plan_has_no_bound(change: dict[str, float]) -> None:
    plan = samplers.discrete(SHORT.levels((6, 1, 0)), Alphabet.uniform(3), **change)
    with pytest.raises(DdimError, match=r"^plan: "):
        categorical_elbo.check_bound(plan)


def test_a_plan_that_does_not_end_at_clean_data_has_no_bound() -> None:
    with pytest.raises(DdimError, match=r"^plan: .*\bt = 1\b"):
        categorical_elbo.check_bound(samplers.discrete(SHORT.levels((6, 1)), Alphabet.uniform(3)))
