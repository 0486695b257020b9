"""The parts U-Nets are built of: residual blocks, attention, and changes of resolution."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.nn.network import zero


class Block(nn.Module):
    """A residual block: norm, SiLU, conv, plus time, norm, SiLU, dropout, conv; (B, C_in, H, W) to (B, C_out, H, W).

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output.
        groups: Group-norm groups.
        dropout: Dropout rate.
        eps: What group norm adds to the variance.
        scale_shift: Whether time scales and shifts the second norm; then it is (B or 1, 2 C_out).
        resample: Whether the block halves ("down") or doubles ("up") the resolution; "" keeps it.
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
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The block's output; `time` is (B or 1, C_out)."""
        h = F.silu(self.norm1(x))
        if self.resample:
            change = partial(F.avg_pool2d, kernel_size=2) if self.resample == "down" else _doubled
            x, h = change(x), change(h)
        h, time = self.conv1(h), time[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return cast(Tensor, self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over positions with a residual; (B, C, H, W) to itself."""

    def __init__(self, channels: int, groups: int, heads: int, eps: float = 1e-6):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """The attended picture."""
        b, c, h, w = x.shape
        # In channels-last memory this transposition moves nothing.
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + cast(Tensor, self.out(mixed)).view(b, h, w, c).permute(0, 3, 1, 2)


class Down(nn.Module):
    """Half the resolution by a strided 3x3 convolution, padded at the far edges, as in Ho et al.'s code, or both."""

    def __init__(self, channels: int, padding: str = "far"):
        super().__init__()
        self.far = padding == "far"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.far else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1)) if self.far else x))


class Up(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        return cast(Tensor, self.conv(_doubled(x)))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
