"""The notebooks in examples/ are small, without outputs, and run from the first cell to the last."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@each
def test_notebooks_are_of_format_4_and_small(path: Path) -> None:
    assert json.loads(path.read_text(encoding="utf-8"))["nbformat"] == 4
    assert path.stat().st_size < 30_000


@each
def test_notebooks_have_no_outputs(path: Path) -> None:
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@each
def test_links_of_notebooks_lead_to_files(path: Path) -> None:
    targets = [target for cell in cells(path, "markdown") for target in re.findall(r"\]\(([^)\s]+)\)", text(cell))]
    assert targets
    assert not [target for target in targets if not (EXAMPLES / target).is_file()]


def test_the_list_of_examples_is_complete() -> None:
    listed = set(re.findall(r"\]\(([^)\s]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert files <= listed


def test_ddim_in_ten_cells_has_ten() -> None:
    assert len(cells(EXAMPLES / "01_ddim_in_ten_cells.ipynb", "code")) == 10


@pytest.mark.slow
@each
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        for k, cell in enumerate(cells(path, "code"), start=1):
            exec(compile(text(cell), f"{path.name}, code cell {k}", "exec"), namespace)
        assert pyplot.get_fignums()
    finally:
        pyplot.close("all")
