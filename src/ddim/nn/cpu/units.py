"""Detection of a device's bfloat16 units, and the default precision for sampling and for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Units:
    """The bfloat16 units of a device.

    Args:
        matrix: Whether the hardware multiplies bfloat16 matrices: AMX of a CPU, tensor cores of a GPU.
        vector: Whether it has bfloat16 vector instructions, such as AVX512_BF16.
    """

    matrix: bool
    vector: bool


def units_of(device: torch.device | str) -> Units:
    """The bfloat16 units of a device of this machine."""
    device = torch.device(device)
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return Units(matrix=supported, vector=supported)
    if device.type != "cpu":
        return Units(matrix=False, vector=False)
    return units_of_cpu(
        cpu_flags(), _torch_reports("_is_avx512_bf16_supported"), _torch_reports("_is_amx_tile_supported")
    )


def units_of_cpu(flags: str, avx512_bf16: bool, amx_tile: bool) -> Units:
    """The bfloat16 units of a CPU.

    Args:
        flags: The line of CPU flags, see `cpu_flags`.
        avx512_bf16: Whether torch reports AVX512_BF16.
        amx_tile: Whether torch reports that AMX can be used.
    """
    return Units(matrix=amx_tile and "amx_bf16" in flags.split(), vector=avx512_bf16 or amx_tile)


SMALL = 10_000_000
"""Parameters below which "float32-fast" is faster than bfloat16 even with matrix units.

Measured with AMX, two threads: at 2.8 million parameters it takes about half the time for one image and 0.7 for 64; at
35.7 million bfloat16 takes 0.35 of its time for 8 images.
"""


def sampling_precision(units: Units, unavailable: Callable[[], str], small: bool = False) -> tuple[str, str]:
    """The precision that "auto" means for sampling, and the reason.

    Vector instructions alone are not enough: with AVX512_BF16 and no AMX, one image of CIFAR-10's size took three times
    as long in bfloat16 as with diffusers in float32, and "float32-fast" was faster than both.

    Args:
        units: The units of the device.
        unavailable: Returns the reason why "float32-fast" is unavailable, or ""; called only if needed, because it may
            compile the kernels.
        small: Whether the network has fewer than `SMALL` parameters and runs on a CPU.
    """
    matrix = "bfloat16", "this device has matrix units for bfloat16"
    if units.matrix and not small:
        return matrix
    reason = unavailable()
    if reason and units.matrix:
        return matrix
    if reason:
        return "float32", f"float32-fast is not available: {reason}"
    if units.matrix:
        return "float32-fast", "this device is faster with the CPU kernels at a network of this size"
    return "float32-fast", "this device has no matrix units for bfloat16"


def training_dtype(units: Units) -> torch.dtype:
    """The dtype that "auto" means for autocast in training.

    Training does not use the CPU kernels, and bfloat16 vectors alone are faster than torch's float32.
    """
    return torch.bfloat16 if units.matrix or units.vector else torch.float32


def cpu_flags() -> str:
    """The line of CPU flags from /proc/cpuinfo; "" if it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _torch_reports(check: str) -> bool:
    cpu: Any = torch.cpu
    return bool(getattr(cpu, check, lambda: False)())
