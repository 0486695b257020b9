"""Table 2 and Figures 3, 5 and 6 of the paper's section 5; the expensive parts resume from their files."""

from __future__ import annotations

import base64
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim._io.atomic import Appender
from ddim._io.checksum import journal_line, read_journal
from ddim._io.finished import Finished
from ddim._io.png import labelled_rows, png, sheet
from ddim.data import ImageSet
from ddim.data.pixels import to_uint8
from ddim.errors import DdimError
from ddim.evaluation.fid_table import Measured, label
from ddim.evaluation.reconstruction import round_trips
from ddim.model.model import Model
from ddim.sampling.latents import slerp_grid, slerp_path

SHOWN = 12
ROWS, FRAMES, SIDE, INTERPOLATION_STEPS = 5, 11, 8, 50
INTERPOLATED = ROWS * FRAMES + SIDE**2


def iter_round_trips(
    model: Model, test: ImageSet, steps: Sequence[int], count: int, path: Path, grid: str | None = None
) -> Generator[int, None, list[dict[str, Any]]]:
    """Table 2: encode and decode test images in micro-batches, with S network evaluations in each direction.

    Args:
        model: The model, in float32 for accurate results.
        test: The test set; its first images are used.
        steps: Values of S.
        count: Number of images.
        path: Results file, with one line per micro-batch.
        grid: Spacing of the timesteps; None for the default.

    Yields:
        Number of images done, over all S.

    Returns:
        A row for each S, with the first reconstructed images, uint8 (P, H, W, C).
    """
    originals, size = test.batch(range(count)), model.micro_batch
    lines: list[dict[str, Any]] = read_journal(path, lambda line, _: line if "again" in line else None)
    done = {(line["steps"], line["first"]): line for line in lines}
    images_done = sum(len(line["mse"]) for key, line in done.items() if key[0] in steps)
    yield images_done
    with Appender(path) as file:
        for s in steps:
            inverter = model.inversion("ddim", s, grid=grid)
            for first in range(0, count, size):
                if (s, first) in done:
                    continue
                [trip] = round_trips(model, originals[first : first + size], inverter)
                shown = trip.again[: max(0, SHOWN - first)]
                line = {"steps": s, "first": first, "mse": trip.error.tolist(), "largest": trip.largest.tolist()}
                line |= {"plan": inverter.decode_plan.name, "again": base64.b64encode(shown.tobytes()).decode()}
                file.write(journal_line(line))
                done[s, first] = line
                images_done += len(trip.again)
                yield images_done
    return [_row(s, [done[s, first] for first in range(0, count, size)], originals.shape[1:], count) for s in steps]


def _row(steps: int, lines: Sequence[dict[str, Any]], shape: tuple[int, ...], count: int) -> dict[str, Any]:
    errors = np.array([value for line in lines for value in line["mse"]])
    if len(errors) != count:
        raise DdimError("round trips", f"are {len(errors)} for S = {steps}, not {count}", "remove round-trips.jsonl")
    shown = b"".join(base64.b64decode(line["again"]) for line in lines)
    return {
        "steps": steps,
        "plan": lines[0]["plan"],
        "pictures": len(errors),
        "mse": float(errors.mean()),
        "standard_error": float(errors.std(ddof=1) / len(errors) ** 0.5) if len(errors) > 1 else None,
        "largest": max(value for line in lines for value in line["largest"]),
        "again": np.frombuffer(shown, np.uint8).reshape(-1, *shape),
    }


def iter_interpolations(
    model: Model, folder: Path, seed: int, grid: str | None = None
) -> Generator[int, None, list[Path]]:
    """Figure 6: interpolations between two latents, and an image grid between four.

    Args:
        model: The model.
        folder: Output folder.
        seed: Seed of the latents.
        grid: Spacing of the timesteps; None for the default.

    Yields:
        Number of the `INTERPOLATED` images done.

    Returns:
        Paths of the two image files.
    """
    paths = [folder / "walks.png", folder / "four-corners.png"]
    done = 0
    with Finished(folder) as finished:
        for path, count in zip(paths, (ROWS * FRAMES, SIDE**2), strict=True):
            yield done
            if finished.missing([path])[0]:
                plan = model.plan(min(INTERPOLATION_STEPS, model.schedule.T), grid, sampler="ddim")
                ends = model.noise(2 * ROWS + 4, seed).start()
                if path == paths[0]:
                    latents = torch.cat([slerp_path(ends[2 * k], ends[2 * k + 1], FRAMES) for k in range(ROWS)])
                else:
                    latents = slerp_grid(ends[-4:], SIDE, SIDE)
                parts = []
                for block in model.run_blocks(plan, latents):
                    parts.append(to_uint8(block))
                    yield done + sum(map(len, parts))
                images = np.concatenate(parts)
                columns = FRAMES if path == paths[0] else SIDE
                finished.write([(path, png(sheet(images, columns, gap=1, zoom=_zoom(images))))])
            done += count
    yield done
    return paths


def _zoom(images: np.ndarray) -> int:
    return max(1, 64 // int(images.shape[1]))


def samples(measured: Sequence[Measured], steps: int, count: int = 16) -> bytes | None:
    """Figure 3: samples at one S from the same x_T, one row per eta or sampler: PNG, or None if there are none."""
    selected = [m for m in measured if m.cell.steps == steps]
    if not selected:
        return None
    count = min(count, *(len(m.gathered.images) for m in selected))
    rows = [(label(m.cell.row), m.gathered.images[:count]) for m in selected]
    return png(labelled_rows(rows, zoom=_zoom(rows[0][1])))


def same_start(measured: Sequence[Measured], row: str = "0", count: int = 16) -> bytes | None:
    """Figure 5: samples from the same x_T, one row per S: PNG, or None if there are fewer than two S."""
    selected = [m for m in measured if m.cell.row == row]
    if len(selected) < 2:
        return None
    count = min(count, *(len(m.gathered.images) for m in selected))
    rows = [(f"S = {m.cell.steps}", m.gathered.images[:count]) for m in selected]
    return png(labelled_rows(rows, zoom=_zoom(rows[0][1])))


def trips(rows: Sequence[dict[str, Any]], test: ImageSet) -> bytes:
    """Table 2 as an image: test images and their reconstructions for each S: PNG."""
    count = min(len(row["again"]) for row in rows)
    lines = [("original", test.batch(range(count))), *((f"S = {row['steps']}", row["again"][:count]) for row in rows)]
    return png(labelled_rows(lines, zoom=_zoom(lines[0][1])))
