"""CUDA graphs of whole plans: all network evaluations of a run and the updates between them, launched at once.

For a small batch, a step takes less time on the GPU than Python takes to launch its kernels. A CUDA graph records the
kernels of a whole run; a replay launches all of them in one call, so a run takes only the kernels' time. The kernels
are the same as without a graph, and so are the results.

The inputs of a recorded run are the initial state, the noise of every row that draws noise, and the conditioning on
time and labels; before each replay they are copied into the tensors that the graph reads. Everything else is fixed:
the plan, the shape, the guidance scale at every level, and the PyTorch settings that select kernels. These form the
key of a stored graph, so a different value of any of them needs a different graph. Runs that depend on anything else,
such as a hook supplied by the user, and plans over discrete data are not recorded; they run without graphs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.errors import warn
from ddim.model.denoisers import NetworkDenoiser
from ddim.plan.base import BasePlan
from ddim.plan.plan import Plan
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise
from ddim.sampling.guidance import Guided
from ddim.sampling.loop import run

BATCH = 64
"""The largest micro-batch that is recorded by default: a larger one keeps a GPU busy, and a graph uses memory."""
EVALUATIONS = 250
"""The number of network evaluations of the longest plan that is recorded by default."""
GRAPHS = 4
"""The number of graphs that are stored; beyond it, the least recently used is dropped."""


class StoredNoise:
    """Noise of a plan's rows that is already drawn, in tensors that a graph reads.

    Args:
        rows: Map from the row's index to its noise, (N, ...).
    """

    def __init__(self, rows: Mapping[int, Tensor]):
        self.rows = rows

    def row(self, k: int) -> Tensor:
        """The noise of row k."""
        return self.rows[k]


@dataclass(frozen=True)
class Recorded:
    """A CUDA graph and the tensors that it reads and writes.

    Args:
        graph: The graph, a `torch.cuda.CUDAGraph`.
        denoise: The denoiser whose conditioning tensors it reads.
        start: The initial state.
        noise: The noise of each row that draws noise.
        out: The final state.
    """

    graph: Any
    denoise: AnyDenoiser
    start: Tensor
    noise: StoredNoise
    out: Tensor


class PlanGraphs:
    """Run plans with CUDA graphs, which are recorded and stored.

    Recording takes as long as about two runs of the plan, so by default a run is recorded when it is repeated with the
    same plan, shape and guidance; the first time it runs without a graph. The graphs of one object share their memory,
    so the result of one is copied before another is replayed.

    Args:
        always: Whether every run that can be recorded is recorded at its first use, whatever its size. Otherwise only
            plans of at most `EVALUATIONS` network evaluations on at most `BATCH` samples are, at their second use.
        limit: The number of graphs to store.
    """

    def __init__(self, always: bool = False, limit: int = GRAPHS):
        self.always, self.limit = always, limit
        self._recorded: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = None
        self._stream: Any = None
        self._last: Any = None
        self._failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanGraphs, (self.always, self.limit)  # a copy records its own graphs

    def run(self, denoise: AnyDenoiser, plan: BasePlan[Any], start: Tensor, noise: Noise) -> Tensor:
        """Run a plan as `ddim.loop.run` does: the final state, (N, ...), in a new tensor.

        Args:
            denoise: The denoiser.
            plan: The plan to run.
            start: The initial state, (N, ...).
            noise: The noise of the plan's rows.

        Raises:
            RuntimeError: If recording fails and `always` is set. Otherwise a failure causes a warning, and no further
                run is recorded.
        """
        key = _key(denoise, plan, start)
        with self._lock, torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be overwritten
            if key is not None and self._wanted(key, plan, start) and self._ready(key, denoise, plan, start, noise):
                return self._replay(key, denoise, start, noise)
        return run(denoise, plan, start, noise)

    def _wanted(self, key: Hashable, plan: BasePlan[Any], start: Tensor) -> bool:
        """Whether this run is to use a graph."""
        if self.always or key in self._recorded:
            return True
        if self._failed or len(start) > BATCH or len(plan) > EVALUATIONS:
            return False
        if key in self._seen:
            return True
        self._seen[key] = None
        while len(self._seen) > 16 * self.limit:
            self._seen.popitem(last=False)
        return False

    def _ready(self, key: Hashable, denoise: AnyDenoiser, plan: BasePlan[Any], start: Tensor, noise: Noise) -> bool:
        """Record the run unless it is already recorded; return whether a graph of it is stored."""
        if key in self._recorded:
            return True
        state = start.clone()
        rows = StoredNoise({k: noise.row(k) for k, row in enumerate(plan.rows) if row.draws})
        inputs: Any = (denoise, plan, state, rows)
        try:
            graph, out = self._capture(lambda: run(*inputs), start.device)
        except RuntimeError as error:  # any error of CUDA, including out of memory
            self._pool = self._stream = None
            if self.always:
                raise
            self._failed = True
            reason = (str(error).splitlines() or [""])[0]
            warn(f"a CUDA graph of {plan.name} could not be recorded, continuing without graphs: {reason}")
            return False
        self._recorded[key] = Recorded(graph, denoise, state, rows, out)
        while len(self._recorded) > self.limit:  # after recording, so that the shared memory always has a user
            if self._last is not None:
                self._last.synchronize()
            self._recorded.popitem(last=False)
        return True

    def _capture(self, job: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
        """Record a graph of a job; return it and the tensor that contains the job's result after each replay."""
        with torch.cuda.device(device):
            if self._pool is None:
                cuda: Any = torch.cuda
                self._pool, self._stream = cuda.graph_pool_handle(), cuda.Stream(device)
            current = torch.cuda.current_stream(device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # warm-up: compiles, fills caches, allocates workspaces
                job()
            current.wait_stream(self._stream)
            if self._last is not None:  # wait for the last replay, whose graph shares the memory
                self._last.synchronize()
            graph = torch.cuda.CUDAGraph()
            options: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **options):
                out = job()
        return graph, out

    def _replay(self, key: Hashable, denoise: AnyDenoiser, start: Tensor, noise: Noise) -> Tensor:
        recorded = self._recorded[key]
        self._recorded.move_to_end(key)
        with self._in_order(start.device):
            recorded.start.copy_(start)
            for k, stored in recorded.noise.rows.items():
                stored.copy_(noise.row(k))
            if recorded.denoise is not denoise:
                for target, source in zip(_networks(recorded.denoise), _networks(denoise)):
                    target.take_labels(source)
            recorded.graph.replay()
            return recorded.out.clone()

    @contextmanager
    def _in_order(self, device: torch.device) -> Iterator[None]:
        """Order work on the current stream after the last replay, possibly from another thread or stream."""
        with torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            if self._last is not None:
                current.wait_event(self._last)
            try:
                yield
            finally:
                cuda: Any = torch.cuda
                self._last = cuda.Event()
                self._last.record(current)


