"""Writes docs/benchmarks.md from the results.

`python -m benchmarks.table`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
ORDER = ("sampling", "loop", "training", "startup", "memory", "roofline", "precision")
MARK = "<!-- results -->"


def cell(value: Any) -> str:
    """A value as text."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def section(name: str) -> str:
    """The table of one benchmark."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    rows, machine = result["rows"], result["machine"]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"### {name}", "", f"{result['about'][0].upper()}{result['about'][1:]}.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "-|" * len(heads)]
    lines += ["| " + " | ".join(cell(row.get(head)) for head in heads) + " |" for row in rows]
    units = ", ".join(machine["units"])
    where = f"{machine['processor']} ({units}), {machine['threads']} threads, torch {machine['torch']}"
    where += f", diffusers {machine['diffusers']}, commit {machine['commit']}"
    lines += ["", f"`python -m benchmarks.{name}`; {where}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Write the part of the page below the mark."""
    head = PAGE.read_text().split(MARK)[0]
    body = "\n".join(section(name) for name in ORDER if (RESULTS / f"{name}.json").exists())
    PAGE.write_text(f"{head}{MARK}\n\n{body}")


if __name__ == "__main__":
    main()
