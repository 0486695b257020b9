"""The paper's Table 1 for a model: samples of every number of calls and amount of noise, held against data."""

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
from ddim.model.base import ModelBase
from ddim.model.image import Model
from ddim.model.tokens import TokenModel
from ddim.plan.base import BasePlan
from ddim.sampling.microbatch import Label, labels_of

ETAS = ("0", "0.2", "0.5", "1", "hat")
STEPS = (10, 20, 50, 100, 1000)
PAIRS = 2000  # of features for consistency


@dataclass(frozen=True, eq=False)
class TableCell:
    """One place of the table.

    Args:
        row: "0", "0.2", "hat", or the name of a sampler without noise.
        steps: S.
        n: How many samples.
        plan: What makes them.
    """

    row: str
    steps: int
    n: int
    plan: BasePlan[Any]

    @property
    def label(self) -> str:
        """The row in words."""
        return label(self.row)

    @property
    def folder(self) -> str:
        """The name of its samples folder, where samples are kept."""
        return f"S{self.steps}-{self.row}"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a table stands.

    Args:
        cell: The cell at hand.
        done: Its samples so far.
        calls: Network calls for samples so far, over all cells, and of those that were there before.
        found: The calls that were there before.
    """

    cell: TableCell
    done: int
    calls: int
    found: int


@dataclass(frozen=True, eq=False)
class Measured:
    """A cell and what was found.

    Args:
        cell: The cell.
        figures: See `ddim.evaluation.distances`.
        gathered: Its features, and the first of its pictures.
    """

    cell: TableCell
    figures: dict[str, Any]
    gathered: FeatureStats


def label(row: str) -> str:
    """A row of the table in words."""
    return "sigma-hat" if row == "hat" else f"eta = {row}" if row[:1].isdigit() else row


def cells(
    model: Model | TokenModel,
    steps: Sequence[int],
    rows: Sequence[str],
    n: Counts,
    grid: str | None = None,
    **settings: Any,
) -> list[TableCell]:
    """The cells of a table, the cheap ones first.

    Args:
        model: The model.
        steps: Numbers of network calls S.
        rows: etas such as "0.2", "hat", and names of samplers without noise, "auto" among them.
        n: How many samples each has, see `ddim.evaluation.counts.Counts`.
        grid: The grid of the etas and "hat"; samplers by name take it too, but for "auto", which has its own.
        settings: Of every plan: `temperature` and `top_p` of categories; `clip_x0` and `top` of real-valued images, the
            latter not for "auto", which has its own.

    Raises:
        DdimError: If one cannot be made, is named twice, or none is left.
    """
    rows = [row_name(row) for row in rows]
    for name, given in (("--steps", [*map(str, steps)]), ("--eta", rows)):
        if len({*given}) < len(given) or not given:
            raise DdimError(f"{name} {','.join(given)}", "names one twice, or none", "name each once")
    made = []
    for s in sorted(steps):
        for row in rows:
            if not (count := n(s, row)):
                continue
            made.append(TableCell(row, s, count, _plan(model, row, s, grid, settings)))
    n.check_used()
    if not made:
        raise DdimError("the table", "has no cell left", "give -n a number for one")
    return made


def _plan(model: Model | TokenModel, row: str, steps: int, grid: str | None, settings: dict[str, Any]) -> BasePlan[Any]:
    if row == "hat" and "sigma" not in model.SETTINGS:
        raise DdimError("--eta hat", "is not a kernel of categories", "leave it out")
    given: dict[str, Any] = {"sigma": "hat"} if row == "hat" else {"eta": float(row)} if row[:1].isdigit() else {}
    named: dict[str, Any] = {} if given else {"sampler": row}
    if row == "auto":
        return model.plan(steps, **named, **{key: value for key, value in settings.items() if key != "top"})
    return model.plan(steps, grid, **given, **named, **settings)


def check(
    model: Model | TokenModel,
    some: Sequence[TableCell],
    seed: int,
    name: str = "",
    label: Label = None,
    images: Path | None = None,
) -> None:
    """Refuse what would go wrong at a sample, before any is made; folders of samples are claimed.

    Args:
        model: The model.
        some: The cells.
        seed: Of the samples.
        name: The model's name.
        label: For a model with labels, see `ddim.sampling.microbatch.Label`.
        images: Where samples are to be kept.

    Raises:
        DdimError: If the seed or the label is none, the model needs one, or a folder holds something else.
    """
    for cell in some:
        image_sets.from_model(model, cell.plan, cell.n, seed, label=label)
    for cell in some if images else ():
        steps = generate(model, cell.plan, (images or Path()) / cell.folder, cell.n, 0, seed, name, CHUNK, label)
        with contextlib.closing(steps):
            next(steps)


def iter_fill(
    model: Model | TokenModel,
    some: Sequence[TableCell],
    data: Statistics,
    extractor: Extractor,
    folder: Path,
    seed: int = 0,
    name: str = "",
    label: Label = None,
    images: Path | None = None,
) -> Generator[Progress, None, list[Measured]]:
    """Sample and measure every cell, going on with what the folder holds.

    Args:
        model: The model.
        some: The cells.
        data: What samples are held against.
        extractor: The feature space of both.
        folder: Where cells are kept, by what they depend on; it is made.
        seed: Of the samples: sample i of every cell starts from the same x_T.
        name: The model's name.
        label: For a model with labels, see `ddim.sampling.microbatch.Label`.
        images: A folder to keep the samples in as PNG files; none are written without.

    Yields:
        Where it stands, after each chunk of samples.

    Returns:
        What was found, in the order of the cells.
    """
    make_folder(folder)
    made: list[Measured] = []
    calls = found = 0
    for cell in some:
        kept = images / cell.folder if images else None
        pictures = image_sets.from_model(model, cell.plan, cell.n, seed, name, label, kept)
        path = folder / f"{cell.folder}-{digest(pictures.what, extractor)}.safetensors"
        if kept and path.exists():  # its figures may be known, its samples not written
            for _ in generate(model, cell.plan, kept, cell.n, 0, seed, name, CHUNK, label):
                yield Progress(cell, 0, calls, found)
        steps, done, before = image_sets.iter_measure(pictures, extractor, path), 0, calls
        first = True
        while True:
            try:
                done = next(steps)
            except StopIteration as end:
                statistics, gathered = end.value
                break
            found += done * cell.plan.calls if first else 0
            first, calls = False, before + done * cell.plan.calls
            try:
                yield Progress(cell, done, calls, found)
            except BaseException:
                steps.close()
                raise
        made.append(Measured(cell, _figures(path, statistics, data, seed), _slim(gathered)))
    return made


def digest(what: dict[str, Any], extractor: Extractor) -> str:
    """What tells a gathering from others: 12 hexadecimal digits of what it depends on, software left out."""
    named = {key: value for key, value in what.items() if key != "software"}
    text = json.dumps([named, extractor.name, extractor.sha256], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _slim(gathered: FeatureStats) -> FeatureStats:
    """Without what only the distances need: in Inception's space a hundred megabytes a cell."""
    sums = Moments(0, gathered.count, torch.empty(0), torch.empty(0, 0))
    return replace(gathered, moments=sums, features=gathered.features[:PAIRS].clone())


