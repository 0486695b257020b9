"""The list of planted slips fits the code; `make mutations`, and the heavy test here, plant them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "mutations.py"))
every_slip = pytest.mark.parametrize("slip", SCRIPT["SLIPS"], ids=lambda slip: slip.name)


@every_slip
def test_a_slip_can_be_planted(slip: tuple) -> None:
    planted = SCRIPT["planted"](slip)
    compile(planted, slip[1], "exec")
    file, _, test = slip[4].partition("::")
    assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert SCRIPT["PAGE"].read_text(encoding="utf-8") == SCRIPT["page"](), "run `make mutations`"


@pytest.mark.heavy
@every_slip
def test_a_slip_is_noticed(slip: tuple) -> None:
    assert SCRIPT["noticed"](slip)
