"""Mutation tests: plant known bugs one at a time in a copy of src/ddim and run the test that must fail.

    python scripts/mutations.py           plant them all and write docs/mutations.md; `make mutations` does this
    python scripts/mutations.py NAME ...  plant those whose names contain one of the words

The exit code is 1 if a test does not notice its bug, or if a text is not found exactly once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "mutations.md"


class Mutation(NamedTuple):
    """One planted bug: in `file` of src/ddim, `old` becomes `new`, and `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "alpha_bar of the next time, an index off by one",
        "process/schedule.py",
        "float(self.log_snr[below - 1])",
        "float(self.log_snr[min(below, self.T - 1)])",
        "test_schedule.py::test_each_named_schedule_equals_its_published_formula",
    ),
    Mutation(
        "alpha_bar as a cumulative product in float32",
        "process/schedule.py",
        "log_alpha_bar = np.cumsum(np.log1p(-beta))",
        "log_alpha_bar = np.log(np.cumprod(1 - beta.astype(np.float32))).astype(np.float64)",
        "test_schedule.py::test_the_variance_near_clean_data_is_precise",
    ),
    Mutation(
        "square root dropped: noise is the variance",
        "process/schedule.py",
        "return math.sqrt(self.variance)",
        "return self.variance",
        "test_gaussian.py::test_diffuse_is_the_forward_marginal",
    ),
    Mutation(
        "sigma where sigma squared belongs, eq. (7)",
        "process/gaussian.py",
        "left = next.variance - sigma**2",
        "left = next.variance - sigma",
        "test_gaussian.py::test_the_posterior_preserves_the_marginal",
    ),
    Mutation(
        "eta on the variance instead of the standard deviation, eq. (16)",
        "process/gaussian.py",
        "return eta * math.sqrt(next.variance / now.variance)",
        "return math.sqrt(eta) * math.sqrt(next.variance / now.variance)",
        "test_gaussian.py::test_eta_multiplies_the_standard_deviation",
    ),
    Mutation(
        "now and next swapped in eq. (16)",
        "process/gaussian.py",
        "return eta * math.sqrt(next.variance / now.variance)",
        "return eta * math.sqrt(now.variance / next.variance)",
        "test_gaussian.py::test_sigma_of_eta_one_is_the_forward_chains_posterior",
    ),
    Mutation(
        "Bayes' rule with the wrong level's variance, eq. (8)",
        "process/gaussian.py",
        "of_x = next.noise * direction / now.variance",
        "of_x = next.noise * direction / next.variance",
        "test_joint.py::test_both_directions_give_the_joint_distribution",
    ),
    Mutation(
        "T // S arithmetic in the linear timesteps",
        "process/timesteps.py",
        "return [i * top // steps for i in range(1, steps + 1)]",
        "return [i * (top // steps) for i in range(1, steps + 1)]",
        "test_timesteps.py::test_linear_and_quadratic_are_the_floors_of_the_paper",
    ),
    Mutation(
        "x_0 clipped, eps not derived again",
        "process/parameterization.py",
        "return Prediction(x0, eps_from_x0(x0, x, level), self.variance_fraction)",
        "return Prediction(x0, self.eps, self.variance_fraction)",
        "test_denoiser.py::test_clipped_pairs_stay_consistent",
    ),
    Mutation(
        "(x_t - eps) / sqrt(abar_t), eq. (9) as misprinted",
        "process/parameterization.py",
        "return (x - eps * level.noise) / level.signal",
        "return (x - eps) / level.signal",
        "test_denoiser.py::test_f_theta",
    ),
    Mutation(
        "noise at the last step of sigma-hat",
        "samplers/ddim.py",
        "if named and not noise_at_end:",
        "if named == 'optimal' and not noise_at_end:",
        "test_samplers.py::test_sigma_hat",
    ),
    Mutation(
        "sigma for sigma squared in the optimal variance",
        "samplers/ddim.py",
        "math.hypot(sigma, weight_of_x0(now, next, sigma) * now.ratio * math.sqrt(error))",
        "math.hypot(sigma, weight_of_x0(now, next, sigma) * now.ratio * error)",
        "test_sigma_optimal.py::test_on_gaussian_data_the_last_mean_and_variance_are_exact",
    ),
    Mutation(
        "a factor 2 missing in the divergence, eq. (31)",
        "objective/elbo.py",
        "return distance / (2 * row.z**2)",
        "return distance / row.z**2",
        "test_elbo.py::test_step_kl_is_the_kl_of_two_gaussians",
    ),
    Mutation(
        "x_0's second occurrence in the mean of eq. (7) left out, Theorem 1",
        "objective/elbo.py",
        "c = 1.0 if next.t == 0 else weight_of_x0(now, next, std)",
        "c = 1.0 if next.t == 0 else next.signal",
        "test_elbo.py::test_j_is_l_gamma_plus_a_constant",
    ),
    Mutation(
        "d left out of the constant of Theorem 1",
        "objective/elbo.py",
        "+ 0.5 * dimensions * math.log(",
        "+ 0.5 * math.log(",
        "test_elbo.py::test_with_the_true_noise_the_bound_is_the_constant",
    ),
    Mutation(
        "d left out of bits per dimension",
        "evaluation/likelihood.py",
        "return nats / (dimensions * math.log(2))",
        "return nats / math.log(2)",
        "test_elbo.py::test_bits_per_dimension",
    ),
    Mutation(
        "the outer bins of the discretised last step do not extend to infinity",
        "objective/elbo.py",
        "torch.where(x0 > 1 - half, math.inf, (difference + half) / sigma)",
        "(difference + half) / sigma",
        "test_elbo.py::test_the_discretised_last_term_is_a_distribution",
    ),
    Mutation(
        "the trace with respect to x instead of xbar",
        "evaluation/likelihood.py",
        "self._trace(eps, x) * level.signal",
        "self._trace(eps, x)",
        "test_likelihood.py::test_gaussian_data_against_the_datas_own_density",
    ),
    Mutation(
        "Euler in dt with v for v squared, eq. (15)",
        "samplers/runge_kutta.py",
        "(following.ratio**2 - now.ratio**2) / (2 * now.ratio)",
        "(following.ratio - now.ratio) / (2 * now.ratio)",
        "test_ode.py::test_probability_flow_is_eq_15",
    ),
    Mutation(
        "abar_t for abar_s in the mixture of Appendix A, eq. (18)",
        "process/categorical.py",
        "to_x0 = next.alpha_bar - sigma * now.alpha_bar",
        "to_x0 = now.alpha_bar - sigma * next.alpha_bar",
        "test_categorical.py::test_the_posterior_preserves_marginals",
    ),
    Mutation(
        "eta reversed for discrete data: eta = 0 redraws every token",
        "samplers/categorical.py",
        "(1 - eta) * sigma_largest(now, next)",
        "eta * sigma_largest(now, next)",
        "test_categorical_plan.py::test_eta_scales_between_the_least_and_the_most_random_kernel",
    ),
    Mutation(
        "the reverse Markov chain as if x_0 never equalled x_t",
        "process/categorical.py",
        "other + same * ((1 - again) * here + again * pi)",
        "other + same * (keep * here + to_x0 * here + fresh * pi)",
        "test_categorical_plan.py::test_the_markov_kernel_is_the_reversal_of_the_chain",
    ),
    Mutation(
        "the draw of x_0 and that of the noise from one uniform number",
        "plan/categorical.py",
        "torch.where(noisy, sample_categorical(fresh[..., 2], pi), kept_or_x0)",
        "torch.where(noisy, sample_categorical(fresh[..., 1], pi), kept_or_x0)",
        "test_categorical_plan.py::test_samples_of_a_row_have_the_distribution_of_its_kernel",
    ),
    Mutation(
        "a category sampled with the wrong bin edge",
        "process/rng.py",
        "torch.searchsorted(edges, at.contiguous(), right=True)",
        "torch.searchsorted(edges, at.contiguous())",
        "test_categorical_plan.py::test_sample_categorical_inverts_the_distribution_function",
    ),
    Mutation(
        "cross-entropy of the noised token instead of x_0",
        "objective/cross_entropy.py",
        "-log_p.gather(-1, x0[..., None])",
        "-log_p.gather(-1, x[..., None])",
        "test_tokens.py::test_the_loss_is_the_cross_entropy_at_a_draw_of_eq_17",
    ),
    Mutation(
        "a mask allowed for x_0",
        "process/parameterization.py",
        "logits = logits.masked_fill(ids == alphabet.mask, -math.inf)",
        "logits = logits.masked_fill(ids == -1, -math.inf)",
        "test_tokens.py::test_x0_is_never_a_mask_and_unmasked_tokens_may_be_carried_over",
    ),
    Mutation(
        "x_0 integrated over noise / signal, which is for eps",
        "samplers/multistep.py",
        'if quantity == "eps" else (1, end.noise)',
        'if quantity == "eps" else (-1, end.noise)',
        "test_multistep.py::test_polynomials_are_integrated_exactly",
    ),
    Mutation(
        "UniPC without its correction",
        "samplers/multistep.py",
        "change = [keep * weight for weight in _correction(previous, previous_nodes)]",
        "change = [0.0 * weight for weight in _correction(previous, previous_nodes)]",
        "test_multistep.py::test_unipc_with_one_state_is_unipc_with_two",
    ),
    Mutation(
        "a wrong Adams-Bashforth coefficient with the correct sum",
        "samplers/multistep.py",
        "3: (23 / 12, -16 / 12, 5 / 12)",
        "3: (23 / 12, -15 / 12, 4 / 12)",
        "test_multistep.py::test_ipndm_is_adams_bashforth_on_evenly_spaced_levels",
    ),
    Mutation(
        "2M extrapolated to the end of the step, not to its middle",
        "samplers/multistep.py",
        "/ (now.log_snr - nodes[1].log_snr) / 2",
        "/ (now.log_snr - nodes[1].log_snr)",
        "test_multistep.py::test_second_order_dpm_solver_pp_is_algorithm_2",
    ),
    Mutation(
        "timesteps drawn by importance, and the loss weighted too",
        "objective/timestep_sampling.py",
        'return self.weights[t - 1] * error if self.drawn == "uniform" else error',
        "return self.weights[t - 1] * error",
        "test_times.py::test_uniform_and_importance_sampling_have_the_same_expected_loss_up_to_the_mean_weight",
    ),
    Mutation(
        "an EMA with the wrong half-life",
        "nn/ema.py",
        "-math.log(2) / math.log1p(-half_life)",
        "1 / half_life",
        "test_budget.py::test_half_of_the_ema_weight_lies_within_the_half_life",
    ),
    Mutation(
        "a budget that reserves no time for the last checkpoint",
        "train/clock.py",
        "max(self.seconds - reserved, 1e-9)",
        "self.seconds",
        "test_budget.py::test_a_run_ends_within_its_budget_with_a_checkpoint_and_a_decayed_learning_rate",
    ),
    Mutation(
        "the time between two processes counted in the budget",
        "train/run.py",
        'self.clock.before = entry(meta, "used", float, folder, self.seconds)',
        "self.clock.before = 0.0",
        "test_budget.py::test_time_between_stop_and_resume_does_not_count",
    ),
    Mutation(
        "parallel sampling: a state after one that has not converged taken as converged",
        "sampling/parallel.py",
        "done += [True, *converged[1:], False].index(False)",
        "done += max(1, sum(converged))",
        "test_parallel.py::test_the_window_moves_past_the_leading_converged_states_only",
    ),
    Mutation(
        "parallel sampling: the network's x_0 cached instead of its output",
        "sampling/parallel.py",
        'return predict(v_from_pair(prediction.x0, prediction.eps, level), x, level, "v")',
        "return prediction",
        "test_parallel.py::test_the_error_is_about_the_tolerance_and_there_are_far_fewer_rounds_than_rows",
    ),
)

HEAD = """\
# Mutation tests

`make mutations` plants each of these bugs in a copy of the code and runs the test in the last column, which must fail;
all of them did when this page was generated. A test of the default suite verifies that the list still matches the code:
each replaced text must occur exactly once in its file.

| bug | file | test that fails |
|-|-|-|
"""


def noticed(mutation: Mutation) -> bool:
    """Whether the test passes without the bug, and fails (not by an error in collecting it) with it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        before = _run(mutation.test, copy)
        (copy / "ddim" / mutation.file).write_text(planted(mutation), encoding="utf-8")
        after = _run(mutation.test, copy)
        return before.returncode == 0 and after.returncode == 1 and "FAILED" in after.stdout


def _run(test: str, source: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", f"tests/{test}"]
    env = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def planted(mutation: Mutation) -> str:
    """The file's text with the bug in it.

    Raises:
        ValueError: If the text to be replaced does not occur exactly once.
    """
    text = (ROOT / "src" / "ddim" / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} contains {text.count(mutation.old)} times: {mutation.old}")
    return text.replace(mutation.old, mutation.new)


def page() -> str:
    """The text of docs/mutations.md."""
    rows = []
    for mutation in MUTATIONS:
        file, _, test = mutation.test.partition("::")
        change = f"`{mutation.old}` becomes `{mutation.new}`"
        rows.append(f"| {mutation.name}: {change} | `src/ddim/{mutation.file}` | `tests/{file}::{test}` |")
    return HEAD + "\n".join(rows) + "\n"


def main(names: list[str]) -> int:
    """Plant all bugs, or those whose names contain one of the words."""
    chosen = [mutation for mutation in MUTATIONS if not names or any(name in mutation.name for name in names)]
    if not chosen:
        print(f"error: {' '.join(names)}: matches no bug; see the names in docs/mutations.md", file=sys.stderr)
        return 2
    missed = 0
    for mutation in chosen:
        detected = noticed(mutation)
        missed += not detected
        print(f"{'noticed' if detected else 'MISSED '}  {mutation.name}  ({mutation.test})", flush=True)
    if missed:
        print(f"error: {missed} of {len(chosen)} bugs went unnoticed", file=sys.stderr)
    elif not names:
        PAGE.write_text(page(), encoding="utf-8")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
