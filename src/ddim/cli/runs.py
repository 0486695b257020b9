"""`ddim runs`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ddim.cli._command import note
from ddim.errors import DdimError, printable

DEPTH = 4  # levels of folders that are searched
TAIL = 64 << 10  # bytes at the end of a metrics file in which its last line is looked for


@click.command("runs")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
def command(folders: tuple[Path, ...]) -> dict[str, Any]:
    """List the training runs and models in FOLDERS, by default the current one: what, when, steps, loss, where.

    Folders are searched four levels deep; hidden folders and links are not followed. The newest entry is the last.

    \b
    Examples:
      ddim runs
      ddim runs runs ~/models --json
    """
    found: list[dict[str, Any]] = []
    for folder in folders or (Path(),):
        if not folder.is_dir():
            raise DdimError(folder, "no such folder", "check the path")
        for path in _search(folder, DEPTH):
            try:
                found.append(_run(path) if (path / "run.json").is_file() else _model(path))
            except DdimError as error:
                note(f"note: left out: {error}")
    found.sort(key=lambda entry: str(entry["when"]))
    rows = [("what", "when", "steps", "loss", "where"), *(_cells(entry) for entry in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows if found else []:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    if not found:
        click.echo("no runs or models in " + ", ".join(str(folder) for folder in folders or ("this folder",)))
    return {"runs": found}


def _search(folder: Path, depth: int) -> Iterator[Path]:
    """The folders of runs and models in a folder, and the folder itself if it is one."""
    if (folder / "run.json").is_file() or ((folder / "config.json").is_file() and _is_model(folder)):
        yield folder
        return
    if depth == 0:
        return
    try:
        inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        note(f"note: left out: {folder}: cannot be read ({error.strerror})")
        return
    for name in inner:
        if not name.startswith("."):
            yield from _search(folder / name, depth - 1)


def _is_model(folder: Path) -> bool:
    from ddim._io.reading import parse_json, read_bytes

    try:
        content = parse_json(read_bytes(folder / "config.json"), folder)
    except DdimError:  # the configuration of another program
        return False
    return isinstance(content, dict) and content.get("format") == "ddim-model"


def _run(folder: Path) -> dict[str, Any]:
    """The entry of a run: how far it is, and its last loss."""
    from ddim._io.reading import entry

    path = folder / "run.json"
    config = _read(path)
    recipe = entry(config, "train", dict, path)
    metrics = folder / "metrics.jsonl"
    last = _last_line(metrics)
    states = [int(state.stem) for state in (folder / "state").glob("*.safetensors") if state.stem.isdigit()]
    return {
        "what": "run",
        "data": entry(config, "data", str, path),
        "when": _when(metrics if metrics.exists() else path),
        "steps": max([entry(last, "step", int, metrics, 0), *states]),
        "of": recipe.get("steps"),
        "budget": recipe.get("budget"),
        "loss": last.get("loss"),
        "where": str(folder),
    }


def _model(folder: Path) -> dict[str, Any]:
    """The entry of a model folder."""
    from ddim._io.reading import entry

    path = folder / "config.json"
    origin = entry(_read(path), "provenance", dict, path, {})
    return {
        "what": "model",
        "data": entry(origin, "data", str, path, ""),
        "when": _when(path),
        "steps": entry(origin, "steps", int, path, 0),
        "of": None,
        "budget": None,
        "loss": None,
        "where": str(folder),
    }


def _read(path: Path) -> dict[str, Any]:
    from ddim._io.checksum import read_sealed
    from ddim._io.reading import of_kind, parse_json

    content: dict[str, Any] = of_kind(parse_json(read_sealed(path), path), dict, path)
    return content


def _last_line(path: Path) -> dict[str, Any]:
    """The last complete line of a metrics file; empty if there is none."""
    from ddim._io.checksum import read_line

    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read(TAIL).splitlines(keepends=True)
    for line in reversed(lines):
        try:
            content, _ = read_line(line.decode(), False)
        except ValueError:  # cut off: by a kill, or because it is being written
            continue
        if isinstance(content, dict):
            return content
    return {}


def _when(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    parts = [] if entry["of"] is None else [str(entry["of"])]
    parts += [] if entry["budget"] is None else [f"{entry['budget'] / 60:g} min"]
    steps = f"{entry['steps']} of {' or '.join(parts)}" if parts else str(entry["steps"] or "-")
    loss = "-" if entry["loss"] is None else f"{entry['loss']:.4f}"
    what = f"{entry['what']}: {entry['data']}" if entry["data"] else entry["what"]
    return printable(what), entry["when"], steps, loss, printable(entry["where"])
