"""`ddim check`: every check passes what is right, and fails what was planted wrong in the way it looks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench import SAMPLERS, SCHEDULES, falling, levels_of
from ddim import check, samplers
from ddim.check import convergence, plans, schedules
from ddim.check import finding as finding_
from ddim.check.finding import Finding, largest
from ddim.plan.plan import Plan
from ddim.process import gaussian, schedule
from ddim.process.schedule import Level, Schedule

LINEAR = SCHEDULES["linear"]
SHORT = schedule.linear(50, 0.002, 0.4)
LEVELS = falling(LINEAR, [100, 400, 700, 1000])
PLAN = samplers.ddim(LEVELS, eta=0.5)


def failed(findings: Iterable[Finding]) -> set[str]:
    """What failed, and that nothing that failed or passed came without a limit."""
    all_of_them = list(findings)
    assert all(finding.limit for finding in all_of_them if finding.result != "info")
    assert all(finding.passed for finding in all_of_them if not finding.limit)
    return {finding.name for finding in all_of_them if not finding.passed}


# --- findings


def test_a_finding_says_itself() -> None:
    bad = Finding("order", 0.5, "0.85..1.15", False, "Euler's is 1")
    assert (str(bad), bad.result) == ("FAIL  order: 0.5 (0.85..1.15); Euler's is 1", "FAIL")
    assert Finding("calls", "10", "", True).result == "info"


def test_nan_is_within_no_limit() -> None:
    assert math.isnan(largest([1.0, math.nan, 2.0]))
    assert math.isnan(largest([math.nan, 1.0]))
    assert not finding_.at_most("x", math.nan, 1.0).passed
    assert not finding_.between("x", math.nan, 0.0, 1.0).passed


# --- schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_the_library(name: str) -> None:
    """Latent diffusion's alone does not end in noise (Lin et al. 2023)."""
    assert failed(check.schedule(SCHEDULES[name])) == ({PRIOR} if name == "scaled-linear" else set())


PRIOR = "x_T against N(0, I), bits/dim"


@pytest.mark.parametrize("betas", [[0.5, 1.0], [0.999, 0.999], [1.0]])
def test_schedules_of_a_time_or_two(betas: list[float]) -> None:
    assert not failed(check.schedule(schedule.from_betas(betas)))


@pytest.mark.parametrize(("T", "enough"), [(100, False), (2000, True)])
def test_signal_left_at_T(T: int, enough: bool) -> None:
    """The paper's betas are made for T = 1000: with fewer times they leave signal."""
    assert failed(check.schedule(schedule.linear(T))) == (set() if enough else {PRIOR})


def test_a_log_snr_that_does_not_fall_is_all_that_is_said() -> None:
    """Such a `Schedule` cannot be made; but its table can be put in afterwards."""
    made = schedule.linear(50)
    table = made.log_snr.copy()
    table[20] = table[19]
    object.__setattr__(made, "log_snr", table)
    [finding] = check.schedule(made)
    assert not finding.passed
    assert "from t = 20 to 21" in finding.note


RIGHT = samplers.ddim


def wrong_sampler(levels: Any, eta: float = 0.0, clean_as: Level | None = None) -> Plan:
    """A little less noise, and a weight that is a little off."""
    made = RIGHT(levels, eta=eta * 0.99, clean_as=clean_as)
    return replace(made, rows=tuple(replace(row, eps=(row.eps[0] * 1.01,)) for row in made.rows))


def forward_at(scale: float) -> Callable[..., tuple[float, float, float]]:
    return lambda now, next, sigma: gaussian.forward_weights(now, next, sigma * scale)