def _key(denoise: AnyDenoiser, plan: BasePlan[Any], start: Tensor) -> Hashable:
    """The key of a run: everything it depends on besides its inputs; None if it cannot be recorded."""
    networks = _networks(denoise)
    if not networks or not isinstance(plan, Plan) or plan.before or not _recordable(start.device):
        return None
    scales: tuple[float, ...] = ()
    if isinstance(denoise, Guided):
        scale = denoise.scale
        scales = tuple(scale(row.query) if callable(scale) else scale for row in plan.rows)
        if not all(isinstance(value, float | int) for value in scales):
            return None
    identity = tuple(
        (id(network.network), id(network.body), network.labelled) for network in networks
    )  # a graph keeps them alive
    return (identity, plan, start.shape, start.dtype, start.device, scales, _settings())


def _recordable(device: torch.device) -> bool:
    if device.type != "cuda" or torch.is_autocast_enabled("cuda"):
        return False
    return not torch.cuda.is_current_stream_capturing()


def _settings() -> tuple[Any, ...]:
    """The current PyTorch settings that select kernels."""
    cudnn: Any = torch.backends.cudnn
    cuda: Any = torch.backends.cuda
    attention = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    matmul = cuda.matmul.fp32_precision
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled())
    return (*flags, *attention, cuda.cudnn_sdp_enabled(), matmul)


def _networks(denoise: AnyDenoiser) -> tuple[NetworkDenoiser[Any], ...]:
    """The networks of a denoiser that consists of networks only (one, or two with guidance); otherwise empty."""
    if isinstance(denoise, NetworkDenoiser):
        return (denoise,)
    if isinstance(denoise, Guided):
        parts = (_networks(denoise.conditional), _networks(denoise.unconditional))
        return (*parts[0], *parts[1]) if all(len(part) == 1 for part in parts) else ()
    return ()
