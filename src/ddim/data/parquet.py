"""Images in the rows of a table: parquet files, and datasets of the Hugging Face hub."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddim.data.decode import Source
from ddim.data.labels import Labels, read_column
from ddim.errors import DdimError, printable

_TIMEOUT = 5.0
_NO_ROWS = "has no rows", "use a dataset with images"
_REPLACE = "download it again or remove it"


@dataclass(frozen=True, eq=False)
class Rows:
    """The images of an Arrow column of {bytes, path}.

    A row has a path instead of bytes in a dataset of the hub that was unpacked into a cache. Other files are never
    opened, because a table from elsewhere could name any file of this machine.

    Args:
        column: The column.
        split: The split, for names.
        roots: The folders in which files may be opened.
    """

    column: Any
    split: str
    roots: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.column)

    def source(self, index: int) -> Source:
        """The encoded bytes of image `index`, or its path.

        Args:
            index: The row.

        Returns:
            Bytes, or a path.

        Raises:
            DdimError: If the row has no image, or names a file outside `roots`.
        """
        cell = self.column[index].as_py() or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if cell.get("path"):
            path = Path(cell["path"]).resolve()
            if not any(path.is_relative_to(root) for root in self.roots):
                problem = f"has no image but names the file {printable(cell['path'])}, which is not opened"
                raise DdimError(self.name(index), problem, "store encoded images in the table")
            return path
        raise DdimError(self.name(index), "has no image", "remove the row")

    def name(self, index: int) -> str:
        """The split and row of image `index`."""
        return f"{self.split}[{index}]"

    def empty(self) -> np.ndarray:
        """The rows without an image, int64, ascending; computed by Arrow without decoding rows."""
        from pyarrow import compute  # type: ignore[import-untyped]

        fields = [field.name for field in self.column.type]
        present: Any = np.zeros(len(self.column), bool)
        for name in ("bytes", "path") if self.roots else ("bytes",):
            if name in fields:
                length = compute.binary_length(compute.struct_field(self.column, name))
                present |= compute.fill_null(length, 0).to_numpy() > 0
        return np.flatnonzero(~present)


Table = tuple[Rows, Labels]
"""The images of a table with their labels."""


def read_parquet(files: Sequence[Path], where: str, split: str, label_column: str | None = None) -> Table:
    """Read the images of parquet files, in the order of the files.

    The reader stores its copy in its own cache (HF_HOME), never beside the files, and uses no network.

    Args:
        files: The shards.
        where: Their name in an error.
        split: The split, for the names of rows.
        label_column: The label column, see `ddim.data.labels.read_column`.

    Returns:
        Images and labels.

    Raises:
        DdimError: If they cannot be read, or have no image column, no such label column, or no rows.
    """
    datasets = _library()
    if _check_shards(files) == 0:
        raise DdimError(where, *_NO_ROWS)
    failed = ""
    try:
        with _quiet(datasets):
            data = datasets.Dataset.from_parquet([str(path) for path in files])
    except Exception as error:  # the reader raises its own exceptions and Arrow's, wrapped or not
        failed = _reason(error)
    if failed:
        gc.collect()  # an interrupted scan that still exists at exit would abort the process
        raise DdimError(where, f"cannot be read as parquet ({failed})", _REPLACE)
    return _table(datasets, data, where, split, label_column)


def read_hub(name: str, split: str, label_column: str | None = None) -> Table:
    """Read the images of a dataset of the Hugging Face hub, or of its cached copy if there is no network.

    Args:
        name: "owner/name".
        split: One of its splits.
        label_column: The label column, see `ddim.data.labels.read_column`.

    Returns:
        Images and labels.

    Raises:
        DdimError: If it cannot be loaded, or has no such split, image column, label column or rows.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    datasets = _library()
    offline = _offline(name)
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        with _quiet(datasets, bars=not offline):
            data = datasets.load_dataset(name, split=split)
    except Exception as error:  # exceptions of the library, the hub client, Arrow and the network
        if offline:
            problem = "is not a local file or folder, and the hub cannot be reached"
            raise DdimError(name, problem, "check the path or the network") from None
        raise DdimError(
            name, f"is not available from the hub ({_reason(error)})", "check the name and the split"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE)
    roots = tuple(Path(cache).expanduser().resolve() for cache in caches)
    return _table(datasets, data, name, split, label_column, roots)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise DdimError("datasets", "is not installed", "run: pip install 'ddim[data]'") from None
    return datasets


def _offline(name: str) -> bool:
    """Whether the hub cannot be reached; checked first, because its client would retry for half a minute."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT)
    except OfflineModeIsEnabled:
        return True
    except (HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        problem = f"is not a local file or folder, and not available from the hub ({_reason(error)})"
        raise DdimError(name, problem, "check the name, or log in if the dataset is private") from None
    except Exception:  # the HTTP library's exceptions without a network depend on its version
        return True
    return False


def _table(
    datasets: Any, data: Any, where: str, split: str, label_column: str | None, roots: tuple[Path, ...] = ()
) -> Table:
    if len(data) == 0:
        raise DdimError(where, *_NO_ROWS)
    features = data.features
    columns = [key for key in ("image", "img") if key in features]
    columns += [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        problem = f"has no image column (it has {printable(', '.join(features) or 'none')})"
        raise DdimError(where, problem, "name the image column image or img")
    try:
        with _quiet(datasets):
            cast = data.select_columns([columns[0]]).cast_column(columns[0], datasets.Image(decode=False))
    except Exception as error:  # Arrow's casts raise several exception types
        problem = f"column {columns[0]} does not contain images ({_reason(error)})"
        raise DdimError(where, problem, "store encoded images in it") from None
    labels = read_column(datasets, data, columns[0], label_column, where)
    return Rows(cast.data.column(columns[0]), printable(split), roots), labels


@contextmanager
def _quiet(datasets: Any, bars: bool = False) -> Iterator[None]:
    """Silence the library's log and, unless `bars`, its progress bars; its settings are restored on exit."""
    from huggingface_hub.utils import logging as hub_log

    log, had_bars = datasets.utils.logging, datasets.is_progress_bar_enabled()
    levels = log.get_verbosity(), hub_log.get_verbosity()
    if not bars:
        datasets.disable_progress_bars()
    log.set_verbosity(logging.CRITICAL)
    hub_log.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(levels[0])
        hub_log.set_verbosity(levels[1])
        if had_bars:
            datasets.enable_progress_bars()


def _check_shards(files: Sequence[Path]) -> int:
    """Check that all shards are parquet files with the same columns, and return the number of rows."""
    from pyarrow import parquet

    columns, rows = list[str](), 0
    for path in files:
        try:
            metadata = parquet.read_metadata(path)
            names = sorted(metadata.schema.to_arrow_schema().names)
        except Exception as error:  # Arrow's exceptions and the system's
            raise DdimError(printable(path), f"cannot be read as parquet ({_reason(error)})", _REPLACE) from None
        columns, rows = columns or names, rows + metadata.num_rows
        if names != columns:
            problem = f"has the columns {', '.join(names)}, but {files[0].name} has {', '.join(columns)}"
            raise DdimError(printable(path), printable(problem), "pass one dataset at a time")
    return rows


def _reason(error: BaseException) -> str:
    """The message of the innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0] if lines else type(error).__name__)[:160]