@pytest.mark.parametrize(
    ("where", "name", "slip", "says"),
    [
        (schedules, "forward_weights", forward_at(0.99), {"eta = 1 is a Markov chain, error"}),
        (
            schedules,
            "chain_weights",
            lambda now, next: (1.0, gaussian.chain_weights(now, next)[1]),
            {"eta = 1 is a Markov chain, error"},
        ),
        (
            schedules,
            "marginal_after",
            lambda *a: (math.nan, math.nan) if a[2].t == 30 else gaussian.marginal_after(*a),
            {"Lemma 1, error of the marginals"},
        ),
        (
            schedules,
            "marginal_after",
            lambda *a: gaussian.marginal_after(a[0], a[1] + 1e-6, *a[2:]),
            {"Lemma 1, error of the marginals"},
        ),
        (schedules.samplers, "ddim", wrong_sampler, {"S = T, eta = 1 is DDPM, error", "order of DDIM"}),
        (
            Schedule,
            "time_at_log_snr",
            lambda self, value: self.time_at_angle(Level(0.0, value).angle) * (1 + 1e-6),
            {"time of a log-SNR, error"},
        ),
    ],
)
def test_a_slip_in_the_method_is_seen(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, slip: Any, says: set[str]
) -> None:
    monkeypatch.setattr(where, name, slip)
    assert failed(check.schedule(SHORT)) == says


