"""The output of `ddim reproduce`: the report as JSON and as an HTML page."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddim
from ddim._io.atomic import write_atomic
from ddim.data import ImageSet
from ddim.evaluation.fid_table import Measured
from ddim.evaluation.report import figures, page, paper, sections
from ddim.evaluation.report.budget import Amounts
from ddim.evaluation.report.tables import Times, write_json, write_table

IMAGE_FOLDER = "pictures"


def write_report(
    out: Path,
    facts: Mapping[str, Any],
    request: Mapping[str, Any],
    counts: Amounts,
    measured: Sequence[Measured],
    times: Times,
    trips: Sequence[dict[str, Any]],
    test: ImageSet,
) -> Path:
    """Write evaluate.*, report.json, the figures and report.html.

    Args:
        out: The report's folder, which already holds the interpolations in its `IMAGE_FOLDER` subfolder.
        facts: Metadata of the table, see `ddim.evaluation.report.tables.about`.
        request: The command's settings.
        counts: The amount of work done.
        measured: The measured cells of Table 1.
        times: Seconds per sample of each cell.
        trips: The rows of Table 2, with reconstructed images.
        test: The test set.

    Returns:
        Path of the page.
    """
    table = write_table(out, facts, measured, times)
    images, shown = _figures(out, table, facts["metric"], measured, times, sections.trips(trips, test))
    report = {
        "format": "ddim-report",
        "version": 1,
        **facts,
        "software": software(),
        "request": dict(request),
        "budget": _budget(request),
        "counts": counts.model_dump(by_alias=True, exclude={"calls_per_second"}),
        "grid": request["grid"],
        "published": paper.data_set(facts["data"]["data"]),
        "paper_table_2": paper.TABLE_2,
        "test": {"data": test.name, "split": test.split, "fingerprint": test.fingerprint()},
        "walk_steps": sections.INTERPOLATION_STEPS,
        "figure_3": shown,
        "table_1": {"cells": table["cells"], "consistency": table["consistency"]},
        "table_2": [{key: value for key, value in row.items() if key != "again"} for row in trips],
    }
    write_json(out / "report.json", report)
    text = page.render({**report, "manifest_text": manifest(report)}, images)
    write_atomic(out / "report.html", text.encode())
    return out / "report.html"


def _figures(
    out: Path, table: Mapping[str, Any], metric: str, measured: Sequence[Measured], times: Times, trips: bytes
) -> tuple[dict[str, bytes | None], list[tuple[str, int]]]:
    """Draw all figures and write them to files; returns their bytes by name, and the names of Figure 3's with S."""
    steps = sorted({m.cell.steps for m in measured})
    chosen = [steps[0], *([max(s for s in steps if s <= 100)] if steps[0] < 100 else [])]
    shown = [(f"samples-{s}", s) for s in dict.fromkeys(chosen)]
    drawn: dict[str, bytes | None] = {
        **{name: sections.samples(measured, s) for name, s in shown},
        "quality": figures.quality(table["cells"], times, metric),
        "same_start": sections.same_start(measured),
        "trips": trips,
    }
    for name, data in drawn.items():
        if data:
            suffix = "png" if data.startswith(b"\x89PNG") else "svg"
            write_atomic(out / IMAGE_FOLDER / f"{name.replace('_', '-')}.{suffix}", data)
    walks = {name: (out / IMAGE_FOLDER / f"{file}.png").read_bytes() for name, file in _WALKS.items()}
    return {**drawn, **walks}, shown


_WALKS = {"walks": "walks", "corners": "four-corners"}


def _budget(request: Mapping[str, Any]) -> str:
    """The budget as text for captions, with the numbers the user overrode."""
    overrides = [f"samples per cell set by -n {request['n']}"] if request["n"] else []
    overrides += [f"Table 2 of {request['pictures']} images, as requested"] if request["pictures"] else []
    return "; ".join([request["budget"], *overrides])


def software() -> dict[str, str]:
    """Versions and hardware that the results may depend on."""
    return {
        "ddim": ddim.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def manifest(report: Mapping[str, Any]) -> str:
    """All settings of the report as JSON text; tau is listed once per S, and per row where it differs."""
    taus: dict[str, str] = {}
    for cell in report["table_1"]["cells"]:
        times, name = cell["tau"], f"S = {cell['steps']}"
        text = ", ".join(f"{t:g}" for t in times)
        if len(times) > 120:
            text = f"{', '.join(f'{t:g}' for t in times[:5])}, ... , {', '.join(f'{t:g}' for t in times[-3:])}"
        same = taus.setdefault(name, text) == text
        if not same:
            taus[f"{name}, {cell['row']}"] = text
    excluded = ("format", "version", "table_1", "table_2", "figure_3", "published", "paper_table_2", "walk_steps")
    settings = {key: value for key, value in report.items() if key not in excluded}
    return json.dumps({**settings, "tau": taus}, indent=1)