def _figures(path: Path, samples: Statistics, data: Statistics, seed: int) -> dict[str, Any]:
    """The distances, kept beside the cell: nearest neighbours and kernels take longer than small networks do."""
    asked = {"n": samples.moments.count, "data": data.protocol.model_dump(), "seed": seed}
    asked |= {"kid": fidelity.installed(), "form": 2}
    kept = path.with_suffix(".json")
    try:
        there = read_sealed_json(kept, dict)
        if there.get("asked") == asked:
            return dict(entry(there, "figures", dict, kept))
    except DdimError:
        if kept.exists():
            warn(f"{kept}: is damaged, or of another version; it is made again")
    figures = distances(samples, data, seed)
    write_json(kept, {"asked": asked, "figures": figures})
    return figures


def seconds(model: ModelBase, cell: TableCell, gathered: FeatureStats, label: Label = None) -> tuple[float, int]:
    """Seconds a sample takes and of how many samples that is the mean; one micro-batch is timed where none was.

    Args:
        model: The model.
        cell: The cell.
        gathered: What was gathered of it.
        label: For a model with labels, see `ddim.sampling.microbatch.Label`.
    """
    if gathered.timed:
        return gathered.seconds / gathered.timed, gathered.timed
    indices = range(model.micro_batch)
    labels = labels_of(label, indices, model.config.network.classes)
    begun = time.monotonic()
    for _ in model.sample_blocks(cell.plan, indices, 0, labels):
        pass
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return (time.monotonic() - begun) / len(indices), len(indices)
