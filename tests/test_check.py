"""Checks of schedules and plans: correct ones pass, and each planted bug fails the expected checks."""

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
    """The names of the failed checks; asserts that every check that passes or fails has a limit."""
    all_findings = list(findings)
    assert all(finding.limit for finding in all_findings if finding.result != "info")
    assert all(finding.passed for finding in all_findings if not finding.limit)
    return {finding.name for finding in all_findings if not finding.passed}


# --- findings


def test_finding_as_text() -> None:
    bad = Finding("order", 0.5, "0.85..1.15", False, "Euler's is 1")
    assert (str(bad), bad.result) == ("FAIL  order: 0.5 (0.85..1.15); Euler's is 1", "FAIL")
    assert Finding("calls", "10", "", True).result == "info"


def test_nan_exceeds_every_limit() -> None:
    assert math.isnan(largest([1.0, math.nan, 2.0]))
    assert math.isnan(largest([math.nan, 1.0]))
    assert not finding_.at_most("x", math.nan, 1.0).passed
    assert not finding_.between("x", math.nan, 0.0, 1.0).passed


# --- schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_bundled_schedules_pass(name: str) -> None:
    """Only the schedule of latent diffusion does not end in noise (Lin et al. 2023)."""
    assert failed(check.schedule(SCHEDULES[name])) == ({PRIOR} if name == "scaled-linear" else set())


PRIOR = "x_T against N(0, I), bits/dim"


@pytest.mark.parametrize("betas", [[0.5, 1.0], [0.999, 0.999], [1.0]])
def test_schedules_with_one_or_two_times(betas: list[float]) -> None:
    assert not failed(check.schedule(schedule.from_betas(betas)))


@pytest.mark.parametrize(("T", "enough"), [(100, False), (2000, True)])
def test_signal_left_at_T(T: int, enough: bool) -> None:
    """The paper's betas are for T = 1000: with fewer times some signal is left."""
    assert failed(check.schedule(schedule.linear(T))) == (set() if enough else {PRIOR})


def test_a_log_snr_that_does_not_fall_ends_the_checks() -> None:
    """Such a `Schedule` cannot be constructed, so its table is replaced afterwards."""
    schedule_ = schedule.linear(50)
    table = schedule_.log_snr.copy()
    table[20] = table[19]
    object.__setattr__(schedule_, "log_snr", table)
    [finding] = check.schedule(schedule_)
    assert not finding.passed
    assert "from t = 20 to 21" in finding.note


RIGHT = samplers.ddim


def wrong_sampler(levels: Any, eta: float = 0.0, clean_as: Level | None = None) -> Plan:
    """A little less noise, and a weight that is a little off."""
    wrong = RIGHT(levels, eta=eta * 0.99, clean_as=clean_as)
    return replace(wrong, rows=tuple(replace(row, eps=(row.eps[0] * 1.01,)) for row in wrong.rows))


def forward_at(scale: float) -> Callable[..., tuple[float, float, float]]:
    return lambda now, next, sigma: gaussian.forward_weights(now, next, sigma * scale)


