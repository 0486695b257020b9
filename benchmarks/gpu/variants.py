"""What is compared: the same weights in our settings and in diffusers', each set up for one batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu.bench import Bench

WARM = 3  # steps of a first run: by the third all shapes and memory layouts that a loop passes through have been seen
TIME = 500  # the time at which a single network call is made, in our counting


@dataclass(frozen=True)
class Variant:
    """A way to compute.

    Args:
        name: As it is printed.
        ours: Whether it is ours.
        fast: Whether it computes in bfloat16.
        compiled: Whether the network goes through torch.compile.
        graphs: Whether with CUDA graphs (mode "reduce-overhead").
    """

    name: str
    ours: bool
    fast: bool
    compiled: bool = False
    graphs: bool = False


OURS = Variant("ours, bf16", True, True)
OURS_COMPILED = Variant("ours, bf16 compiled", True, True, True)
OURS_GRAPHS = Variant("ours, bf16 graphs", True, True, True, True)
OURS_PLAIN = Variant("ours, float32", True, False)
DEFAULT = Variant("diffusers, default", False, False)
BEST = Variant("diffusers, best", False, True, True)
BEST_GRAPHS = Variant("diffusers, best graphs", False, True, True, True)
FAST = (OURS_COMPILED, BEST, OURS)
ALL = (OURS, DEFAULT, OURS_COMPILED, BEST, OURS_PLAIN)
GRAPHS = (OURS_GRAPHS, BEST_GRAPHS)

# What a row of times says: like against like, and the fastest against what the documentation shows.
RATIOS = (
    (OURS_COMPILED, BEST),
    (OURS_GRAPHS, BEST_GRAPHS),
    (OURS_PLAIN, DEFAULT),
    (OURS, DEFAULT),
    (OURS_COMPILED, DEFAULT),
    (OURS_GRAPHS, DEFAULT),
)


@dataclass(frozen=True)
class Runner:
    """A variant set up for one batch size.

    Args:
        draw: From S to a whole run that draws that many pictures in S steps.
        call: The network's output in float32 at x, (N, C, H, W), and time `TIME`.
    """

    draw: Callable[[int], Callable[[], Tensor]]
    call: Callable[[Tensor], Tensor]


def runner(variant: Variant, n: int, bench: Bench) -> Runner:
    """A variant at batch n."""
    return (_ours if variant.ours else _theirs)(variant, n, bench)


def _ours(variant: Variant, n: int, bench: Bench) -> Runner:
    dtype = "bfloat16" if variant.fast else "float32"
    settings = {"dtype": dtype, "compile": variant.compiled, "micro_batch": n}
    model = peers.ours(bench.config, bench.network, bench.device, **settings)
    if variant.compiled and (bench.tiny or variant.graphs):  # else the library's own torch.compile is measured
        model.compute.body = _marked(torch.compile(model.compute.network.body, **bench.compiling(variant.graphs)))
    level = model.schedule.level(TIME)

    def draw(steps: int) -> Callable[[], Tensor]:
        plan = model.plan(steps, "trailing")
        return lambda: model.sample(n, plan=plan)

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        made: Tensor = model.denoise(x, level).eps
        return made

    return Runner(draw, call)


def _marked(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The body, its calls told apart for CUDA graphs: what one gave is copied before the next."""

    def marked(x: Tensor, condition: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return body(x, condition)

    return marked


def _theirs(variant: Variant, n: int, bench: Bench) -> Runner:
    compiling = bench.compiling(variant.graphs) if variant.compiled else {}
    pipeline = peers.diffusers(bench.config, bench.network, variant.fast, bench.device, **compiling)
    # On the CPU, as the pipeline has its times: another device would be another graph.
    time = torch.tensor(TIME - 1)

    def draw(steps: int) -> Callable[[], Tensor]:
        return lambda: peers.draw(pipeline, n, steps)

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        made: Tensor = pipeline.unet(x.to(pipeline.unet.dtype), time).sample
        return made.float()

    return Runner(draw, call)
