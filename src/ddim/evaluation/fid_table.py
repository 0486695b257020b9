"""The paper's Table 1 for a model: distance of samples to data for each number of steps S and each eta."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddim._io.atomic import make_folder
from ddim._io.checksum import read_sealed_json, write_json
from ddim._io.reading import entry
from ddim.errors import DdimError, warn
from ddim.evaluation import fidelity, image_sets
from ddim.evaluation.accumulate import CHUNK, FeatureStats
from ddim.evaluation.counts import Counts, row_name
from ddim.evaluation.distances import distances
from ddim.evaluation.features import Extractor
from ddim.evaluation.moments import Moments
from ddim.evaluation.sample_folder import generate
from ddim.evaluation.statistics import Statistics
from ddim.model.model import Model
from ddim.plan.base import BasePlan
from ddim.sampling.microbatch import Label, labels_of

ETAS = ("0", "0.2", "0.5", "1", "hat")
STEPS = (10, 20, 50, 100, 1000)
PAIRS = 2000  # features stored per cell for `consistency`


@dataclass(frozen=True, eq=False)
class TableCell:
    """One cell of the table.

    Args:
        row: "0", "0.2", "hat", or the name of a deterministic sampler.
        steps: S.
        n: Number of samples.
        plan: The sampling plan.
    """

    row: str
    steps: int
    n: int
    plan: BasePlan[Any]

    @property
    def label(self) -> str:
        """Display name of the row."""
        return label(self.row)

    @property
    def folder(self) -> str:
        """Name of the cell's samples folder."""
        return f"S{self.steps}-{self.row}"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a table.

    Args:
        cell: The current cell.
        done: Number of its samples done.
        nfe: Network evaluations for samples so far, over all cells, including those of earlier runs.
        resumed: Network evaluations of earlier runs.
    """

    cell: TableCell
    done: int
    nfe: int
    resumed: int


@dataclass(frozen=True, eq=False)
class Measured:
    """A cell with its measurements.

    Args:
        cell: The cell.
        figures: The distances to the data, see `ddim.evaluation.distances`.
        gathered: Its features, and the first of its images.
    """

    cell: TableCell
    figures: dict[str, Any]
    gathered: FeatureStats


def label(row: str) -> str:
    """Display name of a row of the table."""
    return "sigma-hat" if row == "hat" else f"eta = {row}" if row[:1].isdigit() else row


def cells(
    model: Model,
    steps: Sequence[int],
    rows: Sequence[str],
    n: Counts,
    grid: str | None = None,
    **settings: Any,
) -> list[TableCell]:
    """The cells of a table, sorted by S.

    Args:
        model: The model.
        steps: Numbers of network evaluations S.
        rows: Values of eta such as "0.2", "hat", and names of deterministic samplers, including "auto".
        n: Number of samples of each cell, see `ddim.evaluation.counts.Counts`.
        grid: Spacing of the timesteps; not used for "auto", which has its own.
        settings: Settings of every plan: `temperature` and `top_p` for discrete data; `clip_x0` and `top` for
            real-valued images (`top` is not used for "auto", which has its own).

    Raises:
        DdimError: If a plan cannot be built, a value is repeated, or no cell is left.
    """
    rows = [row_name(row) for row in rows]
    for name, values in (("--steps", [*map(str, steps)]), ("--eta", rows)):
        if len({*values}) < len(values) or not values:
            raise DdimError(f"{name} {','.join(values)}", "repeats a value, or is empty", "list each value once")
    result = []
    for s in sorted(steps):
        for row in rows:
            if not (count := n(s, row)):
                continue
            result.append(TableCell(row, s, count, _plan(model, row, s, grid, settings)))
    n.check_used()
    if not result:
        raise DdimError("the table", "has no cell", "use -n with a number > 0 for one")
    return result


def _plan(model: Model, row: str, steps: int, grid: str | None, settings: dict[str, Any]) -> BasePlan[Any]:
    if row == "hat" and "sigma" not in model.planner.SETTINGS:
        raise DdimError("--eta hat", "is not available for discrete data", "remove it")
    noise: dict[str, Any] = {"sigma": "hat"} if row == "hat" else {"eta": float(row)} if row[:1].isdigit() else {}
    sampler: dict[str, Any] = {} if noise else {"sampler": row}
    if row == "auto":
        settings, grid = {key: value for key, value in settings.items() if key != "top"}, None
    plan: BasePlan[Any] = model.plan(steps, grid, **noise, **sampler, **settings)
    return plan


def check(
    model: Model,
    table: Sequence[TableCell],
    seed: int,
    name: str = "",
    label: Label = None,
    images: Path | None = None,
) -> None:
    """Validate the arguments before any sample is drawn; creates the samples folders and their manifests.

    Args:
        model: The model.
        table: The cells.
        seed: Seed of the samples.
        name: The model's name.
        label: Class labels for a conditional model, see `ddim.sampling.microbatch.Label`.
        images: Parent of the samples folders; None to write none.

    Raises:
        DdimError: If the seed or label is invalid, a required label is missing, or a folder holds something else.
    """
    for cell in table:
        image_sets.from_model(model, cell.plan, cell.n, seed, label=label)
    for cell in table if images else ():
        steps = generate(model, cell.plan, (images or Path()) / cell.folder, cell.n, 0, seed, name, CHUNK, label)
        with contextlib.closing(steps):
            next(steps)


def iter_fill(
    model: Model,
    table: Sequence[TableCell],
    data: Statistics,
    extractor: Extractor,
    folder: Path,
    seed: int = 0,
    name: str = "",
    label: Label = None,
    images: Path | None = None,
) -> Generator[Progress, None, list[Measured]]:
    """Sample and measure every cell, resuming from the folder.

    Args:
        model: The model.
        table: The cells.
        data: Statistics of the data to compare with.
        extractor: The feature extractor of samples and data.
        folder: Folder of the cells' files, named by a hash of their settings; created if missing.
        seed: Seed of the samples: sample i of every cell starts from the same x_T.
        name: The model's name.
        label: Class labels for a conditional model, see `ddim.sampling.microbatch.Label`.
        images: Folder to write the samples to as PNG files; None to write none.

    Yields:
        Progress after each chunk of samples.

    Returns:
        The measurements, in the order of the cells.
    """
    make_folder(folder)
    measured: list[Measured] = []
    nfe = resumed = 0
    for cell in table:
        samples_folder = images / cell.folder if images else None
        source = image_sets.from_model(model, cell.plan, cell.n, seed, name, label, samples_folder)
        path = folder / f"{cell.folder}-{digest(source.what, extractor)}.safetensors"
        if samples_folder and path.exists():  # measured in an earlier run that may not have written the samples
            for _ in generate(model, cell.plan, samples_folder, cell.n, 0, seed, name, CHUNK, label):
                yield Progress(cell, 0, nfe, resumed)
        steps, done, before = image_sets.iter_measure(source, extractor, path), 0, nfe
        first = True
        while True:
            try:
                done = next(steps)
            except StopIteration as end:
                statistics, gathered = end.value
                break
            resumed += done * cell.plan.nfe if first else 0
            first, nfe = False, before + done * cell.plan.nfe
            try:
                yield Progress(cell, done, nfe, resumed)
            except BaseException:
                steps.close()
                raise
        measured.append(Measured(cell, _figures(path, statistics, data, seed), _slim(gathered)))
    return measured


def digest(what: dict[str, Any], extractor: Extractor) -> str:
    """Hash of everything that determines a cell's features except software versions: 12 hexadecimal digits."""
    reproducible = {key: value for key, value in what.items() if key != "software"}
    text = json.dumps([reproducible, extractor.name, extractor.sha256], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _slim(gathered: FeatureStats) -> FeatureStats:
    """Drop what only the distances need, to save memory: with Inception it takes a hundred megabytes per cell."""
    sums = Moments(0, gathered.count, torch.empty(0), torch.empty(0, 0))
    return replace(gathered, moments=sums, features=gathered.features[:PAIRS].clone())


def _figures(path: Path, samples: Statistics, data: Statistics, seed: int) -> dict[str, Any]:
    """The distances, cached in a file next to the cell's: KID, precision and recall can take longer than sampling."""
    request = {"n": samples.moments.count, "data": data.protocol.model_dump(), "seed": seed}
    request |= {"kid": fidelity.installed(), "form": 2}
    cache = path.with_suffix(".json")
    try:
        cached = read_sealed_json(cache, dict)
        if cached.get("asked") == request:
            return dict(entry(cached, "figures", dict, cache))
    except DdimError:
        if cache.exists():
            warn(f"{cache}: is damaged, or of another version; it is computed again")
    figures = distances(samples, data, seed)
    write_json(cache, {"asked": request, "figures": figures})
    return figures


def seconds(model: Model, cell: TableCell, gathered: FeatureStats, label: Label = None) -> tuple[float, int]:
    """Mean seconds per sample, and the number of samples timed; times one micro-batch if none were.

    Args:
        model: The model.
        cell: The cell.
        gathered: The cell's statistics.
        label: Class labels for a conditional model, see `ddim.sampling.microbatch.Label`.
    """
    if gathered.timed:
        return gathered.seconds / gathered.timed, gathered.timed
    indices = range(model.micro_batch)
    labels = labels_of(label, indices, model.config.network.classes)
    start_time = time.monotonic()
    for _ in model.sample_blocks(cell.plan, indices, 0, labels):
        pass
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return (time.monotonic() - start_time) / len(indices), len(indices)
