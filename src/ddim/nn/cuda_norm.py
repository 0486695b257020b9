"""Group norm with SiLU, and residual sums, of channels-last tensors, by Triton kernels for CUDA; inference only.

PyTorch's group norm has no channels-last kernel on CUDA: it copies its input to NCHW, and its output is copied back.
Here a program reads rows of several whole groups, at least 64 channels, so that every load is of 128 bytes or more.
Statistics are float32 for any dtype: each channel's sums are shifted by the channel's first value, and channels are
merged by Chan et al.'s formula, so that a mean far from zero loses no digits.

There are three algorithms, chosen from the shapes alone:

- up to `RESIDENT` pixels: one program for each sample and set of groups keeps its tile in registers (one read, one
  write);
- more pixels and at least `ENOUGH` programs: the same, but the tile is read twice, the second time from the L2 cache;
- more pixels and fewer programs: the pixels are split too, one kernel computing the moments of each part and another
  merging and applying them, so that a single image occupies the whole GPU.

Outside torch.compile PyTorch adds a convolution's bias in a separate kernel. So `group_norm` and `residual` take the
biases of the preceding convolutions.

This module imports Triton, which comes with PyTorch for CUDA; import it only if `ddim.nn.blocks.fuse_norms` found it.
With TRITON_INTERPRET=1 the kernels run on CPU tensors, which is how they are tested without a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ddim.nn import cuda_norm_kernels as kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROW = 64
"""Fewest channels of a pixel that a program reads, if the tensor has as many."""
WIDEST = 1024
"""Most channels of a group."""
RESIDENT = 256
"""Most pixels of a tile in registers."""
ENOUGH = 1024
"""Programs that occupy a GPU without splitting the pixels."""
SPLITS = 64
"""Most parts that the pixels of a sample are split into."""


class Tiling(NamedTuple):
    """The division of a tensor among programs.

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
    """The division of a tensor (n, channels, pixels) among programs.

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
    """The smallest power of two that is at least the number."""
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
    """Validate the inputs and launch the kernels of `group_norm`."""
    _check(x, weight, bias, time, offset, scale_shift)
    (n, channels), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    y = torch.empty_like(x, memory_format=torch.channels_last)
    tiles = tiling(n, channels, pixels, groups)
    if not x.numel():
        return y
    # Stride 0 broadcasts a single row to every sample.
    rows = [0 if term is None or len(term) == 1 else term.stride(0) for term in (time, scale_shift)]
    added = (x if time is None else time, x if offset is None else offset)
    flags = {"TIME": time is not None, "OFFSET": offset is not None}
    last = {"SCALE": scale_shift is not None, "SILU": silu}
    modulation = x if scale_shift is None else scale_shift
    shape = (pixels, channels, channels // groups, tiles.width, tiles.chunks)
    blocks = {"TILES": -(-tiles.span // tiles.block_p), "BLOCK_P": tiles.block_p, "BLOCK_C": tiles.block_c}
    launch: dict[str, Any] = {"num_warps": tiles.warps}
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if tiles.splits == 1:
            kernel: Any = kernels.group_norm_whole[(n * tiles.chunks,)]
            resident = {"RESIDENT": pixels <= tiles.block_p, "BLOCK_G": tiles.block_g}
            arguments = (x, y, weight, bias, *added, modulation, *rows, *shape, eps)
            kernel(*arguments, **flags, **last, **resident, **blocks, **launch)
            return y
        grid = (n * tiles.chunks * tiles.splits,)
        moments = torch.empty((n, tiles.splits, 2, channels), device=x.device, dtype=torch.float32)
        split = (tiles.splits, tiles.span)
        kernels.group_norm_moments[grid](
            x, moments, *added, rows[0], *shape, *split, **flags, **blocks, BLOCK_G=tiles.block_g, **launch
        )
        arguments = (x, y, moments, weight, bias, *added, modulation, *rows, *shape, *split, eps)
        kernels.group_norm_merged[grid](*arguments, **flags, **last, BLOCK_S=_power(tiles.splits), **blocks, **launch)
    return y


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, time: Tensor | None, offset: Tensor | None, scale_shift: Tensor | None
) -> None:
    if x.ndim != 4 or x.dtype not in DTYPES or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"a tensor {tuple(x.shape)} of {x.dtype} and strides {x.stride()} is not channels-last floats")
    n, c = x.shape[:2]
    expected = (("weight", weight, (c,)), ("bias", bias, (c,)), ("offset", offset, (c,)))
    mismatched = [
        name for name, one, shape in expected if one is not None and (one.shape != shape or not one.is_contiguous())
    ]
    for name, one, width in (("time", time, c), ("scale_shift", scale_shift, 2 * c)):
        if one is not None and (one.ndim != 2 or one.shape[1] != width or len(one) not in (1, n) or one.stride(1) != 1):
            mismatched.append(name)
    if mismatched:
        raise ValueError(f"{' and '.join(mismatched)} do not fit a tensor {tuple(x.shape)}")


_operation = torch.library.custom_op(
    "ddim::group_norm",
    _launch,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, Tensor? time, Tensor? offset, "
    "Tensor? scale_shift) -> Tensor",
)


@_operation.register_fake
def _fake(x: Tensor, *arguments: Any) -> Tensor:
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

    In torch.compile and torch.export it is a custom operator, otherwise a direct launch of the kernels.

    Args:
        x: bfloat16, float16 or float32, (N, C, H, W), in channels-last memory.
        weight: The norm's weights, (C,).
        bias: The norm's biases, (C,).
        groups: Number of groups; must divide C.
        eps: Added to the variance.
        silu: Whether SiLU follows.
        time: Added before the norm, (N or 1, C), or None.
        offset: Added before the norm, (C,), such as the bias of the preceding convolution, or None.
        scale_shift: (N or 1, 2 C), or None: the norm's output is multiplied by 1 + the first half, and the second half
            added.

    Returns:
        A tensor of the dtype, shape and memory format of x.

    Raises:
        ValueError: If x is not a channels-last tensor of one of these dtypes, or another tensor does not match it.
    """
    arguments = (x, weight, bias, groups, eps, silu, time, offset, scale_shift)
    if torch.compiler.is_compiling():
        return cast(Tensor, _operation(*arguments))
    return _launch(*arguments)


