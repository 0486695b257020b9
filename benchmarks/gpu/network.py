"""One network evaluation at a large batch: its share of the ceiling, and what its kernels are part of."""

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

APART = 0.1  # a relative difference of outputs above which they are not the same network
LONGEST = 6


def measure(bench: Bench, sampling: Sampling) -> None:
    """The share of the ceiling of every variant, then the profiles."""
    n = bench.sizes.batches[2]
    x = bench.randn(n, *bench.config.network.shape)
    # Our float32 comes first: the others are held against its output.
    calls = {v.name: made.call for v in (ALL[-1], *ALL[:-1]) if (made := sampling.ready(v, n)) is not None}
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
    """Time of a call, the FLOP/s it reaches of those counted, and how far its output is from another's.

    Raises:
        ValueError: If that is too far.
    """
    made = call(x)
    apart = float((made - reference).norm() / reference.norm()) if reference is not None else None
    seconds = bench.seconds(lambda: call(x))
    reached = len(x) * bench.flops / seconds
    row = {"variant": name, "batch": len(x), "ms a call": 1e3 * seconds, "TFLOP/s": reached / 1e12}
    row["of the ceiling"] = reached / bench.ceiling if bench.ceiling else None
    bench.add("network", {**row, "difference": apart})
    if apart is not None and not apart < APART:
        raise ValueError(f"{name}: its output differs from {ALL[-1].name}'s by {apart:.3g}")


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
    """Device time of one call by component, and its longest kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    for _ in range(2):  # the first starts the profiler itself up
        bench.sync()
        with profile(activities=activities) as made:
            call(x)
            bench.sync()
    events = made.events()
    found = kernels.on_device(events) if bench.cuda else kernels.on_host(events)
    parts = kernels.summed(found)
    total = sum(parts.values())
    if not total:
        raise ValueError("the profiler saw no kernels")
    for part, spent in parts.items():
        bench.add("components", {"variant": name, "component": part, "ms": spent, "share": spent / total})
    for kernel, runs, spent in kernels.longest(found, LONGEST):
        row = {"variant": name, "component": kernels.component(kernel), "runs": runs, "ms": spent}
        bench.add("kernels", {**row, "kernel": kernel[:100]})
