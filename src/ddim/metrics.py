"""What a training run tells of itself as it goes: metrics.jsonl, and TensorBoard events beside it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ddim.errors import DdimError, say
from ddim.files import write_atomic
from ddim.reading import entry, read_lines


class Metrics(contextlib.AbstractContextManager["Metrics"]):
    """The metrics of a run from a step on; what was told of later steps is dropped: it will be told again.

    Args:
        folder: The run's folder.
        step: The step that the run goes on from.
    """

    def __init__(self, folder: Path, step: int):
        self._closing = contextlib.ExitStack()
        path = folder / "metrics.jsonl"
        _cut(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._closing.callback(self._file.close)
        self._board = self._events(folder / "tensorboard", step)

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def tell(self, step: int, values: dict[str, float], **more: Any) -> None:
        """One line; the values go to TensorBoard too."""
        self._file.write(json.dumps({"step": step, **values, **more}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._board:
                self._board.add_scalar(name, value, step)

    def _events(self, folder: Path, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("tensorboard is not installed: metrics go to metrics.jsonl only")
            return None
        try:
            writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise DdimError(folder, f"cannot be written ({error.strerror or error})", "make room there") from None
        self._closing.callback(writer.close)
        return writer


def _cut(path: Path, step: int) -> None:
    lines = read_lines(path, lambda body: entry(body, "step", int, path) <= step or None)
    if path.exists():
        write_atomic(path, b"".join(line for kept, line in lines if kept))