@pytest.mark.parametrize("part", ["x0", "eps", "z"])
def test_each_part_of_ddpm_counts(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def slipped(levels: Any, eta: float = 0.0) -> Plan:
        made = RIGHT(levels, eta=eta)
        value = getattr(made.rows[5], part)
        more = value + 1e-6 if part == "z" else (value[0] + 1e-6,)
        return spoilt(5, made, **{part: more}) if eta else made

    monkeypatch.setattr(schedules.samplers, "ddim", slipped)
    assert failed(check.schedule(SHORT)) == {"S = T, eta = 1 is DDPM, error"}


def test_a_sigma_that_is_not_legal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """eta = 1.2 is too much over long steps only; between neighbours it is legal, but no Markov chain."""
    monkeypatch.setattr(schedules, "sigma", lambda now, next: 1.2 * gaussian.sigma(now, next))
    says = {"sigma^2 / (1 - abar) at eta = 1", "eta = 1 is a Markov chain, error"}
    assert failed(check.schedule(LINEAR)) == says


# --- convergence


def test_refining_cuts_steps_into_equal_rotations() -> None:
    levels = convergence.refined(LEVELS, 5)
    assert levels[::5] == LEVELS
    turns = np.diff([level.angle for level in levels]).reshape(4, 5)
    np.testing.assert_allclose(turns, turns[:, :1] * np.ones(5), rtol=1e-9)


def test_the_order_is_measured() -> None:
    """1 for DDIM; 2 for Heun's method, between levels above t = 0; 0 for what does not converge."""
    inner = levels_of(LINEAR, "log-snr", 20)[:-1]
    heun = samplers.runge_kutta(inner, LINEAR, 2)
    assert convergence.gaussian_error(heun) < convergence.gaussian_error(samplers.ddim(inner))
    coarse, fine = convergence.refined(inner, 4), convergence.refined(inner, 8)
    assert convergence.order(samplers.ddim, coarse, fine) == pytest.approx(1, abs=0.05)

    def on_time(levels: Iterable[Level]) -> Plan:
        exactly = [replace(level, t=LINEAR.time_at_log_snr(level.log_snr)) for level in levels]
        return samplers.runge_kutta(exactly, LINEAR, 2)

    assert convergence.order(on_time, coarse, fine) == pytest.approx(2, abs=0.1)
    assert convergence.order(wrong_sampler, coarse, fine) < 0.5


# --- plans


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("name", ["linear", "cosine", "linear+zero-terminal-snr"])
def test_every_plan_of_the_library(sampler: Callable[..., Plan], name: str) -> None:
    for grid in ("equal-angle", "official-quadratic", "trailing"):
        plan = sampler(levels_of(SCHEDULES[name], grid, 10))
        assert not failed(check.plan(plan, SCHEDULES[name])), grid


def test_plans_that_encode() -> None:
    for clean_as in (None, LINEAR.level(1)):
        assert not failed(check.plan(samplers.ddim(LEVELS[::-1], clean_as=clean_as), LINEAR))
    assert not failed(check.plan(samplers.runge_kutta(LEVELS[::-1], LINEAR, 2), LINEAR))


def measured(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_what_is_left_out_is_said() -> None:
    order, error = "order of convergence", "error on exact Gaussian data"
    told = measured(check.plan(PLAN))
    assert {told[order].measured, told[error].measured} == {"skipped"}
    assert "adds noise" in told[order].note
    told = measured(check.plan(samplers.runge_kutta(LEVELS, LINEAR, 2)))
    assert (told[order].measured, told[order].result) == ("skipped", "info")
    assert "plain DDIM on the same levels, 4 NFE" in told[error].note
    for plain in (samplers.ddim(LEVELS), samplers.probability_flow(LEVELS)):
        assert measured(check.plan(plain))[order].result == "pass"


def test_sigma_hat_shows_its_excess_and_is_not_blamed() -> None:
    """It adds sigma-hat^2 - sigma^2 too much at each step but the last; the mean's factors carry that on."""
    plan = samplers.ddim(LEVELS, sigma="hat")
    found = measured(check.plan(plan))["marginals, error of the variance"]
    excess, most = 0.0, 0.0
    for row in plan.rows:
        kappa = row.eps[0] / row.now.noise
        excess = kappa**2 * excess + row.z**2 - row.sigma**2
        most = max(most, abs(excess))
    assert found.measured == pytest.approx(most, rel=1e-9)
    assert found.result == "info"
    assert not failed(check.plan(plan))
    assert failed(check.plan(replace(plan, keeps_marginals=True))) == {"marginals, error of the variance"}


def spoilt(k: int, plan: Plan = PLAN, **changes: Any) -> Plan:
    """A plan with something else in row k."""
    return replace(plan, rows=tuple(replace(row, **changes) if i == k else row for i, row in enumerate(plan.rows)))


OTHER = replace(LEVELS[1], log_snr=LEVELS[1].log_snr + 0.1)
JOIN, X0, EPS = "disconnected rows", "straight line, error in x_0", "straight line, error in eps"
LEGAL, MEAN, VARIANCE = "sigma^2 / (1 - abar)", "marginals, error of the mean", "marginals, error of the variance"


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (spoilt(1, x0=(PLAN.rows[1].x0[0] + 1e-7,)), {X0, MEAN}),
        (spoilt(1, eps=(PLAN.rows[1].eps[0] + 1e-7,)), {EPS, VARIANCE}),
        (spoilt(2, z=PLAN.rows[2].z * 1.001), {VARIANCE}),
        (spoilt(2, z=PLAN.rows[2].z * 1.001, sigma=PLAN.rows[2].sigma * 1.001), {EPS, VARIANCE}),
        (spoilt(2, z=1.0, sigma=1.0, eps=(0.0,)), {LEGAL, VARIANCE}),
        (spoilt(2, z=-PLAN.rows[2].z), {LEGAL}),
        (spoilt(3, z=0.1, sigma=0.1), {LEGAL, VARIANCE}),
        (spoilt(1, x0=(math.nan,)), {X0, EPS, MEAN, VARIANCE}),
        (spoilt(1, next=OTHER), {JOIN, X0, EPS, MEAN, VARIANCE, "levels of linear"}),
        (samplers.ddim([LEVELS[0], OTHER, *LEVELS[2:]]), {"levels of linear"}),
        (spoilt(0, x0=(*PLAN.rows[0].x0, 0.0)), {JOIN}),
        (replace(PLAN, rows=(PLAN.rows[0], *PLAN.rows[2:])), {JOIN, MEAN, VARIANCE}),
        (samplers.ddim(LEVELS[:-1]), {"ends at"}),
        (replace(PLAN, rows=()), {"network evaluations"}),
    ],
)
def test_a_wrong_plan_is_seen(plan: Plan, says: set[str]) -> None:
    """None of these has passed `Plan.check`, but for those that are right and of another schedule or end."""
    assert failed(check.plan(plan, LINEAR)) == says


def test_where_it_is_wrong_is_told() -> None:
    assert "row 1 (t = 700 to 400)" in measured(check.plan(spoilt(1, x0=(0.0,))))[X0].note


def test_a_plan_that_does_not_converge_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans.samplers, "ddim", wrong_sampler)
    assert "order of convergence" in failed(check.plan(wrong_sampler(LEVELS)))
