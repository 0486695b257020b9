"""Tables and the figure of a text evaluation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddim._io.atomic import write_atomic
from ddim.errors import warn
from ddim.evaluation.report import figures
from ddim.evaluation.report.tables import write_json
from ddim.evaluation.text_table import REAL

_KEYS = ("row", "steps", "n", "words", "valid_words", "valid_words_error", "gram_divergence", "bits_per_character")


def write_text_table(out: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write evaluate.json, evaluate.csv and, if matplotlib is installed, evaluate.png.

    Args:
        out: Output folder.
        facts: Metadata of the table.
        rows: Result of `ddim.evaluation.text_table.measure`.
    """
    write_json(out / "evaluate.json", {"format": "ddim-text-evaluation", "version": 1, **facts, "cells": list(rows)})
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_KEYS, "bits_error"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "evaluate.csv", text.getvalue().encode())
    if figures.installed():
        write_atomic(out / "evaluate.png", figures.texts([row for row in rows if row["row"] != REAL], rows[0]))
    else:
        warn("matplotlib is not installed: evaluate.png is not written; pip install 'ddim[plot]'")
