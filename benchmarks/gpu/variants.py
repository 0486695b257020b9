"""What is compared: the same weights in our settings and in diffusers', each set up for one batch size."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu.bench import Bench
from ddim.model.cuda_graphs import PlanGraphs
from ddim.model.model import Model

WARM = 3  # steps of a first run: by the third all shapes and memory layouts that a loop passes through have been seen
TIME = 500  # the time at which a single network evaluation is made, in our counting


@dataclass(frozen=True)
class Variant:
    """A way to compute.

    Args:
        name: As it is printed.
        ours: Whether it is ours.
        fast: Whether it computes in bfloat16.
        compiled: Whether the network goes through torch.compile.
        graphs: Whether with torch.compile's CUDA graphs (mode "reduce-overhead").
        plan: Whether with a CUDA graph of the whole plan.
        search: Whether cuDNN tries its algorithms for each new shape and keeps the fastest.
    """

    name: str
    ours: bool
    fast: bool
    compiled: bool = False
    graphs: bool = False
    plan: bool = False
    search: bool = False

    @property
    def network(self) -> tuple[bool, ...]:
        """What its network is set up from: variants of which this is the same share one, and what was compiled."""
        return (self.ours, self.fast, self.compiled, self.graphs)


OURS = Variant("ours, bf16", True, True)
OURS_COMPILED = Variant("ours, bf16 compiled", True, True, True)
OURS_PLAN = Variant("ours, bf16 plan graph", True, True, plan=True)
OURS_SEARCH = Variant("ours, bf16 plan graph, cudnn.benchmark", True, True, plan=True, search=True)
OURS_COMPILED_PLAN = Variant("ours, bf16 compiled plan graph", True, True, True, plan=True)
OURS_PLAIN = Variant("ours, float32", True, False)
DEFAULT = Variant("diffusers, default", False, False)
BEST = Variant("diffusers, best", False, True, True)
BEST_GRAPHS = Variant("diffusers, best graphs", False, True, True, True)
FAST = (OURS_COMPILED, BEST, OURS)
ALL = (OURS, DEFAULT, OURS_COMPILED, BEST, OURS_PLAIN)
UNCOMPILED = (OURS_PLAN, OURS, DEFAULT)
AGAINST_BEST = (OURS_PLAN, BEST, OURS)
COMPILED = (OURS_COMPILED_PLAN, OURS_COMPILED, OURS_PLAN, OURS_SEARCH, BEST)
GRAPHS = (OURS_PLAN, OURS_COMPILED_PLAN, BEST_GRAPHS)

# What a row of times says: like against like, and the fastest against what the documentation shows.
RATIOS = (
    (OURS_PLAN, BEST),
    (OURS_PLAN, DEFAULT),
    (OURS, BEST),
    (OURS, DEFAULT),
    (OURS_COMPILED_PLAN, BEST),
    (OURS_SEARCH, BEST),
    (OURS_PLAN, BEST_GRAPHS),
    (OURS_COMPILED_PLAN, BEST_GRAPHS),
    (OURS_COMPILED, BEST),
    (OURS_PLAIN, DEFAULT),
    (OURS_COMPILED, DEFAULT),
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


def _model(variant: Variant, n: int, bench: Bench) -> Model:
    """Our model with the variant's graphs; its network is that of other variants with the same."""
    place = (variant.network, n)
    if place not in bench.models:
        settings = {"dtype": "bfloat16" if variant.fast else "float32", "compile": variant.compiled, "micro_batch": n}
        made = peers.ours(bench.config, bench.network, bench.device, cuda_graphs=False, **settings)
        if variant.compiled and bench.tiny:  # else the library's own torch.compile is measured
            made.compute.body = torch.compile(made.compute.network.body, **bench.compiling())
        assert made.denoise is made.denoise  # made now, so that copies share it
        bench.models[place] = made
    model = _shared(bench.models[place])
    model.compute = _shared(model.compute)
    model.compute.graphs = PlanGraphs(always=True) if variant.plan and bench.cuda else None
    return model


def _shared(one: Any) -> Any:
    """A shallow copy with what the original has cached, such as the compiled network, which `copy.copy` drops."""
    other = copy.copy(one)
    vars(other).update(vars(one))
    return other


def _ours(variant: Variant, n: int, bench: Bench) -> Runner:
    model = _model(variant, n, bench)
    level = model.schedule.level(TIME)

    def draw(steps: int) -> Callable[[], Tensor]:
        plan = peers.trailing(model, steps)

        def job() -> Tensor:
            with searching() if variant.search else contextlib.nullcontext():
                return model.sample(n, plan=plan)

        return job

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        made: Tensor = model.denoise(x, level).eps
        return made

    return Runner(draw, call)


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """cuDNN tries its algorithms for each new shape meanwhile."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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
