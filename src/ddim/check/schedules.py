"""Checks of a noise schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch

from ddim import samplers
from ddim.check.convergence import order
from ddim.check.finding import Finding, at_most, between, info, largest, skipped
from ddim.objective.elbo import prior_term
from ddim.process.gaussian import chain_weights, forward_weights, marginal_after, sigma
from ddim.process.schedule import Level, Schedule

HALF_BIN = 1 / 255
PRIOR = 1e-3
STRIDES = (1, 2, 5, 10, 50)


def schedule(schedule: Schedule) -> Iterator[Finding]:
    """Verify a schedule, and the DDIM equations on it; one or two seconds at T = 1000.

    Args:
        schedule: The schedule.

    Yields:
        One finding per check; only the first one if the log-SNR does not fall.
    """
    first = _falls(schedule)
    yield first
    if not first.passed:
        return
    levels = schedule.levels(range(schedule.T + 1))
    yield _prior(levels[-1])
    yield info("noise at t = 1, std", levels[1].noise, f"half of an 8-bit bin is {HALF_BIN:.3g}")
    yield _sigma_range(levels)
    yield _bayes(levels)
    yield _lemma(levels)
    yield _ddpm(levels)
    yield _inverse(schedule)
    yield _order(schedule)


def _falls(schedule: Schedule) -> Finding:
    name, table = "log-SNR falls, smallest step", schedule.log_snr
    if len(table) < 2:
        return skipped(name, "there is only one time")
    falls = table[:-1] - table[1:]
    at = int(np.argmin(falls))
    fall = float(falls[at])
    return Finding(name, fall, "> 0", fall > 0, f"from t = {at + 1} to {at + 2}")


def _prior(top: Level) -> Finding:
    """Check the KL divergence between q(x_T | x_0) and N(0, I), for data of power 1.

    The limit is a tenth of the last digit in which likelihoods are reported. It separates schedules that end in noise
    (linear: 3e-5) from those known not to (latent diffusion: 3e-3, Lin et al. 2023).
    """
    bits = float(prior_term(torch.ones(1, 1), top)) / math.log(2)
    note = f"KL for data of power 1; alpha_bar_T = {top.alpha_bar:.3g}"
    note += "" if bits <= PRIOR else "; 0 with zero_terminal_snr"
    return at_most("x_T against N(0, I), bits/dim", bits, PRIOR, note)


def _sigma_range(levels: tuple[Level, ...]) -> Finding:
    """Check sigma^2 <= 1 - abar_next at eta = 1, for adjacent times and for sub-sequences."""
    name = "sigma^2 / (1 - abar) at eta = 1"
    parts = {}
    for stride in STRIDES:
        for now, following in itertools.pairwise(levels[:0:-stride]):
            parts[now.t, following.t] = sigma(now, following) ** 2 / following.variance
    if not parts:
        return skipped(name, "there is only one time")
    (now_t, next_t), worst = max(parts.items(), key=lambda pair: pair[1])
    return Finding(name, worst, "<= 1", worst <= 1 + 1e-12, f"eq. (16); largest from t = {now_t:g} to {next_t:g}")


def _bayes(levels: tuple[Level, ...]) -> Finding:
    """Compare eq. (8), which is (7) inverted by Bayes' rule, with the Markov chain of eq. (3).

    Cancellation limits the accuracy to about 1e-8 where a step from t to t + 1 leaves little of x.
    """
    off = []
    for now, following in itertools.pairwise(levels[1:]):
        of_x, of_x0, std = forward_weights(now, following, sigma(following, now))
        chain_x, chain_std = chain_weights(now, following)
        off += [abs(of_x0), abs(of_x - chain_x), abs(std - chain_std)]
    note = "eq. (8) has the weights of eq. (3), and none on x_0"
    return at_most("eta = 1 is a Markov chain, error", largest(off), 1e-7, note)


def _lemma(levels: tuple[Level, ...]) -> Finding:
    """Check the marginals of Lemma 1 over all T steps, each with a random sigma in its valid range."""
    draws = np.random.Generator(np.random.Philox(key=0)).random(len(levels))
    signal, variance, off = levels[-1].signal, levels[-1].variance, []
    for k in range(len(levels) - 1, 0, -1):
        now, following = levels[k], levels[k - 1]
        signal, variance = marginal_after(signal, variance, now, following, float(draws[k]) * following.noise)
        off += [abs(signal - following.signal), abs(variance - following.variance)]
    note = f"induction over {len(levels) - 1} steps, each with a valid sigma"
    return at_most("Lemma 1, error of the marginals", largest(off), 1e-9, note)


def _ddpm(levels: tuple[Level, ...]) -> Finding:
    """Compare the plan at S = T, eta = 1 with the posterior of Ho et al. 2020, eqs. (6) and (7), from betas.

    The posterior mean is of_x0 x_0 + of_xt x_t, where x_t = signal x_0 + noise eps.
    """
    off = []
    for row in samplers.ddim(levels[::-1], eta=1.0).rows:
        t, s = row.now, row.next
        beta = -math.expm1(t.log_alpha_bar - s.log_alpha_bar)
        of_x0 = math.sqrt(s.alpha_bar) * beta / t.variance
        of_xt = math.sqrt(1 - beta) * s.variance / t.variance
        variance = s.variance / t.variance * beta
        off.append(abs(row.x0[0] - of_x0 - of_xt * math.sqrt(t.alpha_bar)))
        off.append(abs(row.eps[0] - of_xt * math.sqrt(t.variance)))
        off.append(abs(row.z**2 - variance))
    note = "posterior mean and variance from betas (Ho et al. 2020)"
    return at_most("S = T, eta = 1 is DDPM, error", largest(off), 1e-9, note)


def _inverse(schedule: Schedule) -> Finding:
    times = [k / 2 for k in range(1, 2 * schedule.T + 1)]
    off = largest(abs(schedule.time_at_log_snr(schedule.level(t).log_snr) - t) for t in times)
    return at_most("time of a log-SNR, error", off, 1e-6, "level(t) and back, at whole and half times")


def _order(schedule: Schedule) -> Finding:
    top = schedule.level(schedule.T).angle

    def grid(steps: int) -> tuple[Level, ...]:
        inner = [schedule.time_at_angle(top * i / steps) for i in range(steps - 1, 0, -1)]
        return schedule.levels([schedule.T, *inner, 0])

    measured = order(samplers.ddim, grid(200), grid(400))
    return between("order of DDIM", measured, 0.85, 1.15, "S = 200 to 400 on exact Gaussian data; Euler's is 1")
