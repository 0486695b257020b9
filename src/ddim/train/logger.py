"""Logging of training metrics to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ddim._io.atomic import Appender, write_atomic
from ddim._io.checksum import journal_line, read_line
from ddim._io.reading import TEXT_BYTES, entry, read_bytes
from ddim.errors import DdimError, warn


class MetricsLogger(contextlib.AbstractContextManager["MetricsLogger"]):
    """Metrics logger. On resume, entries after `step` are dropped, because those steps are repeated.

    Args:
        folder: The run directory.
        step: The step from which the run starts or resumes.
    """

    def __init__(self, folder: Path, step: int):
        self._closing = contextlib.ExitStack()
        path = folder / "metrics.jsonl"
        _cut(path, step)
        self._file = self._closing.enter_context(Appender(path))
        self._board = self._events(folder / "tensorboard", step)

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def log(self, step: int, values: dict[str, float], **more: Any) -> None:
        """Write one line of metrics; `values` are also written to TensorBoard, `more` are not."""
        self._file.write(journal_line({"step": step, **values, **more}))
        for name, value in values.items():
            if self._board:
                self._board.add_scalar(name, value, step)

    def _events(self, folder: Path, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warn("tensorboard is not installed; metrics are written to metrics.jsonl only")
            return None
        try:
            writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise DdimError(folder, f"cannot be written ({error.strerror or error})", "free space there") from None
        self._closing.callback(writer.close)
        return writer


def _cut(path: Path, step: int) -> None:
    """Drop the lines of later steps; lines that are torn or damaged are dropped with a warning."""
    if not path.exists():
        return
    lines, damaged, checksummed = [], 0, False
    data = read_bytes(path, TEXT_BYTES)
    for line in data.decode("utf-8", errors="surrogateescape").splitlines(keepends=True):
        try:
            record, checksummed = read_line(line, checksummed)
            if not all(isinstance(value, int | float) for value in record.values()):
                raise ValueError("a value is not a number")
            if entry(record, "step", int, path) <= step:
                lines.append(line)
        except (ValueError, TypeError, AttributeError):
            damaged += 1
    if damaged:
        warn(f"{path}: {damaged} torn or damaged line(s) are dropped")
    text = "".join(lines).encode()
    if text != data:
        write_atomic(path, text)
