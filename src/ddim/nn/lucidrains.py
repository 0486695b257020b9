"""The U-Net of the package denoising-diffusion-pytorch (P. Wang, versions 2), for running its checkpoints.

Differences from `ddim.nn.unet`: RMS norm, attention at every level (linear except at the last), time scales and shifts
a block's first norm only, and the last block also receives the output of the first convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ddim._io import limits
from ddim.nn.base import Network


class LucidrainsConfig(BaseModel):
    """The architecture of a `LucidrainsUNet`. The middle uses the last level's `heads`, `head_channels`, `memories`.

    Args:
        kind: Always "lucidrains".
        in_channels: Image channels.
        height: Image height; `2^(levels - 1)` must divide it.
        width: Image width; `2^(levels - 1)` must divide it.
        channels: Channels of the time embedding, "dim" in that package; the levels have multiples of it.
        first: Channels of the first convolution, "init_dim" in that package.
        multipliers: Channels of each level's output, in multiples of `channels`.
        full: For each level, whether its attention is over all pairs of positions instead of linear.
        heads: Attention heads of each level.
        head_channels: Channels per head of each level.
        memories: Number of additional learned keys and values in each level's attention.
        dropout: Dropout rate inside the blocks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["lucidrains"] = "lucidrains"
    in_channels: int = Field(3, ge=1, le=limits.WIDTH)
    height: int = Field(32, ge=1)
    width: int = Field(32, ge=1)
    channels: int = Field(64, ge=4, le=limits.WIDTH, multiple_of=2)
    first: int = Field(64, ge=1, le=limits.WIDTH)
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    full: tuple[bool, ...] = (False, False, False, True)
    heads: tuple[int, ...] = (4, 4, 4, 4)
    head_channels: tuple[int, ...] = (32, 32, 32, 32)
    memories: tuple[int, ...] = (4, 4, 4, 4)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> LucidrainsConfig:
        per_level = {"heads": self.heads, "head_channels": self.head_channels, "memories": self.memories}
        for name, values in {"multipliers": self.multipliers, **per_level}.items():
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be integers >= 1")
        limits.check_levels(self.multipliers)
        limits.check_pixels(self.height, self.width)
        for name, values in {"full": self.full, **per_level}.items():
            if len(values) != len(self.multipliers):
                raise ValueError(f"there are {len(self.multipliers)} levels, but {name} has {len(values)}")
        factor = 2 ** (len(self.multipliers) - 1)
        if self.height % factor or self.width % factor:
            raise ValueError(f"{self.height}x{self.width} is not divisible by {factor} (2^(levels - 1))")
        limits.check_parameters(self.parameters)
        return self

    @property
    def parameters(self) -> int:
        """An estimate of the number of parameters, without building the network."""
        sizes = zip(self.widths[1:], self.heads, self.head_channels, self.memories, strict=True)
        attention = sum(2 * heads * (4 * width * size + 2 * size * memories) for width, heads, size, memories in sizes)
        return limits.unet_parameters(self.widths[1:], 2, 4 * self.channels, 2 * self.in_channels) + attention

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W)."""
        return (self.in_channels, self.height, self.width)

    @property
    def classes(self) -> int:
        """Number of labels: none."""
        return 0

    @property
    def categories(self) -> int:
        """0: the images are real-valued."""
        return 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the first convolution, then of each level's output."""
        return (self.first, *(self.channels * m for m in self.multipliers))

    def build(self) -> LucidrainsUNet:
        """The network, its weights drawn from the global generator."""
        return LucidrainsUNet(self)

    def __str__(self) -> str:
        text = f"denoising-diffusion-pytorch U-Net, {self.channels} channels x {list(self.multipliers)}, "
        return text + f"full attention at levels {[level for level, is_full in enumerate(self.full) if is_full]}"


