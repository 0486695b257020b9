"""The formulas of the documentation are valid LaTeX."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
DISPLAYED = re.compile(r"^( *)```math\n(.*?)\n\1```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<![\\$\w])\$([^$\n]+)\$(?![$\w])")


def formulas(text: str) -> list[str]:
    """The LaTeX of a page: in fences named math, and between dollar signs outside code."""
    displayed = [match[2] for match in DISPLAYED.finditer(text)]
    prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^ {4}(?! *-).*$|`[^`\n]*`", "", prose, flags=re.MULTILINE)
    return [" ".join(formula.split()) for formula in [*displayed, *INLINE.findall(prose)]]


PAGES = {page.relative_to(DOCS).as_posix(): formulas(page.read_text(encoding="utf-8")) for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", sorted(name for name in PAGES if PAGES[name]))
def test_formulas_are_latex(page: str) -> None:
    parser = pytest.importorskip("matplotlib.mathtext").MathTextParser("path")
    for formula in PAGES[page]:
        parser.parse(f"${formula}$")


def test_formulas_are_found() -> None:
    text = "Let $a_t$ be `$b`.\n\n```math\nc =\n d\n```\n\n    $ ddim plan $x $y\n\n```\n$e$\n```\n"
    assert formulas(text) == ["c = d", "a_t"]
    assert len(PAGES["equations.md"]) > 40
