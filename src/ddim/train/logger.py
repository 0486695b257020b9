"""Logging of training metrics: metrics.jsonl, and through the protocol `Logger` TensorBoard, W&B or MLflow."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ddim._io.atomic import Appender, write_atomic
from ddim._io.checksum import journal_line, read_line
from ddim._io.reading import TEXT_BYTES, entry, parse_json, read_bytes
from ddim.errors import DdimError, warn
from ddim.names import LOGGERS

IDS = "loggers.json"  # the identifiers of the run in W&B and MLflow, to resume logging to the same one


class Logger(Protocol):
    """Where metrics are logged. Any object with these two methods can be passed to `ddim.fit`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step, such as the loss; steps that a resumed run repeats are logged again."""

    def close(self) -> None:
        """Write what is buffered; called at the end of the training, also after an error."""


class TensorBoardLogger:
    """Logs to TensorBoard event files in `folder`/tensorboard.

    Args:
        folder: The run directory.
        step: The step from which the run starts or resumes; events of later steps are purged.
        settings: Not used.

    Raises:
        DdimError: If tensorboard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _not_installed("tensorboard", "log") from None
        try:
            self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            problem = f"cannot be written ({error.strerror or error})"
            raise DdimError(folder / "tensorboard", problem, "free space there") from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbLogger:
    """Logs to Weights & Biases. Its own environment variables choose the project and the mode.

    Args:
        folder: The run directory; its name is the run's, and its `loggers.json` has the run's id, to resume it.
        step: The step from which the run starts or resumes.
        settings: The run's configuration, logged with it.

    Raises:
        DdimError: If wandb is not installed.
    """

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise _not_installed("wandb", "wandb") from None
        name = folder.absolute().name
        known = {"id": identifier, "resume": "allow"} if (identifier := _read_id(folder, "wandb")) else {}
        self._run: Any = wandb.init(dir=str(folder), name=name, config=dict(settings), **known)
        _write_id(folder, "wandb", self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowLogger:
    """Logs to MLflow. Its own environment variables choose the server and the experiment.

    Args:
        folder: The run directory; its name is the run's, and its `loggers.json` has the run's id, to resume it.
        step: The step from which the run starts or resumes.
        settings: The run's configuration, logged with it as parameters.

    Raises:
        DdimError: If mlflow is not installed.
    """

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        try:
            import mlflow
        except ImportError:
            raise _not_installed("mlflow", "mlflow") from None
        self._mlflow: Any = mlflow
        identifier = _read_id(folder, "mlflow")
        run = mlflow.start_run(run_id=identifier, run_name=folder.absolute().name, nested=True)
        if identifier is None:
            _write_id(folder, "mlflow", run.info.run_id)
            mlflow.log_params(dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


ADAPTERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


def check_logger(log: str | Logger | None) -> None:
    """Check the name of a logger, and that its library is installed, before a run starts.

    Raises:
        DdimError: If the name is unknown or the library is not installed.
    """
    if not isinstance(log, str) or log == "none":
        return
    if log not in LOGGERS:
        raise DdimError(f"log {log!r}", "is unknown", f"use one of {', '.join(LOGGERS)}")
    if not _installed(log):
        raise _not_installed(log, "log" if log == "tensorboard" else log)


def logger_of(
    log: str | Logger | None, folder: Path, step: int, settings: Mapping[str, Any] | None = None
) -> Logger | None:
    """The logger of a name.

    Args:
        log: "tensorboard", "wandb", "mlflow", "none", or a `Logger`; None is TensorBoard if it is installed.
        folder: The run directory.
        step: The step from which the run starts or resumes.
        settings: The run's configuration.

    Raises:
        DdimError: See `check_logger`.

    Warns:
        DdimWarning: If `log` is None and tensorboard is not installed.
    """
    check_logger(log)
    if log is None and not _installed("tensorboard"):
        warn("tensorboard is not installed; metrics are written to metrics.jsonl only")
        return None
    if log == "none":
        return None
    return ADAPTERS[log or "tensorboard"](folder, step, settings or {}) if isinstance(log, str | None) else log


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a specification, which is loaded
        return True


def _not_installed(name: str, extra: str) -> DdimError:
    return DdimError(f"log {name}", "is not installed", f"pip install 'ddim[{extra}]'")


def _ids(folder: Path) -> dict[str, Any]:
    path = folder / IDS
    return dict(parse_json(read_bytes(path, TEXT_BYTES), path)) if path.exists() else {}


def _read_id(folder: Path, name: str) -> str | None:
    ids = _ids(folder)
    return entry(ids, name, str, folder / IDS) if name in ids else None


def _write_id(folder: Path, name: str, identifier: str) -> None:
    write_atomic(folder / IDS, (json.dumps(_ids(folder) | {name: identifier}) + "\n").encode())


class MetricsLogger(contextlib.AbstractContextManager["MetricsLogger"]):
    """Metrics logger. On resume, entries after `step` are dropped, because those steps are repeated.

    Args:
        folder: The run directory.
        step: The step from which the run starts or resumes.
        log: Where metrics are logged besides metrics.jsonl, see `logger_of`.
        settings: The run's configuration, for loggers that record it.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        log: str | Logger | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self._closing = contextlib.ExitStack()
        path = folder / "metrics.jsonl"
        _cut(path, step)
        self._file = self._closing.enter_context(Appender(path))
        self._logger = logger_of(log, folder, step, settings)
        if self._logger is not None:
            self._closing.callback(self._logger.close)

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def log(self, step: int, values: dict[str, float], **more: Any) -> None:
        """Write one line of metrics; `values` are also passed to the logger, `more` are not."""
        self._file.write(journal_line({"step": step, **values, **more}))
        if self._logger is not None:
            self._logger.log(step, values)


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