class LucidrainsUNet(Network):
    """The network: predicts eps, x_0 or v, whichever it was trained for, from x_t and a time."""

    label: None

    def __init__(self, config: LucidrainsConfig):
        super().__init__()
        self.config = config
        c, widths = config, config.widths
        last, embedding = len(config.multipliers) - 1, 4 * config.channels
        self.time = nn.Sequential(nn.Linear(c.channels, embedding), nn.GELU(), nn.Linear(embedding, embedding))
        self.label = None
        self.rows: list[int] = []
        self.conv_in = nn.Conv2d(c.in_channels, c.first, 7, padding=3)
        self.down_blocks, self.down_attention, self.downs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in range(last + 1):
            now, after = widths[level], widths[level + 1]
            self.down_blocks.extend([self._block(now, now), self._block(now, now)])
            self.down_attention.append(self._attention(now, level))
            self.downs.append(_halved(now, after) if level < last else nn.Conv2d(now, after, 3, padding=1))
        now = widths[-1]
        self.middle = nn.ModuleList([self._block(now, now), self._block(now, now)])
        self.middle_attention = FullAttention(now, c.heads[-1], c.head_channels[-1], c.memories[-1])
        self.up_blocks, self.up_attention, self.ups = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(last + 1)):
            now, after = widths[level + 1], widths[level]
            self.up_blocks.extend([self._block(now + after, now), self._block(now + after, now)])
            self.up_attention.append(self._attention(now, level))
            self.ups.append(_doubled(now, after) if level else nn.Conv2d(now, after, 3, padding=1))
        self.last_block = self._block(2 * c.first, c.first)
        self.conv_out = nn.Conv2d(c.first, c.in_channels, 1)
        self.time_to_blocks = nn.Linear(embedding, sum(self.rows))

    def _block(self, c_in: int, c_out: int) -> NormedBlock:
        self.rows.append(2 * c_out)
        return NormedBlock(c_in, c_out, self.config.dropout)

    def _attention(self, width: int, level: int) -> nn.Module:
        c = self.config
        cls = FullAttention if c.full[level] else LinearAttention
        return cls(width, c.heads[level], c.head_channels[level], c.memories[level])

    @property
    def entry(self) -> nn.Module:
        """The first convolution."""
        return self.conv_in

    @override
    def enter(self, x: Tensor) -> Tensor:
        return x.to(self.conv_in.weight.dtype, memory_format=torch.channels_last)

    @override
    def body(self, x: Tensor, condition: Tensor) -> Tensor:
        times: Iterator[Tensor] = iter(torch.split(condition, self.rows, dim=1))
        h = first = self.conv_in(x)
        skips = []
        for level, attention in enumerate(self.down_attention):
            h = self.down_blocks[2 * level](h, next(times))
            skips.append(h)
            h = attention(self.down_blocks[2 * level + 1](h, next(times)))
            skips.append(h)
            h = self.downs[level](h)
        h = self.middle_attention(self.middle[0](h, next(times)))
        h = self.middle[1](h, next(times))
        for level, attention in enumerate(self.up_attention):
            h = self.up_blocks[2 * level](torch.cat([h, skips.pop()], dim=1), next(times))
            h = attention(self.up_blocks[2 * level + 1](torch.cat([h, skips.pop()], dim=1), next(times)))
            h = self.ups[level](h)
        h = self.last_block(torch.cat([h, first], dim=1), next(times))
        return cast(Tensor, self.conv_out(h))


class RMSNorm(nn.Module):
    """RMS norm over the channels of each position, multiplied by `gain`; (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return cast(Tensor, F.normalize(x, dim=1) * (self.gain * x.shape[1] ** 0.5))


class NormedBlock(nn.Module):
    """Two times conv, norm and SiLU, with a residual; time scales and shifts the first norm."""

    def __init__(self, c_in: int, c_out: int, dropout: float):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm1 = RMSNorm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.norm2 = RMSNorm(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W); `time` is (B or 1, 2 C_out)."""
        scale, shift = time[:, :, None, None].chunk(2, dim=1)
        h = self.dropout(F.silu(torch.addcmul(shift, self.norm1(self.conv1(x)), 1 + scale)))
        return cast(Tensor, F.silu(self.norm2(self.conv2(h))) + self.skip(x))


class FullAttention(nn.Module):
    """Attention over all positions and learned memories, with a residual; (B, C, H, W) to itself."""

    def __init__(self, channels: int, heads: int, head_channels: int, memories: int):
        super().__init__()
        self.heads, inner = heads, heads * head_channels
        self.norm = RMSNorm(channels)
        self.memory = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, heads, memories, head_channels)))
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x plus the attention output, (B, C, H, W)."""
        b, _, height, width = x.shape
        split = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, height * width)
        q, k, v = split.transpose(3, 4).unbind(1)
        memory = self.memory[:, None].expand(2, b, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, torch.cat([memory[0], k], dim=2), torch.cat([memory[1], v], dim=2))
        return x + cast(Tensor, self.out(mixed.transpose(2, 3).reshape(b, -1, height, width)))


class LinearAttention(nn.Module):
    """Attention of linear cost in the number of positions, with a residual; (B, C, H, W) to itself.

    Keys and values are summed into one small matrix, which is multiplied by the queries. Queries have a softmax over a
    head's channels, keys one over positions and memories.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, memories: int):
        super().__init__()
        self.heads, inner = heads, heads * head_channels
        self.norm = RMSNorm(channels)
        self.memory = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, heads, head_channels, memories)))
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm_out = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x plus the attention output, (B, C, H, W)."""
        b, _, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, height * width).unbind(1)
        memory = self.memory[:, None].expand(2, b, -1, -1, -1)
        k, v = torch.cat([memory[0], k], dim=3), torch.cat([memory[1], v], dim=3)
        gathered = k.softmax(dim=3) @ v.transpose(2, 3)
        mixed = gathered.transpose(2, 3) @ (q.softmax(dim=2) * q.shape[2] ** -0.5)
        return x + cast(Tensor, self.norm_out(self.out(mixed.reshape(b, -1, height, width))))


def _halved(c_in: int, c_out: int) -> nn.Sequential:
    """Downsampling: 2x2 pixels become four times the channels, then a 1x1 convolution."""
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c_in, c_out, 1))


def _doubled(c_in: int, c_out: int) -> nn.Sequential:
    """Upsampling: nearest neighbour, then a 3x3 convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(c_in, c_out, 3, padding=1))