def _residual(a: Tensor, b: Tensor, bias: Tensor, other: Tensor | None) -> Tensor:
    """Validate the inputs and launch the kernel of `residual`."""
    for one in (a, b):
        if one.shape != a.shape or one.dtype != a.dtype:
            raise ValueError(f"a tensor {tuple(b.shape)} of {b.dtype} cannot be added to {tuple(a.shape)} of {a.dtype}")
        _check(one, bias, bias, None, other, None)
    out = torch.empty_like(a, memory_format=torch.channels_last)
    channels = a.shape[1]
    if not a.numel():
        return out
    rows = a.numel() // channels
    block_c = min(256, _power(channels))
    block_r = 4096 // block_c
    grid = (-(-rows // block_r), -(-channels // block_c))
    arguments = (a, b, bias, bias if other is None else other, out, rows, channels)
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        kernels.add_biased[grid](*arguments, OTHER=other is not None, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8)
    return out


_residual_operation = torch.library.custom_op(
    "ddim::residual", _residual, mutates_args=(), schema="(Tensor a, Tensor b, Tensor bias, Tensor? other) -> Tensor"
)


@_residual_operation.register_fake
def _fake_residual(a: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(a, memory_format=torch.channels_last)


def residual(a: Tensor, b: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
    """The sum a + b + bias + other, computed in float32; without gradients.

    Args:
        a: bfloat16, float16 or float32, (N, C, H, W), in channels-last memory.
        b: A second tensor of the same shape, dtype and memory format.
        bias: (C,).
        other: (C,), or None.

    Raises:
        ValueError: If a tensor is not channels-last of one of these dtypes, or they do not match.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, _residual_operation(a, b, bias, other))
    return _residual(a, b, bias, other)
