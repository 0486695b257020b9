"""Building blocks of U-Nets: residual blocks, attention, and down- and upsampling."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.nn.base import zero


class Norm(nn.GroupNorm):
    """Group norm, optionally of a sum, with scale and shift, and followed by SiLU.

    If `fused` is set (see `fuse_norms`), the input is in channels-last memory and needs no gradient, this is one
    operation of `ddim.nn.cuda_norm`, computed in float32; otherwise a sequence of PyTorch operators.
    """

    fused = False

    def then(
        self,
        x: Tensor,
        silu: bool = True,
        time: Tensor | None = None,
        offset: Tensor | None = None,
        scale_shift: Tensor | None = None,
    ) -> Tensor:
        """SiLU(scale GN(x + time + offset) + shift).

        Args:
            x: (B, C, H, W).
            silu: Whether SiLU follows.
            time: (B or 1, C), or None.
            offset: (C,), or None.
            scale_shift: (B or 1, 2 C), or None; the scale is 1 + the first half, the shift the second half.
        """
        if self.fused and fusible(x):
            from ddim.nn.cuda_norm import group_norm

            arguments = (x, self.weight, self.bias, self.num_groups, self.eps, silu, time, offset, scale_shift)
            return group_norm(*arguments)
        if offset is not None:
            x = x + offset[:, None, None]
        h = self(x if time is None else x + time[:, :, None, None])
        if scale_shift is not None:
            scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        return F.silu(h) if silu else cast(Tensor, h)


def fusible(x: Tensor) -> bool:
    """Whether the fused operations support a tensor: in channels-last memory, and without gradient."""
    gradient = torch.is_grad_enabled() and x.requires_grad
    return not gradient and x.is_contiguous(memory_format=torch.channels_last)


def fuse_norms(network: nn.Module) -> int:
    """Use the Triton kernels for a network's norms in inference; returns their number, 0 without Triton."""
    norms = [part for part in network.modules() if isinstance(part, Norm)] if find_spec("triton") else []
    for norm in norms:
        norm.fused = True
    return len(norms)


class Block(nn.Module):
    """A residual block: norm, SiLU, conv, plus time, norm, SiLU, dropout, conv; (B, C_in, H, W) to (B, C_out, H, W).

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output.
        groups: Group-norm groups.
        dropout: Dropout rate.
        eps: Added to the variance in group norm.
        scale_shift: Whether time scales and shifts the second norm; then `time` is (B or 1, 2 C_out).
        resample: "down" halves the resolution, "up" doubles it, "" does not change it.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        groups: int,
        dropout: float,
        eps: float = 1e-6,
        scale_shift: bool = False,
        resample: str = "",
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = Norm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = Norm(groups, c_out, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The block's output; `time` is (B or 1, C_out)."""
        h = self.norm1.then(x)
        if self.resample:
            change = partial(F.avg_pool2d, kernel_size=2) if self.resample == "down" else _doubled
            x, h = change(x), change(h)
        if self.norm2.fused and fusible(h) and fusible(x):
            return self._fused(x, h, time)
        h = self.conv2(self.dropout(self._timed(self.conv1(h), time)))
        return cast(Tensor, self.skip(x) + h)

    def _timed(self, h: Tensor, time: Tensor, offset: Tensor | None = None) -> Tensor:
        """The second norm and SiLU, with time conditioning."""
        if self.scale_shift:
            return self.norm2.then(h, offset=offset, scale_shift=time)
        return self.norm2.then(h, offset=offset, time=time)

    def _fused(self, x: Tensor, h: Tensor, time: Tensor) -> Tensor:
        """The rest of the block, with the biases of the convolutions added in the fused norm and residual sum."""
        from ddim.nn.cuda_norm import residual

        h = self._timed(_unbiased(self.conv1, h), time, self.conv1.bias)
        h = _unbiased(self.conv2, self.dropout(h))
        bias = cast(Tensor, self.conv2.bias)
        if isinstance(self.skip, nn.Identity):
            return residual(x, h, bias)
        return residual(_unbiased(self.skip, x), h, bias, self.skip.bias)


def _unbiased(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution without its bias, in channels-last memory, the format that cuDNN writes."""
    out = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    return out.contiguous(memory_format=torch.channels_last)


class Attention(nn.Module):
    """Self-attention over positions with a residual; (B, C, H, W) to itself."""

    def __init__(self, channels: int, groups: int, heads: int, eps: float = 1e-6):
        super().__init__()
        self.heads = heads
        self.norm = Norm(groups, channels, eps=eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x plus the attention output, (B, C, H, W)."""
        b, c, h, w = x.shape
        # In channels-last memory this permutation copies nothing.
        tokens = self.norm.then(x, silu=False).permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + cast(Tensor, self.out(mixed)).view(b, h, w, c).permute(0, 3, 1, 2)


class Down(nn.Module):
    """Downsampling by a strided 3x3 convolution, padded at the "far" edges, as in Ho et al.'s code, or at "both"."""

    def __init__(self, channels: int, padding: str = "far"):
        super().__init__()
        self.far = padding == "far"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.far else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1)) if self.far else x))


class Up(nn.Module):
    """Upsampling: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        return cast(Tensor, self.conv(_doubled(x)))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
