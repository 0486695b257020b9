"""The list of mutations matches the code; `make mutations`, and the heavy test here, plant them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "mutations.py"))
every_mutation = pytest.mark.parametrize("mutation", SCRIPT["MUTATIONS"], ids=lambda mutation: mutation.name)


@every_mutation
def test_mutations_match_the_code(mutation: tuple) -> None:
    planted = SCRIPT["planted"](mutation)
    compile(planted, mutation[1], "exec")
    file, _, test = mutation[4].partition("::")
    assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert SCRIPT["PAGE"].read_text(encoding="utf-8") == SCRIPT["page"](), "run `make mutations`"


@pytest.mark.slow
@every_mutation
def test_mutations_are_detected(mutation: tuple) -> None:
    assert SCRIPT["noticed"](mutation)
