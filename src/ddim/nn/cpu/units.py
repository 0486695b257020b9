"""Which units of a device multiply bfloat16, and what follows: one rule for sampling, another one for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a device for bfloat16.

    Args:
        matrix: Whether it multiplies matrices of bfloat16 in hardware: AMX of a CPU, the tensor cores of a GPU.
        vector: Whether it has instructions for vectors of bfloat16, such as AVX512_BF16.
    """

    matrix: bool
    vector: bool


def units_of(device: torch.device | str) -> Units:
    """The units of a device of this machine."""
    device = torch.device(device)
    if device.type == "cuda":
        there = torch.cuda.is_bf16_supported(including_emulation=False)
        return Units(matrix=there, vector=there)
    if device.type != "cpu":
        return Units(matrix=False, vector=False)
    return units_of_cpu(cpu_flags(), _torch_says("_is_avx512_bf16_supported"), _torch_says("_is_amx_tile_supported"))


def units_of_cpu(flags: str, avx512_bf16: bool, amx_tile: bool) -> Units:
    """The units of a CPU.

    Args:
        flags: The line of its flags, see `cpu_flags`.
        avx512_bf16: Whether torch says that it has AVX512_BF16.
        amx_tile: Whether torch says that AMX can be used.
    """
    return Units(matrix=amx_tile and "amx_bf16" in flags.split(), vector=avx512_bf16 or amx_tile)


def sampling_precision(units: Units, missing: Callable[[], str]) -> tuple[str, str]:
    """The precision that "auto" chooses to sample in, and why: the rule for sampling.

    Vector instructions alone do not count: with AVX512_BF16 and no AMX, one image of CIFAR-10's size took three times
    as long in bfloat16 as with diffusers in float32, and "float32-fast" was faster than both.

    Args:
        units: The device's.
        missing: Says why there is no "float32-fast", or ""; asked only where it matters, as the answer may take a
            compiler.
    """
    if units.matrix:
        return "bfloat16", "this device has matrix units for bfloat16"
    reason = missing()
    if reason:
        return "float32", f"float32-fast cannot be had: {reason}"
    return "float32-fast", "this device has no matrix units for bfloat16"


def training_dtype(units: Units) -> torch.dtype:
    """The dtype that "auto" chooses for training's autocast: the rule for training.

    Training has no kernels of its own, and there bfloat16 vectors alone are faster than torch's float32.
    """
    return torch.bfloat16 if units.matrix or units.vector else torch.float32


def cpu_flags() -> str:
    """What the system says the processor has, as one line; "" where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _torch_says(check: str) -> bool:
    cpu: Any = torch.cpu
    return bool(getattr(cpu, check, lambda: False)())
