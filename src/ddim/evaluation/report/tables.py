"""The paper's Table 1 for a model, as text, JSON, CSV and a figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ddim
from ddim._io.atomic import write_atomic
from ddim._io.terminal import table
from ddim.errors import warn
from ddim.evaluation.consistency import consistency
from ddim.evaluation.features import Extractor
from ddim.evaluation.fid_table import Measured, label
from ddim.evaluation.report import figures
from ddim.evaluation.statistics import Statistics
from ddim.model.model import Model
from ddim.sampling.microbatch import Label

Times = Mapping[tuple[str, int], Mapping[str, Any]]
MEASURES = ("fd", "fd_error", "kept", "fd_limit", "fd_limit_error", "kid", "kid_std", "precision", "recall")


def about(
    model: Model, name: str, data: Statistics, extractor: Extractor, seed: int, label: Label = None
) -> dict[str, Any]:
    """Metadata of a table: model, data, extractor, seed, label, precision and version."""
    return {
        "model": {"name": name, "sha256": model.fingerprint, "predicts": model.config.predicts},
        "data": data.protocol.model_dump(),
        "extractor": {"name": extractor.name, "sha256": extractor.sha256, "note": extractor.note},
        "metric": extractor.metric,
        "seed": seed,
        "label": label,
        "quantised": "samples are rounded to 8 bits before features are taken",
        **model.conditions,
        "ddim": ddim.__version__,
    }


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One dictionary per cell, with reproducible values only (no timings)."""
    return [
        {
            "row": m.cell.row,
            "steps": m.cell.steps,
            "network_calls": m.cell.plan.nfe,
            "n": m.cell.n,
            "plan": m.cell.plan.name,
            "clip_x0": m.cell.plan.hook is not None,
            "tau": [row.now.t for row in reversed(m.cell.plan.rows)],
            **{key: m.figures[key] for key in MEASURES},
        }
        for m in measured
    ]


def consistencies(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Sample consistency for each pair of S, in every deterministic row and in eta = 1."""
    results = []
    for row in dict.fromkeys(m.cell.row for m in measured):
        if any(m.cell.plan.stochastic for m in measured if m.cell.row == row) and row != "1":
            continue
        row_cells = [m for m in measured if m.cell.row == row]
        for i, a in enumerate(row_cells):
            for b in row_cells[i + 1 :]:
                both = consistency(a.gathered, b.gathered)
                figures = {key: getattr(both, key) for key in type(both).__slots__}
                results.append({"row": row, "a": a.cell.steps, "b": b.cell.steps, **figures, "ratio": both.ratio})
    return results


def write_table(out: Path, facts: Mapping[str, Any], measured: Sequence[Measured], times: Times) -> dict[str, Any]:
    """Write evaluate.json, evaluate.csv, timing.json and, if matplotlib is installed, evaluate.png.

    evaluate.json and evaluate.csv are reproducible; timings are in timing.json and evaluate.png only.

    Returns:
        The content of evaluate.json.
    """
    table = {"format": "ddim-evaluation", "version": 1, **facts, "cells": rows(measured)}
    table["consistency"] = consistencies(measured)
    write_json(out / "evaluate.json", table)
    text = io.StringIO()
    writer = csv.DictWriter(text, [key for key in table["cells"][0] if key != "tau"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(table["cells"])
    write_atomic(out / "evaluate.csv", text.getvalue().encode())
    cells = [{"row": row, "steps": steps, **timing} for (row, steps), timing in times.items()]
    machine = {"device": facts["device"], "threads": torch.get_num_threads(), "dtype": facts["dtype"]}
    write_json(out / "timing.json", {**machine, "cells": cells})
    if figures.installed():
        write_atomic(out / "evaluate.png", figures.quality(table["cells"], times, facts["metric"], png=True))
    else:
        warn("matplotlib is not installed: evaluate.png is not written; pip install 'ddim[plot]'")
    return table


def write_json(path: Path, what: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, (json.dumps(what, indent=1) + "\n").encode())


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with a few significant digits; "-" for None."""
    return "-" if value is None else f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"


def _distance(measured: Measured | None) -> str:
    """The distance of a cell and its standard error as text; "-" for a missing cell."""
    if measured is None:
        return "-"
    spread = measured.figures["fd_error"]
    return number(measured.figures["fd"]) + (f" +- {number(spread, 2)}" if spread is not None else "")


def print_table(measured: Sequence[Measured], metric: str) -> str:
    """The table as text: distances with standard errors, one row per eta or sampler."""
    steps = sorted({m.cell.steps for m in measured})
    by_position = {(m.cell.row, m.cell.steps): m for m in measured}
    names = list(dict.fromkeys(m.cell.row for m in measured))
    lines = [f"{metric}, smaller is better; +- the standard error over the samples"]
    counts = [sorted({m.cell.n for m in measured if m.cell.steps == s}) for s in steps]
    columns = [("S", [*map(label, names), "samples"])]
    for s, n in zip(steps, counts, strict=True):
        cells = [_distance(by_position.get((row, s))) for row in names]
        columns.append((str(s), [*cells, "/".join(map(str, n))]))
    lines += table(columns)
    if len({n for column in counts for n in column}) > 1:
        lines.append("Distances of fewer samples are larger: compare cells with equal n, or fd_limit, or KID.")
    return "\n".join(lines)
