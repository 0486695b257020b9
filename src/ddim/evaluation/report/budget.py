"""Numbers of samples and steps for a reproduction of the paper's section 5 within a time budget.

All cells that are compared get the same number of samples.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ddim._io.checksum import read_sealed_json, write_json
from ddim._io.reading import entry
from ddim.errors import DdimError, warn
from ddim.evaluation.report.sections import INTERPOLATED, INTERPOLATION_STEPS
from ddim.model.model import Model

SECONDS = {"10min": 600.0, "1h": 3600.0}
LEAST_SAMPLES, LEAST_IMAGES = 200, 50
FULL = 50_000
TABLE_2_STEPS = (10, 20, 50, 100, 200, 500, 1000)
_TABLE_1, _TABLE_2 = 0.65, 0.2  # fractions of the time after the interpolations; the rest is for features and the page


class Amounts(BaseModel):
    """The amount of work of a reproduction.

    Args:
        samples: Number of samples of the cells of Table 1, in the syntax of `ddim.evaluation.counts.Counts`.
        steps: Values of S in Table 1.
        images: Number of images of Table 2 for each S.
        round_trips: Values of S in Table 2.
        left_out: Description of what does not fit into the budget; "" if everything fits.
        calls_per_second: Measured network evaluations of single samples per second; None if nothing was scaled.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    samples: str
    steps: tuple[int, ...]
    images: int = Field(alias="pictures")
    round_trips: tuple[int, ...]
    left_out: str = ""
    calls_per_second: float | None = None


def speed(model: Model, nfe: int = 5) -> float:
    """Network evaluations of single samples per second, timed on one micro-batch after a warm-up micro-batch."""
    plan, size = model.plan(nfe, sampler="ddim"), model.micro_batch
    for first in (0, size):
        start_time = time.monotonic()
        for block in model.sample_blocks(plan, range(first, first + size)):
            block.cpu()
    return nfe * size / (time.monotonic() - start_time)


def fit(per_second: float, seconds: float, steps: Sequence[int], rows: int, test: int, T: int) -> Amounts:
    """The amounts that fit into a time: fewer samples first, down to a minimum, then without the largest S.

    Args:
        per_second: Network evaluations of single samples per second.
        seconds: The time budget.
        steps: Requested values of S in Table 1.
        rows: Number of rows of Table 1.
        test: Number of test images.
        T: Length of the schedule.
    """
    nfe = max(0.0, per_second * seconds - INTERPOLATED * INTERPOLATION_STEPS)
    table_1_steps, n = _most(nfe * _TABLE_1, sorted(steps), rows, LEAST_SAMPLES, FULL)
    trips = [s for s in TABLE_2_STEPS if s <= T]
    table_2_steps, images = _most(nfe * _TABLE_2, trips, 2, LEAST_IMAGES, test)
    return Amounts(
        samples=str(n),
        steps=tuple(table_1_steps),
        images=images,
        round_trips=tuple(table_2_steps),
        left_out=left_out(sorted(steps)[len(table_1_steps) :], trips[len(table_2_steps) :]),
        calls_per_second=per_second,
    )


def left_out(table_1: Sequence[int], table_2: Sequence[int]) -> str:
    """Description of the values of S that do not fit, such as "S = 1000 of Table 1"; "" for none."""
    excluded = {1: table_1, 2: table_2}
    return " and ".join(f"S = {', '.join(map(str, left))} of Table {k}" for k, left in excluded.items() if left)


def _most(nfe: float, steps: Sequence[int], rows: int, least: int, most: int) -> tuple[list[int], int]:
    """The longest prefix of `steps` for which `least` samples of each fit, and the number that fits (at least 2)."""
    for count in range(len(steps), 0, -1):
        n = int(nfe / (rows * sum(steps[:count])))
        if n >= least or count == 1:
            return [*steps[:count]], max(2, min(most, n if n < 100 else n // 10 * 10))
    raise ValueError("no steps")


def settle(path: Path, request: Mapping[str, Any], model: Model, test: int) -> Amounts:
    """The amounts of a reproduction: read from its file, or computed from the request and stored there.

    Args:
        path: The file.
        request: The report's settings: "budget", "steps", "eta", "n", "pictures", and all else it depends on.
        model: The model.
        test: Number of test images.

    Raises:
        DdimError: If the file is of another request.
    """
    if path.exists():
        amounts = _read_amounts(path, request)
    else:
        amounts = _compute_amounts(request, model, test)
        content = {"request": dict(request), "counts": amounts.model_dump(by_alias=True)}
        write_json(path, content)
    if amounts.left_out:
        warn(f"budget {request['budget']}: skipped {amounts.left_out}")
    return amounts


def _read_amounts(path: Path, request: Mapping[str, Any]) -> Amounts:
    content = read_sealed_json(path, dict, again="choose another folder")
    try:
        was, amounts = entry(content, "request", dict, path), Amounts.model_validate(content.get("counts"))
    except ValueError:
        raise DdimError(path, "is not the request of a report", "choose another folder") from None
    if was != request:
        key = next(key for key in {**request, **was} if was.get(key) != request.get(key))
        problem = f"holds a report of other settings: {key} was {was.get(key)}, not {request.get(key)}"
        raise DdimError(path.parent, problem, "choose another folder, or the same settings")
    return amounts


def _compute_amounts(request: Mapping[str, Any], model: Model, test: int) -> Amounts:
    steps, trips = tuple(request["steps"]), tuple(s for s in TABLE_2_STEPS if s <= model.schedule.T)
    if request["budget"] == "full":
        amounts = Amounts(samples=str(FULL), steps=steps, images=test, round_trips=trips)
    else:
        seconds = SECONDS[request["budget"]]
        amounts = fit(speed(model), seconds, steps, len(request["eta"]), test, model.schedule.T)
    update: dict[str, Any] = {}
    if request["n"] is not None:
        update |= {"samples": request["n"], "steps": steps}
        update |= {"left_out": left_out((), trips[len(amounts.round_trips) :])}
    if request["pictures"] is not None:
        update |= {"images": request["pictures"]}
    return amounts.model_copy(update=update)
