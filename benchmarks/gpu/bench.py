"""Shared state of all parts of the benchmark: device, clocks, sizes, compilation, timing and results."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import estimate, measuring, peers
from benchmarks.gpu.deadline import Deadline
from ddim._io.atomic import write_atomic
from ddim.errors import DdimError

QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements. `batches` and `steps` have four values each, in increasing order."""

    side: int = 8192
    copied: int = 2**32
    network: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, int, int, int] = (1, 64, 512, 2048)
    steps: tuple[int, int, int, int] = (10, 20, 50, 100)
    training: tuple[int, int] = (128, 512)
    training_steps: int = 10
    runs: int = 10
    rounds: int = 10  # at most, per cell
    compiling: float = 60.0  # expected seconds of torch.compile before it was measured


TINY = Sizes(
    side=64,
    copied=2**16,
    network={"height": 8, "width": 8, "channels": 8, "multipliers": (1,), "blocks": 1, "attention": (), "groups": 4},
    batches=(1, 1, 2, 2),  # two sizes only, since each is traced again
    rounds=1,
    steps=(2, 3, 4, 5),
    training=(2, 4),
    training_steps=1,
    runs=2,
    compiling=2.0,
)


class Bench:
    """One run of the benchmark.

    Args:
        device: "cuda" or "cpu".
        tiny: Tiny sizes, and torch.compile with the backend "eager", to try the code.
        deadline: The time limit.
        out: File of the results; None to write none.
        commit: The commit that is measured, for a copy without git.

    Raises:
        DdimError: If the device is not available.
    """

    def __init__(self, device: str, tiny: bool, deadline: Deadline, out: Path | None = None, commit: str | None = None):
        self.device, self.tiny, self.deadline, self.out = select(device), tiny, deadline, out
        self.commit = commit
        self.sizes = TINY if tiny else Sizes()
        self.cuda = self.device.startswith("cuda")
        self.config, self.network = peers.cifar10(**self.sizes.network)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.models: dict[Any, Any] = {}  # models of this library, by the settings of their networks
        self.ceiling = 0.0  # FLOP/s of bfloat16 matrix products, once measured
        self.clocks: dict[str, Any] = {}
        self.compiled: dict[
            str, float
        ] = {}  # largest measured seconds of torch.compile, for "inference" and "training"
        self.todo: list[str] = []
        self.writing = threading.Lock()  # the time limit may expire while a part is being written

    @cached_property
    def flops(self) -> float:
        """FLOPs of one image: convolutions and matrix products, including those of attention."""
        return float(estimate.forward_flops(self.config.network))

    def compiling(self, graphs: bool = False) -> dict[str, Any]:
        """Arguments of torch.compile; `graphs` turns on CUDA graphs."""
        if self.tiny:
            return {"backend": "eager", "dynamic": False}
        return {"dynamic": False, **({"mode": "reduce-overhead"} if graphs else {})}

    def compile_cost(self, what: str) -> float:
        """Expected seconds of torch.compile for "inference" or "training", which includes the backward pass."""
        if what in self.compiled:
            return self.compiled[what]
        return self.compile_cost("inference") * 2.5 if what == "training" else self.sizes.compiling

    def generator(self, seed: int = 0) -> torch.Generator:
        """A generator on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(shape, generator=self.generator(seed), device=self.device, dtype=dtype)

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Release the allocator's unused memory, to avoid fragmentation with large batches."""
        if self.cuda:
            with contextlib.suppress(RuntimeError):  # the device has failed, which was reported before
                torch.cuda.empty_cache()

    def synced(self, job: Callable[[], object]) -> Callable[[], None]:
        """The job, followed by a synchronisation."""

        def whole() -> None:
            job()
            self.sync()

        return whole

    def once(self, job: Callable[[], object]) -> float:
        """Seconds of one synchronised run."""
        self.sync()
        started = time.perf_counter()
        self.synced(job)()
        return time.perf_counter() - started

    def seconds(self, job: Callable[[], object], runs: int | None = None, warm: int = 3) -> float:
        """Median seconds of a job, from CUDA events of queued runs; from the clock on a CPU."""
        runs = runs or self.sizes.runs
        for _ in range(warm):
            job()
        if not self.cuda:
            return statistics.median(self.once(job) for _ in range(runs))
        pairs = []
        for _ in range(runs):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            job()
            end.record()
            pairs.append((begin, end))
        self.sync()
        return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs)

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Add a row to a part's table, and print it."""
        self.rows.setdefault(part, []).append(row)
        if part in ("components", "kernels"):  # too many rows; they are in the report
            return
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
        )
        print(f"{self.deadline.spent():5.0f} s  {part}: {shown}", flush=True)

    def smi(self) -> dict[str, str]:
        """Query nvidia-smi; changes no setting."""
        if not self.cuda or shutil.which("nvidia-smi") is None:
            return {}
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            return {}
        lines = output.splitlines()
        return dict(zip(QUERY, (value.strip() for value in lines[0].split(",")))) if lines else {}

    @cached_property
    def machine(self) -> dict[str, Any]:
        """Hardware and software versions that the results depend on."""
        machine = measuring.machine()
        machine["commit"] = self.commit or machine["commit"] or "unknown"
        machine["cudnn.benchmark"] = torch.backends.cudnn.benchmark
        machine["TF32 of convolutions"] = torch.backends.cudnn.allow_tf32
        machine["TF32 of products"] = torch.backends.cuda.matmul.allow_tf32
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            machine |= {"GPU": properties.name, "GPU memory (GiB)": properties.total_memory / 2**30}
            machine["triton"] = importlib.import_module("triton").__version__ if util.find_spec("triton") else None
            machine |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        return machine

    def results(self) -> dict[str, Any]:
        """The content of the results file."""
        return {
            "benchmark": "gpu",
            "device": self.device,
            "tiny": self.tiny,
            "compile": 'backend "eager": not a measurement' if self.tiny else "inductor, one graph for each batch size",
            "minutes": self.deadline.seconds / 60,
            "seconds spent": self.deadline.spent(),
            "machine": self.machine,
            "nvidia-smi": self.clocks,
            **self.rows,
            "left out": self.deadline.left_out,
            "failed": self.deadline.failed,
        }

    def write(self) -> None:
        """Write the results so far."""
        with self.writing:
            if self.out is not None:
                write_atomic(self.out, (json.dumps(self.results(), indent=1) + "\n").encode())


