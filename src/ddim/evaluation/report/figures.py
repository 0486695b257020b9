"""Figures of an evaluation, drawn by matplotlib without a display."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ddim.errors import DdimError
from ddim.evaluation.fid_table import label

COLOURS = ("#1b4965", "#2a9d8f", "#8ab17d", "#e9a23b", "#d1495b", "#6d597a", "#457b9d", "#b56576")
INK, FAINT = "#1f2933", "#d9dee3"


def installed() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def need(subject: object) -> None:
    """Check that matplotlib is installed.

    Args:
        subject: What needs it, for the message.

    Raises:
        DdimError: If it is not.
    """
    if not installed():
        raise DdimError(subject, "needs matplotlib, which is not installed", "run: pip install 'ddim[plot]'")


def panels_of(columns: int, height: float = 3.4, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its panels, row by row, in the style of this library.

    Args:
        columns: The number of panels side by side.
        height: Height of a panel in inches; it is 4.6 inches wide.
        rows: The number of rows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, height * rows), layout="constrained")
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9aa5b1")
        axes.tick_params(colors=INK, which="both", labelsize=9)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def encoded(figure: Any, png: bool) -> bytes:
    """A figure as PNG or SVG, the same bytes in every run."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "ddim", "svg.fonttype": "path"}):
        settings: dict[str, Any] = (
            {"format": "png", "dpi": 130} if png else {"format": "svg", "metadata": {"Date": None}}
        )
        figure.savefig(out, **settings)
    return out.getvalue()


def _ticks(axis: Any, values: Sequence[float] = ()) -> None:
    """Set the ticks of a logarithmic axis: at `values`, or at 1, 2 and 5 of every decade if there are none."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(FixedLocator(sorted({*values})) if values else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def quality(
    cells: Sequence[Mapping[str, Any]],
    times: Mapping[tuple[str, int], Mapping[str, Any]],
    metric: str,
    png: bool = False,
) -> bytes:
    """Plot distance against NFE and against seconds per sample, one line per row: the paper's Figure 4.

    Args:
        cells: The cells, as in evaluate.json.
        times: Seconds per sample of each (row, S).
        metric: Name of the distance.
        png: Whether to return PNG; otherwise SVG.
    """
    figure, (left, right) = panels_of(2)
    for colour, row in zip(COLOURS * 9, dict.fromkeys(cell["row"] for cell in cells), strict=False):
        row_cells = sorted((cell for cell in cells if cell["row"] == row), key=lambda cell: int(cell["steps"]))
        seconds = [times[row, cell["steps"]]["seconds_per_image"] for cell in row_cells]
        values = [cell["fd"] for cell in row_cells]
        spread = [2 * (cell["fd_error"] or 0.0) for cell in row_cells]
        style = {"color": colour, "marker": "o", "ms": 4, "lw": 1.8, "capsize": 2, "elinewidth": 1}
        left.errorbar([cell["network_calls"] for cell in row_cells], values, spread, label=label(row), **style)
        right.errorbar(seconds, values, spread, **style)
    for axes, xlabel in ((left, "network evaluations"), (right, "seconds per sample")):
        axes.set(xscale="log", yscale="log", xlabel=xlabel)
        _ticks(axes.yaxis)
    _ticks(left.xaxis, [cell["network_calls"] for cell in cells])
    _ticks(right.xaxis)
    left.set_ylabel(f"{metric}, log scale")
    left.legend(fontsize=8, frameon=False)
    return encoded(figure, png)


def texts(cells: Sequence[Mapping[str, Any]], real: Mapping[str, Any]) -> bytes:
    """Plot the quality metrics of text samples against NFE, one line per eta, as PNG.

    Args:
        cells: The cells, as in evaluate.json.
        real: The metrics of real text, drawn as a dashed line.
    """
    figure, panels = panels_of(3)
    titles = {
        "valid_words": "share of valid words",
        "gram_divergence": "divergence of 3-grams, bits",
        "bits_per_character": "bits/character, 5-gram model",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for colour, row in zip(COLOURS * 9, dict.fromkeys(cell["row"] for cell in cells), strict=False):
            row_cells = sorted((cell for cell in cells if cell["row"] == row), key=lambda cell: int(cell["steps"]))
            steps = [cell["steps"] for cell in row_cells]
            axes.plot(
                steps, [cell[key] for cell in row_cells], color=colour, marker="o", ms=4, lw=1.8, label=label(row)
            )
        axes.axhline(real[key], color="#7b8794", lw=1.2, ls="--", label=str(real["row"]))
        axes.set(xscale="log", xlabel="network evaluations S", title=title)
        axes.title.set_size(10)
        _ticks(axes.xaxis, [cell["steps"] for cell in cells])
    panels[0].legend(fontsize=8, frameon=False)
    return encoded(figure, png=True)
