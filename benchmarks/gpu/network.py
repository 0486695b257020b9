"""One network evaluation at a large batch: FLOP/s relative to the ceiling, and device time by component."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import peers
from benchmarks.gpu import kernels
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sampling import Sampling
from benchmarks.gpu.variants import ALL, BEST, OURS, OURS_COMPILED, TIME, searching
from ddim.nn.blocks import Norm

TOLERANCE = 0.1  # largest relative difference of the outputs of one network
LONGEST = 6


def measure(bench: Bench, sampling: Sampling) -> None:
    """Measure the share of the ceiling of every variant, then the profiles."""
    n = bench.sizes.batches[2]
    x = bench.randn(n, *bench.config.network.shape)
    # Our float32 comes first: the others are compared with its output.
    calls = {v.name: runner.call for v in (ALL[-1], *ALL[:-1]) if (runner := sampling.ready(v, n)) is not None}
    reference = next(iter(calls.values()))(x) if ALL[-1].name in calls else None
    if OURS.name in calls:
        calls["ours, bf16 NCHW"] = _contiguous(bench)
    for name, call in calls.items():
        bench.deadline.attempt(f"network evaluation, {name}", 2, partial(share, bench, name, call, x, reference))
    if OURS.name in calls:
        name = "ours, bf16, cudnn.benchmark"
        with searching():
            bench.deadline.attempt(name, 15, partial(share, bench, name, calls[OURS.name], x, reference))
    for variant in (OURS, OURS_COMPILED, BEST):
        if variant.name in calls:
            job = partial(profiled, bench, variant.name, calls[variant.name], x)
            bench.deadline.attempt(f"profile of {variant.name}", 5, job)


def share(bench: Bench, name: str, call: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor | None) -> None:
    """Time and FLOP/s of a network evaluation, and the relative difference of its output from a reference.

    Raises:
        ValueError: If the difference is too large.
    """
    output = call(x)
    difference = float((output - reference).norm() / reference.norm()) if reference is not None else None
    seconds = bench.seconds(lambda: call(x))
    rate = len(x) * bench.flops / seconds
    row = {"variant": name, "batch": len(x), "ms a call": 1e3 * seconds, "TFLOP/s": rate / 1e12}
    row["of the ceiling"] = rate / bench.ceiling if bench.ceiling else None
    bench.add("network", {**row, "difference": difference})
    if difference is not None and not difference < TOLERANCE:
        raise ValueError(f"{name}: its output differs from {ALL[-1].name}'s by {difference:.3g}")


def _contiguous(bench: Bench) -> Callable[[Tensor], Tensor]:
    """Our network in bfloat16, eager, in NCHW memory: on CUDA group norm has no channels-last kernel and copies."""
    model = peers.ours(bench.config, bench.network, bench.device, dtype="bfloat16")
    network = model.compute.network.to(memory_format=torch.contiguous_format)
    for part in network.modules():
        if isinstance(part, Norm):
            part.fused = False
    condition = network.condition(torch.full((1,), float(TIME), device=bench.device)).to(torch.bfloat16)

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        return network.body(x.to(torch.bfloat16), condition).float()

    return call


def profiled(bench: Bench, name: str, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Device time of one network evaluation by component, and its longest kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    for _ in range(2):  # the first includes the profiler's own start-up
        bench.sync()
        with profile(activities=activities) as profiler:
            call(x)
            bench.sync()
    events = profiler.events()
    profile_kernels = kernels.on_device(events) if bench.cuda else kernels.on_host(events)
    parts = kernels.summed(profile_kernels)
    total = sum(parts.values())
    if not total:
        raise ValueError("the profile has no kernels")
    for part, spent in parts.items():
        bench.add("components", {"variant": name, "component": part, "ms": spent, "share": spent / total})
    for kernel, runs, spent in kernels.longest(profile_kernels, LONGEST):
        row = {"variant": name, "component": kernels.component(kernel), "runs": runs, "ms": spent}
        bench.add("kernels", {**row, "kernel": kernel[:100]})
