"""`Precision`: the compute precision, kernels and micro-batch size of a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from ddim._io.terminal import counted
from ddim.errors import DdimError
from ddim.model.cuda_graphs import PlanGraphs
from ddim.names import DType
from ddim.nn.base import Network
from ddim.nn.blocks import Norm, fuse_norms
from ddim.nn.cpu.kernels import kernels
from ddim.nn.cpu.library import Unavailable
from ddim.nn.cpu.unet import NativeUNet, fits
from ddim.nn.cpu.units import SMALL, sampling_precision, training_dtype, units_of
from ddim.sampling import microbatch


def without_cached(owner: object) -> dict[str, Any]:
    """An object's attributes without its cached properties: its state for a pickle or a copy.

    Cached values may be compiled, bound to this process or machine, or contain buffers; the copy computes them again.
    """
    cached = {
        name for cls in type(owner).__mro__ for name, value in vars(cls).items() if isinstance(value, cached_property)
    }
    return {name: value for name, value in vars(owner).items() if name not in cached}


def without_tf32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function so that cuDNN's float32 convolutions use full precision, not TF32, during its calls."""
    cudnn: Any = torch.backends.cudnn

    def with_full_precision(*arguments: Tensor) -> Tensor:
        switch: tuple[Any, str, Any]
        try:
            switch, before = (cudnn, "allow_tf32", False), cudnn.allow_tf32
        except RuntimeError:  # the per-operation setting is in use, so torch raises an error for the global one
            switch, before = (cudnn.conv, "fp32_precision", "ieee"), cudnn.conv.fp32_precision
        setattr(*switch)
        try:
            return function(*arguments)
        finally:
            setattr(*switch[:2], before)

    return with_full_precision


class Precision:
    """A network in its compute precision, with its kernels, micro-batch size and CUDA graphs.

    Args:
        network: The network in float32, on its device, in evaluation mode.
        device: The device to compute on.
        dtype: The compute precision, see `DType`.
        compile: Whether to compile the network with torch.compile.
        micro_batch: The number of samples per network evaluation when sampling; by default 8 on a CPU (4 in bfloat16),
            64 on a GPU.
        cuda_graphs: Whether whole plans are recorded as CUDA graphs when sampling, see `ddim.model.cuda_graphs`: all
            (True), none (False), or small plans that are run twice (None). True is an error on a CPU.

    Raises:
        DdimError: If dtype or micro_batch is invalid, or the arguments are incompatible.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        dtype: str,
        compile: bool,
        micro_batch: int | None,
        cuda_graphs: bool | None = None,
    ):
        if dtype not in get_args(DType):
            raise DdimError(f"dtype {dtype!r}", "is unknown", f"choose one of {', '.join(get_args(DType))}")
        if dtype == "float32-fast" and compile:
            raise DdimError("float32-fast and compile", "are both requested", "remove one; its kernels are compiled")
        if cuda_graphs and device.type != "cuda":
            raise DdimError("cuda_graphs", f"need a CUDA GPU, not {device.type}", "remove cuda_graphs")
        allowed = device.type == "cuda" and cuda_graphs is not False
        self.graphs = PlanGraphs(always=bool(cuda_graphs)) if allowed else None
        self.module, self.device, self.requested, self.compile = network, device, dtype, compile
        self._micro_batch = micro_batch if micro_batch is None else microbatch.size_of(micro_batch, device)

    def __getstate__(self) -> dict[str, Any]:
        return without_cached(self)

    @cached_property
    def _choice(self) -> tuple[str, str]:
        """The precision's name, and the reason for the choice."""
        if self.requested in ("float32", "bfloat16"):
            return self.requested, "as requested"
        if self.requested == "auto":
            size = sum(parameter.numel() for parameter in self.module.parameters())
            small = self.device.type == "cpu" and size < SMALL
            return sampling_precision(units_of(self.device), self._unavailable, small)
        if problem := self._unavailable():
            raise DdimError("float32-fast", f"is not available: {problem}", "use float32")
        return "float32-fast", "as requested"

    def _unavailable(self) -> str:
        """The reason why "float32-fast" is unavailable, or ""."""
        if self.compile:
            return "torch.compile is requested"
        if self.device.type != "cpu":
            return f"it is for CPUs, not {self.device.type}"
        try:
            vector = kernels().vector
        except Unavailable as error:
            return str(error)
        return "" if fits(self.module, vector) else "it needs a U-Net whose channels are multiples of the vector length"

    @property
    def name(self) -> str:
        """The precision: "float32", "float32-fast" or "bfloat16"."""
        return self._choice[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's activations."""
        return torch.bfloat16 if self.name == "bfloat16" else torch.float32

    @cached_property
    def micro_batch(self) -> int:
        """The number of samples in a micro-batch.

        It is halved by default for bfloat16 on a CPU: smaller micro-batches already keep the matrix units busy there,
        and a single sample, which is padded, costs as much as a whole micro-batch.
        """
        size = microbatch.size_of(self._micro_batch, self.device)
        halved = self._micro_batch is None and self.device.type == "cpu" and self.name == "bfloat16"
        return size // 2 if halved else size

    @property
    def batch_invariant(self) -> bool:
        """Whether a sample's bits are the same at any batch size, so that micro-batches may vary in size."""
        return self.name == "float32-fast"

    @cached_property
    def network(self) -> Network:
        """The network with its body in the compute dtype; in bfloat16 on CUDA, norms are fused where possible."""
        if self.batch_invariant:
            return self.module
        network = copy.deepcopy(self.module).cast_body(self.dtype)
        if self.device.type == "cuda" and self.dtype == torch.bfloat16:
            fuse_norms(network)
        return network

    @property
    def fused(self) -> bool:
        """Whether the network uses the fused norms of `ddim.nn.cuda_norm`."""
        return any(isinstance(part, Norm) and part.fused for part in self.network.modules())

    @cached_property
    def body(self) -> Callable[..., Tensor]:
        """The function that computes the network's body: native, compiled or eager."""
        if self.batch_invariant:
            return NativeUNet(self.network, kernels())  # type: ignore[arg-type]
        body: Callable[..., Tensor] = torch.compile(self.network.body) if self.compile else self.network.body
        return without_tf32(body) if self.device.type == "cuda" and self.name == "float32" else body

    def __str__(self) -> str:
        threads = f", {counted(torch.get_num_threads(), 'threads')}" if self.device.type == "cpu" else ""
        compiled = ", with torch.compile" if self.compile else ""
        return f"{self.name} on {self.device} ({self._choice[1]}){compiled}{threads}"


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The autocast dtype of training with precision "auto", see `ddim.nn.cpu.units.training_dtype`.

    Sampling follows a different rule, `ddim.nn.cpu.units.sampling_precision`.
    """
    return training_dtype(units_of(device))
