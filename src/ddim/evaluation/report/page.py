"""The report as one self-contained HTML page with embedded images and no external resources."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddim.errors import DdimError
from ddim.evaluation.fid_table import label
from ddim.evaluation.report import paper as published
from ddim.evaluation.report.tables import number

TEMPLATE = Path(__file__).with_name("page.html.j2")


def need() -> None:
    """Check that the packages required for the page are installed.

    Raises:
        DdimError: If jinja2 or matplotlib is not installed.
    """
    for name in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise DdimError(name, "is not installed", "run: pip install 'ddim[report]'")


def render(report: Mapping[str, Any], images: Mapping[str, bytes | None]) -> str:
    """Render the page.

    Args:
        report: The content of report.json, see `ddim.evaluation.report.reproduction`, with "manifest_text".
        images: PNG or SVG of each figure by name; None for a figure that could not be drawn.

    Raises:
        DdimError: If jinja2 or matplotlib is not installed.
    """
    need()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "row_label": label}
    paper = report["published"] if report["metric"] == "FID" else None
    page: str = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        r=report,
        grid=table_1(report["table_1"], paper),
        trips=table_2(report["table_2"], report["published"]),
        shape=None if paper else shape(),
        figures={name: _uri(data) for name, data in images.items() if data},
    )
    return page


def _uri(data: bytes) -> str:
    mime = "image/png" if data.startswith(b"\x89PNG") else "image/svg+xml"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def table_1(table: Mapping[str, Any], paper: str | None) -> dict[str, Any]:
    """The cells of Table 1 by row and column, with the best of each column marked and the paper's values."""
    cells = table["cells"]
    steps = sorted({cell["steps"] for cell in cells})
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    by_position = {(cell["row"], cell["steps"]): cell for cell in cells}
    printed = published.table_1(paper) if paper else {}
    least = {s: min(cell["fd"] for cell in cells if cell["steps"] == s) for s in steps}
    counts = {s: sorted({cell["n"] for cell in cells if cell["steps"] == s}) for s in steps}
    lines = []
    for row in rows:
        line = []
        for s in steps:
            cell = by_position.get((row, s))
            best = cell is not None and cell["fd"] == least[s] and len(counts[s]) == 1
            line.append({"cell": cell, "best": best, "paper": printed.get((row, s))})
        lines.append({"label": label(row), "cells": line})
    return {
        "steps": steps,
        "rows": lines,
        "counts": ["/".join(map(str, counts[s])) for s in steps],
        "uneven": len({n for s in steps for n in counts[s]}) > 1,
    }


def table_2(rows: Sequence[Mapping[str, Any]], paper: str | None) -> list[dict[str, Any]]:
    """The rows of Table 2, with the paper's values if the dataset is CIFAR-10."""
    beside = published.TABLE_2 if paper == "CIFAR-10" else {}
    return [{**row, "paper": beside.get(int(row["steps"]))} for row in rows]


def shape() -> dict[str, Any]:
    """The paper's Table 1 of CIFAR-10, to compare trends when the distances themselves are not comparable."""
    values = published.table_1("CIFAR-10")
    rows = [{"label": label(row), "values": [values[row, s] for s in published.STEPS]} for row in published.ROWS]
    return {"steps": published.STEPS, "rows": rows}