def select(device: str) -> str:
    """Select a device, and return its name.

    Raises:
        DdimError: If it is not available.
    """
    device_type = device.split(":")[0]
    if device_type not in ("cuda", "cpu"):
        raise DdimError(f"device {device!r}", "is not supported", "use cuda or cpu")
    if device_type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = device.partition(":")[2] or "0"
        if not number.isdecimal() or int(number) >= count:
            raise DdimError(
                f"device {device}",
                f"is not available: torch sees {count} GPUs",
                "use --device cpu --tiny to try the code",
            )
        torch.cuda.set_device(int(number))
    return device


def ceilings(bench: Bench) -> None:
    """Measure the device's limits: a matrix product of random bfloat16 numbers, and a copy within its memory."""
    side = bench.sizes.side
    a, b = (bench.randn(side, side, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    bench.clocks["before"] = bench.smi()
    out = torch.empty_like(a)
    seconds = bench.seconds(lambda: torch.mm(a, b, out=out))
    bench.ceiling = 2 * side**3 / seconds
    bench.clocks["just after the products"] = bench.smi()
    bench.add("ceilings", {"ceiling": f"bf16 matrix product of {side}", "TFLOP/s": bench.ceiling / 1e12})
    source = bench.randn(bench.sizes.copied // 4)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    moved = 2 * source.nbytes
    row = {"ceiling": f"copy of {source.nbytes / 2**20:.4g} MiB within the device", "TB/s": moved / seconds / 1e12}
    bench.add("ceilings", row)