@pytest.mark.parametrize(
    ("where", "name", "bug", "expected"),
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
def test_a_bug_in_the_method_is_detected(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, bug: Any, expected: set[str]
) -> None:
    monkeypatch.setattr(where, name, bug)
    assert failed(check.schedule(SHORT)) == expected


@pytest.mark.parametrize("part", ["x0", "eps", "z"])
def test_an_error_in_any_weight_of_ddpm_is_detected(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def wrong_ddim(levels: Any, eta: float = 0.0) -> Plan:
        plan = RIGHT(levels, eta=eta)
        value = getattr(plan.rows[5], part)
        more = value + 1e-6 if part == "z" else (value[0] + 1e-6,)
        return altered(5, plan, **{part: more}) if eta else plan

    monkeypatch.setattr(schedules.samplers, "ddim", wrong_ddim)
    assert failed(check.schedule(SHORT)) == {"S = T, eta = 1 is DDPM, error"}


def test_a_sigma_out_of_range_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """eta = 1.2 is too large over long steps only; for adjacent times it is valid, but not a Markov chain."""
    monkeypatch.setattr(schedules, "sigma", lambda now, next: 1.2 * gaussian.sigma(now, next))
    expected = {"sigma^2 / (1 - abar) at eta = 1", "eta = 1 is a Markov chain, error"}
    assert failed(check.schedule(LINEAR)) == expected


# --- convergence


def test_refined_splits_steps_into_equal_rotations() -> None:
    levels = convergence.refined(LEVELS, 5)
    assert levels[::5] == LEVELS
    turns = np.diff([level.angle for level in levels]).reshape(4, 5)
    np.testing.assert_allclose(turns, turns[:, :1] * np.ones(5), rtol=1e-9)


def test_order_of_convergence() -> None:
    """1 for DDIM, 2 for Heun's method between levels above t = 0, and 0 for a method that does not converge."""
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
def test_plans_of_every_sampler_pass(sampler: Callable[..., Plan], name: str) -> None:
    for grid in ("equal-angle", "official-quadratic", "trailing"):
        plan = sampler(levels_of(SCHEDULES[name], grid, 10))
        assert not failed(check.plan(plan, SCHEDULES[name])), grid


def test_encoding_plans_pass() -> None:
    for clean_as in (None, LINEAR.level(1)):
        assert not failed(check.plan(samplers.ddim(LEVELS[::-1], clean_as=clean_as), LINEAR))
    assert not failed(check.plan(samplers.runge_kutta(LEVELS[::-1], LINEAR, 2), LINEAR))


def measured(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_skipped_checks_state_the_reason() -> None:
    order, error = "order of convergence", "error on exact Gaussian data"
    findings = measured(check.plan(PLAN))
    assert {findings[order].measured, findings[error].measured} == {"skipped"}
    assert "adds noise" in findings[order].note
    findings = measured(check.plan(samplers.runge_kutta(LEVELS, LINEAR, 2)))
    assert (findings[order].measured, findings[order].result) == ("skipped", "info")
    assert "plain DDIM on the same levels, 4 NFE" in findings[error].note
    for plain in (samplers.ddim(LEVELS), samplers.probability_flow(LEVELS)):
        assert measured(check.plan(plain))[order].result == "pass"


def test_sigma_hat_reports_its_excess_variance_without_failing() -> None:
    """Each step but the last adds an excess of sigma-hat^2 - sigma^2, which the factors of the mean propagate."""
    plan = samplers.ddim(LEVELS, sigma="hat")
    finding = measured(check.plan(plan))["marginals, error of the variance"]
    excess, most = 0.0, 0.0
    for row in plan.rows:
        kappa = row.eps[0] / row.now.noise
        excess = kappa**2 * excess + row.z**2 - row.sigma**2
        most = max(most, abs(excess))
    assert finding.measured == pytest.approx(most, rel=1e-9)
    assert finding.result == "info"
    assert not failed(check.plan(plan))
    assert failed(check.plan(replace(plan, keeps_marginals=True))) == {"marginals, error of the variance"}


def altered(k: int, plan: Plan = PLAN, **changes: Any) -> Plan:
    """The plan with changes in row k."""
    return replace(plan, rows=tuple(replace(row, **changes) if i == k else row for i, row in enumerate(plan.rows)))


OTHER = replace(LEVELS[1], log_snr=LEVELS[1].log_snr + 0.1)
JOIN, X0, EPS = "disconnected rows", "straight line, error in x_0", "straight line, error in eps"
LEGAL, MEAN, VARIANCE = "sigma^2 / (1 - abar)", "marginals, error of the mean", "marginals, error of the variance"


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (altered(1, x0=(PLAN.rows[1].x0[0] + 1e-7,)), {X0, MEAN}),
        (altered(1, eps=(PLAN.rows[1].eps[0] + 1e-7,)), {EPS, VARIANCE}),
        (altered(2, z=PLAN.rows[2].z * 1.001), {VARIANCE}),
        (altered(2, z=PLAN.rows[2].z * 1.001, sigma=PLAN.rows[2].sigma * 1.001), {EPS, VARIANCE}),
        (altered(2, z=1.0, sigma=1.0, eps=(0.0,)), {LEGAL, VARIANCE}),
        (altered(2, z=-PLAN.rows[2].z), {LEGAL}),
        (altered(3, z=0.1, sigma=0.1), {LEGAL, VARIANCE}),
        (altered(1, x0=(math.nan,)), {X0, EPS, MEAN, VARIANCE}),
        (altered(1, next=OTHER), {JOIN, X0, EPS, MEAN, VARIANCE, "levels of linear"}),
        (samplers.ddim([LEVELS[0], OTHER, *LEVELS[2:]]), {"levels of linear"}),
        (altered(0, x0=(*PLAN.rows[0].x0, 0.0)), {JOIN}),
        (replace(PLAN, rows=(PLAN.rows[0], *PLAN.rows[2:])), {JOIN, MEAN, VARIANCE}),
        (samplers.ddim(LEVELS[:-1]), {"ends at"}),
        (replace(PLAN, rows=()), {"network evaluations"}),
    ],
)
def test_a_wrong_plan_fails_the_expected_checks(plan: Plan, expected: set[str]) -> None:
    """None of these passes `Plan.check`, except valid plans of another schedule or end."""
    assert failed(check.plan(plan, LINEAR)) == expected


def test_the_note_names_the_wrong_row() -> None:
    assert "row 1 (t = 700 to 400)" in measured(check.plan(altered(1, x0=(0.0,))))[X0].note


def test_a_plan_that_does_not_converge_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans.samplers, "ddim", wrong_sampler)
    assert "order of convergence" in failed(check.plan(wrong_sampler(LEVELS)))
