"""Group norm with SiLU, and residual sums, of channels-last tensors, by Triton kernels for CUDA; inference only.

PyTorch's own group norm has no channels-last kernel on CUDA: it copies its input to NCHW and its output is copied back.
Here a program reads rows of several whole groups, at least 64 channels, so that every load is of 128 bytes or more.
Statistics are float32 whatever the tensor is: each channel's sums are taken about that channel's first value, and
channels are merged by Chan et al.'s formula, so that a mean far from zero costs no digits.

There are three ways, chosen from the shapes alone:

- up to `RESIDENT` pixels: one program for each sample and set of groups keeps its tile in registers (one read, one
  write);
- more pixels and at least `ENOUGH` programs: the same, but the tile is read twice, the second time from the L2 cache;
- more pixels and fewer programs: the pixels are split too, one kernel computing the moments of each part and another
  merging and applying them, so that a single image occupies the whole GPU.

Outside torch.compile PyTorch adds a convolution's bias by a kernel of its own. So `group_norm` and `residual` take the
biases of the convolutions before them.

This module imports Triton, which comes with PyTorch for CUDA; import it only where `ddim.nn.blocks.fuse_norms` may be
on. With TRITON_INTERPRET=1 the kernels run on CPU tensors, which is how they are tested without a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ddim.nn import cuda_norm_kernels as kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROW = 64
"""Channels that a program reads of each pixel, at the least, where there are as many."""
WIDEST = 1024
"""Channels of a group at the most."""
RESIDENT = 256
"""Pixels of a tile that is kept in registers, at the most."""
ENOUGH = 1024
"""Programs that occupy a GPU without splitting the pixels."""
SPLITS = 64
"""Parts that the pixels of a sample are split into, at the most."""


class Tiling(NamedTuple):
    """How a tensor is divided among programs.

    Args:
        chunks: Sets of groups.
        width: Channels of a set.
        block_c: `width` rounded up to a power of two.
        block_g: Groups of a set, rounded up to a power of two.
        block_p: Pixels of a tile, a power of two.
        splits: Parts that the pixels are split into; 1 for a single kernel.
        span: Pixels of a part.
        warps: Warps of a program.
    """

    chunks: int
    width: int
    block_c: int
    block_g: int
    block_p: int
    splits: int
    span: int
    warps: int


def tiling(n: int, channels: int, pixels: int, groups: int) -> Tiling:
    """How a tensor (n, channels, pixels) is divided.

    Raises:
        ValueError: If the groups do not divide the channels, or are wider than `WIDEST`.
    """
    if groups < 1 or channels % groups or channels // groups > WIDEST:
        raise ValueError(f"{groups} groups of {channels} channels cannot be normalized by this kernel")
    per_group = channels // groups
    together = 1
    while together * per_group < ROW and together < groups:
        together *= 2
    width = min(together, groups) * per_group
    chunks = -(-channels // width)
    block_c = _power(width)
    block_g = max(16, _power(min(together, groups)))
    if pixels <= RESIDENT and _power(pixels) * block_c <= 32768:
        block_p = max(64 if block_c <= 128 else 1, _power(pixels))
        splits, span = 1, pixels
    else:
        block_p = max(1, 8192 // block_c)
        splits = 1 if n * chunks >= ENOUGH else min(SPLITS, -(-pixels // 64))
        if splits > 1:
            block_p = min(block_p, 64)
        span = -(-pixels // (splits * block_p)) * block_p
        splits = -(-pixels // span)
    warps = min(16, max(4, block_p * block_c // 1024 if pixels > block_p else block_p * block_c // 2048))
    return Tiling(chunks, width, block_c, block_g, block_p, splits, span, warps)


def _power(number: int) -> int:
    """The next power of two, at least the number."""
    return 1 << (number - 1).bit_length()


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    time: Tensor | None,
    offset: Tensor | None,
    scale_shift: Tensor | None,
) -> Tensor:
    """The operation itself, see `group_norm`."""
    _check(x, weight, bias, time, offset, scale_shift)
    (n, channels), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    y = torch.empty_like(x, memory_format=torch.channels_last)
    tiles = tiling(n, channels, pixels, groups)
    if not x.numel():
        return y
    # A row of one is that of every sample.
    rows = [0 if one is None or len(one) == 1 else one.stride(0) for one in (time, scale_shift)]
    added = (x if time is None else time, x if offset is None else offset)
    flags = {"TIME": time is not None, "OFFSET": offset is not None}
    last = {"SCALE": scale_shift is not None, "SILU": silu}
    modulation = x if scale_shift is None else scale_shift
    shape = (pixels, channels, channels // groups, tiles.width, tiles.chunks)
    blocks = {"TILES": -(-tiles.span // tiles.block_p), "BLOCK_P": tiles.block_p, "BLOCK_C": tiles.block_c}
    how: dict[str, Any] = {"num_warps": tiles.warps}
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if tiles.splits == 1:
            kernel: Any = kernels.group_norm_whole[(n * tiles.chunks,)]
            resident = {"RESIDENT": pixels <= tiles.block_p, "BLOCK_G": tiles.block_g}
            given = (x, y, weight, bias, *added, modulation, *rows, *shape, eps)
            kernel(*given, **flags, **last, **resident, **blocks, **how)
            return y
        grid = (n * tiles.chunks * tiles.splits,)
        moments = torch.empty((n, tiles.splits, 2, channels), device=x.device, dtype=torch.float32)
        split = (tiles.splits, tiles.span)
        kernels.group_norm_moments[grid](
            x, moments, *added, rows[0], *shape, *split, **flags, **blocks, BLOCK_G=tiles.block_g, **how
        )
        given = (x, y, moments, weight, bias, *added, modulation, *rows, *shape, *split, eps)
        kernels.group_norm_merged[grid](*given, **flags, **last, BLOCK_S=_power(tiles.splits), **blocks, **how)
    return y


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, time: Tensor | None, offset: Tensor | None, scale_shift: Tensor | None
) -> None:
    if x.ndim != 4 or x.dtype not in DTYPES or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"a tensor {tuple(x.shape)} of {x.dtype} and strides {x.stride()} is not channels-last floats")
    n, c = x.shape[:2]
    wanted = (("weight", weight, (c,)), ("bias", bias, (c,)), ("offset", offset, (c,)))
    wrong = [name for name, one, shape in wanted if one is not None and (one.shape != shape or not one.is_contiguous())]
    for name, one, width in (("time", time, c), ("scale_shift", scale_shift, 2 * c)):
        if one is not None and (one.ndim != 2 or one.shape[1] != width or len(one) not in (1, n) or one.stride(1) != 1):
            wrong.append(name)
    if wrong:
        raise ValueError(f"{' and '.join(wrong)} do not fit a tensor {tuple(x.shape)}")


_operation = torch.library.custom_op(
    "ddim::group_norm",
    _launch,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, Tensor? time, Tensor? offset, "
    "Tensor? scale_shift) -> Tensor",
)


@_operation.register_fake
def _fake(x: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
    time: Tensor | None = None,
    offset: Tensor | None = None,
    scale_shift: Tensor | None = None,
) -> Tensor:
    """SiLU(scale GN(x + time + offset) + shift) of a channels-last tensor, computed in float32; without gradients.

    It is a custom operator to torch.compile and torch.export, and a plain launch of the kernels otherwise.

    Args:
        x: bfloat16, float16 or float32, (N, C, H, W), in channels-last memory.
        weight: The norm's weights, (C,).
        bias: The norm's biases, (C,).
        groups: Groups; they must divide C.
        eps: What is added to the variance.
        silu: Whether SiLU follows.
        time: Added before the norm, (N or 1, C), or None.
        offset: Added before the norm, (C,), such as the bias of the convolution before it, or None.
        scale_shift: (N or 1, 2 C): the norm's output is multiplied with 1 + the first half, and the second added.

    Returns:
        The dtype, shape and memory format of x.

    Raises:
        ValueError: If x is not a channels-last tensor of one of these dtypes, or another does not fit it.
    """
    given = (x, weight, bias, groups, eps, silu, time, offset, scale_shift)
    if torch.compiler.is_compiling():
        return cast(Tensor, _operation(*given))
    return _launch(*given)


def _residual(a: Tensor, b: Tensor, bias: Tensor, other: Tensor | None) -> Tensor:
    """The operation itself, see `residual`."""
    for one in (a, b):
        if one.shape != a.shape or one.dtype != a.dtype:
            raise ValueError(f"a tensor {tuple(b.shape)} of {b.dtype} is not added to {tuple(a.shape)} of {a.dtype}")
        _check(one, bias, bias, None, other, None)
    out = torch.empty_like(a, memory_format=torch.channels_last)
    channels = a.shape[1]
    if not a.numel():
        return out
    rows = a.numel() // channels
    block_c = min(256, _power(channels))
    block_r = 4096 // block_c
    grid = (-(-rows // block_r), -(-channels // block_c))
    given = (a, b, bias, bias if other is None else other, out, rows, channels)
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        kernels.add_biased[grid](*given, OTHER=other is not None, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8)
    return out


_residual_operation = torch.library.custom_op(
    "ddim::residual", _residual, mutates_args=(), schema="(Tensor a, Tensor b, Tensor bias, Tensor? other) -> Tensor"
)


@_residual_operation.register_fake
def _fake_residual(a: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(a, memory_format=torch.channels_last)


def residual(a: Tensor, b: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
    """A + b + bias + other, computed in float32; without gradients.

    Args:
        a: bfloat16, float16 or float32, (N, C, H, W), in channels-last memory.
        b: Likewise, of the same shape and dtype.
        bias: (C,).
        other: (C,), or None.

    Raises:
        ValueError: As `group_norm`.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, _residual_operation(a, b, bias, other))
    return _residual(a, b, bias, other)
