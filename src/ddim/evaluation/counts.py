"""Row names of a table, and the number of samples of each cell."""

from __future__ import annotations

from ddim.errors import DdimError


def row_name(text: str) -> str:
    """The canonical name of a row: an eta in its shortest form, "1.0" as "1"; other names unchanged."""
    try:
        return f"{float(text):g}" if text[:1].isdigit() else text
    except ValueError:
        raise DdimError(f"--eta {text}", "is not a number", "use --eta 0,0.2,1,hat") from None


class Counts:
    """The number of samples of each cell.

    Args:
        text: Comma-separated entries `[S[:ROW]=]N`, for instance "5000,1000=500,1000:0.2=0". Later entries override
            earlier ones; N = 0 skips a cell.

    Raises:
        DdimError: If the text cannot be parsed, or an N is negative or 1.
    """

    def __init__(self, text: str):
        self.text = text
        self.entries: list[tuple[str, int | None, str | None, int]] = []
        self.used: set[str] = set()
        for part in (part.strip() for part in text.split(",")):
            key, _, number = part.rpartition("=")
            steps, _, row = key.partition(":")
            try:
                entry = (part, int(steps) if steps else None, row_name(row) or None, int(number))
            except (ValueError, DdimError):
                hint = "use -n 5000, or -n 5000,1000=500,1000:0.2=0"
                raise DdimError(f"-n {part}", "is not [S[:ETA]=]N", hint) from None
            if entry[3] < 0 or entry[3] == 1:
                raise DdimError(f"-n {part}", "is too few samples", "use 2 or more, or 0 to skip a cell")
            self.entries.append(entry)

    def __call__(self, steps: int, row: str) -> int:
        """The number of samples of the cell at S and a row.

        Raises:
            DdimError: If no entry matches the cell.
        """
        matching = [(part, n) for part, s, r, n in self.entries if s in (None, steps) and r in (None, row)]
        if not matching:
            raise DdimError(f"-n {self.text}", f"has no number for S = {steps}", "start it with a number for all cells")
        self.used |= {part for part, _ in matching}
        return matching[-1][1]

    def check_used(self) -> None:
        """Check that every entry was used by a cell.

        Raises:
            DdimError: If an entry was not used; the first one is named.
        """
        for part, *_ in self.entries:
            if part not in self.used:
                raise DdimError(f"-n {part}", "matches no cell of the table", "use values of --steps and --eta")
