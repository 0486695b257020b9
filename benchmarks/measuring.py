"""Fair timing: the jobs that are compared alternate in one process, and the median of five or more runs is reported."""

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
    """Median seconds of each job, in alternating runs; the first round is not counted."""
    return {name: statistics.median(seconds) for name, seconds in turns(what, runs).items()}


def turns(what: Mapping[str, Callable[[], object]], runs: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every run of each job, in alternating runs after `warm` rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(warm + runs):
        for name, job in what.items():
            started = time.perf_counter()
            job()
            if turn >= warm:
                times[name].append(time.perf_counter() - started)
    return times


def machine() -> dict[str, Any]:
    """Hardware and software versions that the results depend on."""
    import diffusers
    import torch

    def output_of(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    units = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "processor": names[0] if names else platform.processor(),
        "units": [flag for flag in units if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": output_of("git", "rev-parse", "--short", "HEAD")
        + ("+" if output_of("git", "status", "--porcelain", "--", "../src", "*.py") else ""),
        "load before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def write(name: str, rows: list[dict[str, Any]], about: str) -> None:
    """Write the results of one benchmark, and print them."""
    RESULTS.mkdir(exist_ok=True)
    body = {"benchmark": name, "about": about, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")
    for row in rows:
        fields = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(fields))
