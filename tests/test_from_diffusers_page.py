"""The code of docs/from-diffusers.md runs as printed, offline, and its assertions hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "from-diffusers.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks, names = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), dict[str, Any]()
    assert sum("# diffusers\n" in block for block in blocks) == sum("# ddim\n" in block for block in blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/from-diffusers.md", "exec"), names)
    assert type(names["pipe"].scheduler).__name__ == "PlanScheduler"
