"""The benchmarks run and write the results for the tables of the docs; the measured values are not tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, dict[str, Any]] = {
    "loop": {"shapes": ((1, 1, 2, 2),)},
    "sampling": {"batches": {"mnist": (1,)}, "best": (), "steps": 1},
    "training": {"names": ("mnist",), "batch": 2, "runs": 1},
    "roofline": {"batches": {"mnist": (1,)}},
    "precision": {"n": 1, "steps": 2},
    "memory": {"numbers": (1,), "steps": 1},
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("measuring", "table"):
        monkeypatch.setattr(importlib.import_module(f"benchmarks.{name}"), "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmarks_write_their_results(name: str, results: Path) -> None:
    importlib.import_module(f"benchmarks.{name}").main(**SMALL[name])
    written = json.loads((results / f"{name}.json").read_text())
    assert written["rows"]
    assert {"processor", "threads", "torch", "diffusers", "commit"} <= written["machine"].keys()
    table = importlib.import_module("benchmarks.table").section(name)
    assert table.count("\n| ") >= 2
    assert f"python -m benchmarks.{name}" in table


def test_the_page_shows_the_stored_results() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        result = json.loads(path.read_text())
        if path.stem == "gpu":  # it has a page of its own
            assert f"commit {result['machine']['commit']}" in (ROOT / "docs/gpu.md").read_text()
            continue
        assert f"### {path.stem}\n" in page
        assert f"commit {result['machine']['commit']}" in page
