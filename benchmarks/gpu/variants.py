"""The variants: settings of this library and of diffusers with the same weights, each set up for one batch size."""

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

WARM = 3  # steps of a first run: by the third all shapes and memory layouts of a loop have occurred
TIME = 500  # the timestep of single network evaluations, in 1..T


@dataclass(frozen=True)
class Variant:
    """Settings of a measurement.

    Args:
        name: Display name.
        ours: Whether it is this library, not diffusers.
        fast: Whether to compute in bfloat16.
        compiled: Whether to compile the network with torch.compile.
        graphs: Whether to use torch.compile's CUDA graphs (mode "reduce-overhead").
        plan: Whether to use a CUDA graph of the whole plan.
        search: Whether cuDNN benchmarks its algorithms for each new shape.
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
        """The settings of its network; variants with equal settings share one compiled network."""
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

# The reported speed-ups: equal settings, and the fastest against the documented default.
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
        draw: Function from S to a run that samples the batch in S steps.
        call: The network's output in float32 at x, (N, C, H, W), and time `TIME`.
    """

    draw: Callable[[int], Callable[[], Tensor]]
    call: Callable[[Tensor], Tensor]


def runner(variant: Variant, n: int, bench: Bench) -> Runner:
    """A variant at batch n."""
    return (_ours if variant.ours else _diffusers)(variant, n, bench)


def _model(variant: Variant, n: int, bench: Bench) -> Model:
    """The model of this library for a variant; its network is shared with other variants of equal settings."""
    key = (variant.network, n)
    if key not in bench.models:
        settings = {"dtype": "bfloat16" if variant.fast else "float32", "compile": variant.compiled, "micro_batch": n}
        model = peers.ours(bench.config, bench.network, bench.device, cuda_graphs=False, **settings)
        if variant.compiled and bench.tiny:  # otherwise the library's own torch.compile is measured
            model.compute.body = torch.compile(model.compute.network.body, **bench.compiling())
        assert model.denoise is model.denoise  # cached now, so that copies share it
        bench.models[key] = model
    model = _shared(bench.models[key])
    model.compute = _shared(model.compute)
    model.compute.graphs = PlanGraphs(always=True) if variant.plan and bench.cuda else None
    return model


def _shared(model: Any) -> Any:
    """A shallow copy that includes cached attributes, such as the compiled network, which `copy.copy` drops."""
    other = copy.copy(model)
    vars(other).update(vars(model))
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
        eps: Tensor = model.denoise(x, level).eps
        return eps

    return Runner(draw, call)


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """Let cuDNN benchmark its algorithms for each new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _diffusers(variant: Variant, n: int, bench: Bench) -> Runner:
    compiling = bench.compiling(variant.graphs) if variant.compiled else {}
    pipeline = peers.diffusers(bench.config, bench.network, variant.fast, bench.device, **compiling)
    # On the CPU, like the pipeline's timesteps: another device would compile another graph.
    time = torch.tensor(TIME - 1)

    def draw(steps: int) -> Callable[[], Tensor]:
        return lambda: peers.draw(pipeline, n, steps)

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        eps: Tensor = pipeline.unet(x.to(pipeline.unet.dtype), time).sample
        return eps.float()

    return Runner(draw, call)
