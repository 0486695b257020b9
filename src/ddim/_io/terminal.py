"""Text for a terminal: counts with their nouns, and tables that fit a width."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

WIDTH = 80
"""The width of printed tables, if no other is passed."""

Cells = Sequence[str] | Sequence[float | None]
"""The cells of a column: texts, or numbers, None for an empty cell."""


def counted(n: int, noun: str) -> str:
    """A count and its noun, such as "1 image" or "2 images".

    Args:
        n: The number.
        noun: The plural of the noun, formed with an s.
    """
    return f"{n} {noun.removesuffix('s') if n == 1 else noun}"


def terminal_width() -> int:
    """The columns of the terminal, or of COLUMNS if it is set; 80 without a terminal."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)


def wrapped(text: str, width: int = WIDTH, indent: str = "", again: str | None = None) -> list[str]:
    """A text as lines of at most `width` characters; a longer word keeps its own line.

    Args:
        text: The text.
        width: The maximum length of a line.
        indent: What the first line begins with.
        again: What the other lines begin with; `indent` if None.
    """
    rest = indent if again is None else again
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    columns: Sequence[tuple[str, Cells]], width: int = WIDTH, keys: int = 1, optional: Sequence[str] = ()
) -> list[str]:
    """Format columns as right-aligned lines of at most `width` characters.

    Numbers get 6 decimals, fewer if the table is too wide, but at least 4; then the optional columns are left out; and
    if that is not enough, the table is continued below with the columns that do not fit.

    Args:
        columns: Head and cells of each column.
        width: The maximum length of a line; columns that exceed it on their own are not broken.
        keys: The number of columns, from the left, that are repeated if the table is continued below.
        optional: The heads of columns that may be left out.
    """
    short = [column for column in columns if column[0] not in optional]
    for some, digits in [(columns, 6), (columns, 5), (columns, 4), (short, 4)]:
        cells = [[head, *(_cell(value, digits) for value in values)] for head, values in some]
        if sum(_width(column) + 2 for column in cells) - 2 <= width:
            return _lines(cells)
    first = sum(_width(column) + 2 for column in cells[:keys])
    blocks: list[list[list[str]]] = [[]]
    room = width - first + 2
    for column in cells[keys:]:
        if blocks[-1] and room < _width(column) + 2:
            blocks.append([])
            room = width - first + 2
        blocks[-1].append(column)
        room -= _width(column) + 2
    return [line for block in blocks for line in ["", *_lines([*cells[:keys], *block])]][1:]


def _cell(value: str | float | None, digits: int) -> str:
    if value is None or isinstance(value, str):
        return "." if value is None else value
    # A number that would show at most one of its digits, such as alpha_bar at T, has an exponent.
    return f"{value:.1e}" if 0 < abs(value) < 10 ** (1 - digits) else f"{value:.{digits}f}"


def _width(cells: Sequence[str]) -> int:
    return max(map(len, cells))


def _lines(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [_width(column) for column in columns]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]
