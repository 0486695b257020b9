"""Fair timing: what is compared runs by turns in one process, and the middle of at least five runs is what counts."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RUNS = 5


def by_turns(what: Mapping[str, Callable[[], object]], runs: int = RUNS) -> dict[str, float]:
    """Median seconds of each, one run of each after the other; a first round is not counted."""
    return {name: statistics.median(some) for name, some in turns(what, runs).items()}


def turns(what: Mapping[str, Callable[[], object]], runs: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every run of each, one run of each after the other; `warm` rounds before them are not counted."""
    times: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(warm + runs):
        for name, job in what.items():
            begun = time.perf_counter()
            job()
            if turn >= warm:
                times[name].append(time.perf_counter() - begun)
    return times


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import diffusers
    import torch

    def said(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "processor": names[0] if names else platform.processor(),
        "units": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": said("git", "rev-parse", "--short", "HEAD")
        + ("+" if said("git", "status", "--porcelain", "--", "../src", "*.py") else ""),
        "load before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def write(name: str, rows: list[dict[str, Any]], about: str) -> None:
    """Write one benchmark's result."""
    RESULTS.mkdir(exist_ok=True)
    body = {"benchmark": name, "about": about, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")
    for row in rows:
        said = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(said))
