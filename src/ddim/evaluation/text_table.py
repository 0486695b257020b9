"""Quality of text samples for each number of steps S and noise level, compared with real text.

The paper's Appendix A gives no such table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ddim._io.atomic import make_folder
from ddim._io.reading import read_text
from ddim._io.terminal import table as lines_of
from ddim.data.text import TextPolicy, TextSet
from ddim.errors import DdimError
from ddim.evaluation.fid_table import Progress, TableCell, label
from ddim.evaluation.sample_folder import generate
from ddim.evaluation.text_quality import GRAM, ORDER, Reference
from ddim.model.model import Model

REAL = "real text"
COLUMNS = {
    "valid_words": "share of words that occur in the training text, %; larger is better",
    "gram_divergence": f"divergence of {GRAM}-grams from held-out text, bits; smaller is better",
    "bits_per_character": f"bits per character under a {ORDER}-gram model; the target is real text",
}


def iter_fill(
    model: Model, table: Sequence[TableCell], folder: Path, seed: int, name: str
) -> Generator[Progress, None, None]:
    """Sample every cell into its own folder, resuming from existing samples.

    Args:
        model: The text model.
        table: The cells.
        folder: Parent of the cells' folders; created if missing.
        seed: Seed of the samples: sample i of every cell starts from the same x_T.
        name: The model's name.

    Yields:
        Progress after each micro-batch.

    Raises:
        DdimError: If a folder holds something else.
    """
    make_folder(folder)
    nfe = resumed = 0
    for cell in table:
        before = nfe
        with contextlib.closing(generate(model, cell.plan, folder / cell.folder, cell.n, 0, seed, name)) as steps:
            for progress in steps:
                resumed += (progress.existing if progress.done == progress.existing else 0) * cell.plan.nfe
                nfe = before + progress.done * cell.plan.nfe
                yield Progress(cell, progress.done, nfe, resumed)


def windows(text: str, model: Model, n: int) -> list[str]:
    """Up to n windows of real text, each as long as a sample, evenly spaced and without overlap.

    Raises:
        DdimError: If the text holds fewer than two windows.
    """
    policy = cast(TextPolicy, model.config.data)
    parts = TextSet("real text", "validation", policy, policy.encode(text)).non_overlapping()
    if len(parts) < 2:
        raise DdimError("real text", f"has one window of {policy.length} tokens", "use a longer text")
    return [policy.decode(parts[i]) for i in np.unique(np.linspace(0, len(parts) - 1, min(n, len(parts))).astype(int))]


def read(model: Model, cell: TableCell, folder: Path) -> list[str]:
    """Read the samples of a cell.

    Raises:
        DdimError: If a sample cannot be read.
    """
    paths = [model.kind.path(folder / cell.folder, index) for index in range(cell.n)]
    try:
        return [read_text(path) for path in paths]
    except DdimError as error:
        problem = f"cannot be read ({error.subject}: {error.problem})"
        raise DdimError(folder / cell.folder, problem, "remove it and run again") from None


def measure(
    model: Model, table: Sequence[TableCell], folder: Path, reference: Reference, real: Sequence[str]
) -> list[dict[str, Any]]:
    """Metrics of the real text (first row) and of every cell.

    Args:
        model: The model.
        table: The cells, already sampled.
        folder: Parent of the cells' folders.
        reference: The text to compare with.
        real: Windows of real text that are in neither part of the reference.
    """
    rows = [{"row": REAL, "steps": None, "n": len(real), **reference.measure(real)}]
    for cell in table:
        metrics = reference.measure(read(model, cell, folder))
        rows.append({"row": cell.row, "steps": cell.steps, "n": cell.n, "plan": cell.plan.name, **metrics})
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table as text, one section per metric."""
    cells = [row for row in rows if row["row"] != REAL]
    steps = sorted({row["steps"] for row in cells})
    names = list(dict.fromkeys(row["row"] for row in cells))
    by_position = {(row["row"], row["steps"]): row for row in cells}
    lines = []
    for key, title in COLUMNS.items():
        scale, digits = (100, 1) if key == "valid_words" else (1, 3)
        columns = [("S", [label(name) for name in names])]
        for s in steps:
            cells_of_s = [by_position.get((name, s)) for name in names]
            columns.append((str(s), [f"{scale * row[key]:.{digits}f}" if row else "-" for row in cells_of_s]))
        lines += ["", title, *lines_of(columns)]
        lines += [f"{REAL}: {scale * row[key]:.{digits}f}" for row in rows if row["row"] == REAL]
    counts = sorted({row["n"] for row in rows})
    return "\n".join([*lines[1:], "", f"{' or '.join(map(str, counts))} samples per cell"])
