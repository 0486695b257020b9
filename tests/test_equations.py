"""Each equation has one home and a test, which docs/equations.md lists."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from ddim.process import schedule
from ddim.process.gaussian import sigma, sigma_hat

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "equations.py"))
HOMES, TESTS = SCRIPT["homes"](), SCRIPT["tests"]()


@pytest.mark.parametrize("label", SCRIPT["REQUIRED"])
def test_every_equation_of_the_method_has_a_home(label: str) -> None:
    assert label in HOMES


@pytest.mark.parametrize("label", HOMES)
def test_every_equation_has_one_home(label: str) -> None:
    names = [f"{place.file}: {place.name}" for place in HOMES[label]]
    assert len(names) == 1, f"{label} is defined twice: {', '.join(names)}; let one of them call the other"


@pytest.mark.parametrize("label", HOMES)
def test_every_equation_has_a_statement(label: str) -> None:
    assert label in SCRIPT["STATEMENTS"], f"write the statement of {label} into scripts/equations.py"


@pytest.mark.parametrize("label", HOMES)
def test_every_equation_has_a_test(label: str) -> None:
    home = HOMES[label][0]
    assert TESTS.get(label), f'no test begins its docstring with "{label}", whose home is {home.name} in {home.file}'


def test_tests_name_only_equations_with_a_home() -> None:
    homeless = [place for label in TESTS.keys() - HOMES.keys() for place in TESTS[label]]
    assert not homeless, f"tests of equations without a home: {homeless}"


def test_the_page_is_up_to_date() -> None:
    written = SCRIPT["PAGE"].read_text(encoding="utf-8")
    assert written == SCRIPT["page"](), "docs/equations.md is out of date: run `make docs`"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Eq. (4): a draw", ["Eq. (4)"]),
        ("Eqs. (4), (7) and (12): three", ["Eq. (4)", "Eq. (7)", "Eq. (12)"]),
        ("Section 4.2: tau", ["Section 4.2"]),
        ("Appendix A: tokens", ["Appendix A"]),
        ("As in eq. (4)", []),
        ("", []),
    ],
)
def test_labels(docstring: str, expected: list[str]) -> None:
    assert SCRIPT["labels"](docstring) == expected


def test_sigma_hat_is_the_noise_of_the_forward_step() -> None:
    """Section 5: diffusing from s to t by sqrt(abar_t / abar_s) and sigma-hat gives the variance of time t.

    It lies between the sigma of eta = 1 and the noise of the time the step starts from.
    """
    table = schedule.linear()
    for t, s in [(1000, 900), (1000, 1), (500, 499), (2, 1), (1, 0), (640, 0)]:
        now, following = table.level(t), table.level(s)
        ratio = now.alpha_bar / following.alpha_bar
        assert ratio * following.variance + sigma_hat(now, following) ** 2 == pytest.approx(now.variance, rel=1e-12)
        assert sigma(now, following) <= sigma_hat(now, following) <= now.noise * (1 + 1e-12)
