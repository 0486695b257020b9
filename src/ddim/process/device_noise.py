"""Generation of the random numbers of `ddim.rng` on a GPU, from the same streams as numpy on the host.

For every seed, index and draw:

- uniform float64 numbers are bitwise identical to numpy's;
- normal float32 numbers are bitwise identical to numpy's, except in the tail (|x| > 3.654, one in 3900), where they
  may differ in the last bit, because numpy calls log1pf there and C libraries differ in its last bit. This module
  rounds it correctly;
- the assignment of stream words to numbers is numpy's unless the two sides of a comparison agree to the last bit of
  exp or log1pf. In the wedge test, where exp is float64 and the other side is rounded in float32 as numpy does on x86,
  that can happen about once in 10^15 numbers; in the tail test once in 10^10.

Requires triton, which is part of the CUDA builds of torch; `available` checks for it. No call synchronises with the
GPU, and keys and draws may be tensors that a captured CUDA graph reads at every replay.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

BOXES = 256
# numpy's ziggurat: start of the tail, and the area of each box; that of the lowest includes the tail (Doornik 2005).
TAIL_START = 3.6541528853610087963519472518
BOX_AREA = 0.0049286732339746549

_BLOCKS = 128  # Philox blocks per pass: 1024 words, four per thread
_WARPS = 8


def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def ziggurat() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tables of numpy's float32 ziggurat, computed from the closed form in float64.

    Returns:
        ki, uint32: 23-bit integers below it are accepted immediately; wi, float32: the factor of the integer; fi,
        float32: the unnormalised density at the edge of each box. All (256,); box 0 is the lowest and has the tail.
    """
    edge = [0.0] * BOXES
    edge[-1] = TAIL_START
    for i in range(BOXES - 2, 0, -1):
        edge[i] = math.sqrt(-2 * math.log(BOX_AREA / edge[i + 1] + math.exp(-(edge[i + 1] ** 2) / 2)))
    density = [math.exp(-(x**2) / 2) for x in edge]
    width = [BOX_AREA / density[-1], *edge[1:]]
    inside = [TAIL_START / width[0], *(edge[i - 1] / edge[i] for i in range(1, BOXES))]
    return (
        np.array([round(share * 2**23) for share in inside], dtype=np.uint32),
        np.array([x / 2**23 for x in width], dtype=np.float32),
        np.array(density, dtype=np.float32),
    )


def stream_keys(seed: int, indices: tuple[int, ...], device: torch.device | str) -> Tensor:
    """The stream keys (seed, index) of samples: int64, (N, 2), with the bits of uint64."""
    keys = np.empty((len(indices), 2), dtype=np.uint64)
    keys[:, 0] = seed
    keys[:, 1] = indices
    return _copied(keys.view(np.int64), torch.device(device))


def normal(keys: Tensor, draw: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """The standard normal numbers of one draw for every sample.

    Args:
        keys: From `stream_keys`, (N, 2), on the generating device.
        draw: 0 for x_T, k + 1 for plan row k; an int, or a tensor, int64, (1,), on the same device.
        shape: Shape of one sample.

    Returns:
        float32, (N, *shape).
    """
    out = torch.empty((len(keys), *shape), dtype=torch.float32, device=keys.device)
    if out.numel():
        count = math.prod(shape)
        grid, tables = (len(keys),), _tables(keys.device)
        # No fused multiply-add: the wedge test must round the product and the sum separately, as numpy does.
        _launch("normals", grid, keys, draw, *tables, out, count, num_warps=_WARPS, enable_fp_fusion=False)
    return out


def uniform(keys: Tensor, draw: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers on [0, 1) of one draw for every sample: float64, (N, *shape); arguments as for `normal`."""
    out = torch.empty((len(keys), *shape), dtype=torch.float64, device=keys.device)
    if out.numel():
        count = math.prod(shape)
        _launch("uniforms", (len(keys), -(-count // (4 * _BLOCKS))), keys, draw, out, count)
    return out


def _launch(name: str, grid: tuple[int, ...], keys: Tensor, draw: int | Tensor, *rest: Any, **options: Any) -> None:
    from ddim.process import noise_kernels

    if not isinstance(draw, Tensor):
        draw = torch.full((1,), draw, dtype=torch.int64, device=keys.device)
    on_gpu = keys.device.type == "cuda"
    with torch.cuda.device(keys.device) if on_gpu else contextlib.nullcontext():
        getattr(noise_kernels, name)[grid](keys, draw, *rest, BLOCKS=_BLOCKS, **options)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(_copied(table, device) for table in ziggurat())


def _copied(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, copied through pinned memory so that the host does not wait for the GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and array.size:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
