"""Checks of a noise schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch

from ddim import samplers
from ddim.check.convergence import order
from ddim.check.finding import Finding, at_most, between, info, largest, left_out
from ddim.objective.elbo import prior_term
from ddim.process.gaussian import chain_weights, forward_weights, marginal_after, sigma
from ddim.process.schedule import Level, Schedule

HALF_BIN = 1 / 255
PRIOR = 1e-3
STRIDES = (1, 2, 5, 10, 50)


def schedule(schedule: Schedule) -> Iterator[Finding]:
    """Hold a schedule, and the method on it, against the theory. It takes a second or two at T = 1000.

    Args:
        schedule: The schedule.

    Yields:
        One finding per check; only the first where the log-SNR does not fall.
    """
    first = _falls(schedule)
    yield first
    if not first.passed:
        return
    levels = schedule.levels(range(schedule.T + 1))
    yield _prior(levels[-1])
    yield info("noise at t = 1, std", levels[1].noise, f"half an 8-bit bin is {HALF_BIN:.3g}")
    yield _legal(levels)
    yield _bayes(levels)
    yield _lemma(levels)
    yield _ddpm(levels)
    yield _inverse(schedule)
    yield _order(schedule)


def _falls(schedule: Schedule) -> Finding:
    name, table = "log-SNR falls, least step", schedule.log_snr
    if len(table) < 2:
        return left_out(name, "there is one time only")
    falls = table[:-1] - table[1:]
    at = int(np.argmin(falls))
    fall = float(falls[at])
    return Finding(name, fall, "> 0", fall > 0, f"from t = {at + 1} to {at + 2}")


def _prior(top: Level) -> Finding:
    """What N(0, I) in the place of x_T costs, for data of power 1.

    The limit is a tenth of the last digit that likelihoods are quoted with. It lies between the schedules that start
    from noise (linear: 3e-5) and those known to start from something else (latent diffusion's: 3e-3, Lin et al. 2023).
    """
    bits = float(prior_term(torch.ones(1, 1), top)) / math.log(2)
    told = f"KL for data of power 1; alpha_bar_T = {top.alpha_bar:.3g}"
    told += "" if bits <= PRIOR else "; zero_terminal_snr makes it 0"
    return at_most("x_T beside N(0, I), bits/dim", bits, PRIOR, told)


def _legal(levels: tuple[Level, ...]) -> Finding:
    """Eta = 1 between neighbours and over sub-sequences: sigma^2 must leave room for the mean in 1 - abar_next."""
    name = "sigma^2 / (1 - abar) at eta = 1"
    parts = {}
    for stride in STRIDES:
        for now, following in itertools.pairwise(levels[:0:-stride]):
            parts[now.t, following.t] = sigma(now, following) ** 2 / following.variance
    if not parts:
        return left_out(name, "there is one time only")
    (now_t, next_t), worst = max(parts.items(), key=lambda pair: pair[1])
    return Finding(name, worst, "<= 1", worst <= 1 + 1e-12, f"eq. (16); largest from t = {now_t:g} to {next_t:g}")


def _bayes(levels: tuple[Level, ...]) -> Finding:
    """(7) turned round by Bayes' rule, which is eq. (8), against the chain of eq. (3).

    The root of a difference of two numbers near 1 limits it to about 1e-8 where little is left of x from t to t + 1.
    """
    off = []
    for now, following in itertools.pairwise(levels[1:]):
        of_x, of_x0, std = forward_weights(now, following, sigma(following, now))
        chain_x, chain_std = chain_weights(now, following)
        off += [abs(of_x0), abs(of_x - chain_x), abs(std - chain_std)]
    told = "eq. (8) has the weights of eq. (3), and none on x_0"
    return at_most("eta = 1 is a Markov chain, off by", largest(off), 1e-7, told)


def _lemma(levels: tuple[Level, ...]) -> Finding:
    """Down all T steps with sigma drawn anew for each, between 0 and the largest that is legal."""
    draws = np.random.Generator(np.random.Philox(key=0)).random(len(levels))
    signal, variance, off = levels[-1].signal, levels[-1].variance, []
    for k in range(len(levels) - 1, 0, -1):
        now, following = levels[k], levels[k - 1]
        signal, variance = marginal_after(signal, variance, now, following, float(draws[k]) * following.noise)
        off += [abs(signal - following.signal), abs(variance - following.variance)]
    told = f"its induction over {len(levels) - 1} steps, each with some legal sigma"
    return at_most("Lemma 1, marginals off by", largest(off), 1e-9, told)


def _ddpm(levels: tuple[Level, ...]) -> Finding:
    """The plan at S = T, eta = 1 against the posterior of Ho et al. 2020, eqs. (6) and (7), from betas.

    Its mean is of_x0 x_0 + of_xt x_t, with x_t = signal x_0 + noise eps put in.
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
    told = "posterior mean and variance from betas (Ho et al. 2020)"
    return at_most("S = T, eta = 1 is DDPM, off by", largest(off), 1e-9, told)


def _inverse(schedule: Schedule) -> Finding:
    times = [k / 2 for k in range(1, 2 * schedule.T + 1)]
    off = largest(abs(schedule.time_at_log_snr(schedule.level(t).log_snr) - t) for t in times)
    return at_most("time of a log-SNR, off by", off, 1e-6, "level(t) and back, at whole and half times")


def _order(schedule: Schedule) -> Finding:
    top = schedule.level(schedule.T).angle

    def grid(steps: int) -> tuple[Level, ...]:
        inner = [schedule.time_at_angle(top * i / steps) for i in range(steps - 1, 0, -1)]
        return schedule.levels([schedule.T, *inner, 0])

    found = order(samplers.ddim, grid(200), grid(400))
    return between("order of DDIM", found, 0.85, 1.15, "S = 200 to 400 on exact Gaussian data; Euler's is 1")
