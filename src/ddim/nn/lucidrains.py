"""The U-Net of the package denoising-diffusion-pytorch (P. Wang, versions 2), so that its checkpoints run here.

Unlike `ddim.nn.unet` it norms by root mean square, attends at every level (linearly, but at the last), lets time scale
and shift a block's first norm alone, and shows its last block what its first convolution made.
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
    """The shape of a `LucidrainsUNet`.

    Args:
        kind: Always "lucidrains".
        in_channels: Picture channels.
        height: Picture height; `2^(levels - 1)` must divide it.
        width: Picture width, likewise.
        channels: Channels of the time embedding, of which the levels' are multiples ("dim" there).
        first: Channels of the first convolution ("init_dim" there).
        multipliers: Channels of each level's output, in multiples of `channels`.
        full: For each level, whether its attention is over all pairs of positions instead of linear.
        heads: For each level, its attention's heads; the middle has the last level's.
        head_channels: For each level, the channels of a head, likewise.
        memories: For each level, how many learned keys and values its attention has beside the positions', likewise.
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
    def _fits(self) -> LucidrainsConfig:
        each = {"heads": self.heads, "head_channels": self.head_channels, "memories": self.memories}
        for name, values in {"multipliers": self.multipliers, **each}.items():
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be whole numbers >= 1")
        limits.check_levels(self.multipliers)
        limits.check_pixels(self.height, self.width)
        for name, values in {"full": self.full, **each}.items():
            if len(values) != len(self.multipliers):
                raise ValueError(f"there are {len(self.multipliers)} levels, {name} is given for {len(values)}")
        factor = 2 ** (len(self.multipliers) - 1)
        if self.height % factor or self.width % factor:
            raise ValueError(f"{self.height}x{self.width} is not divisible by {factor} (2^(levels - 1))")
        limits.check_parameters(self.parameters)
        return self

    @property
    def parameters(self) -> int:
        """An estimate of the number of parameters, without building the network."""
        sizes = zip(self.widths[1:], self.heads, self.head_channels, self.memories, strict=True)
        attention = sum(2 * heads * (4 * width * size + 2 * size * kept) for width, heads, size, kept in sizes)
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
        """0: it is over real-valued pictures."""
        return 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the first convolution, then of each level's output."""
        return (self.first, *(self.channels * m for m in self.multipliers))

    def build(self) -> LucidrainsUNet:
        """The network, its weights drawn from the global generator."""
        return LucidrainsUNet(self)

    def __str__(self) -> str:
        said = f"denoising-diffusion-pytorch U-Net, {self.channels} channels x {list(self.multipliers)}, "
        return said + f"full attention at levels {[level for level, there in enumerate(self.full) if there]}"


class LucidrainsUNet(Network):
    """The network: x_t and a time in, eps, x_0 or v out, whichever it was trained for."""

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
        made = FullAttention if c.full[level] else LinearAttention
        return made(width, c.heads[level], c.head_channels[level], c.memories[level])

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
    """Each position's channels brought to a root mean square of 1, then multiplied with `gain`; (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The normed picture."""
        return cast(Tensor, F.normalize(x, dim=1) * (self.gain * x.shape[1] ** 0.5))


class NormedBlock(nn.Module):
    """Twice conv, norm and SiLU, with a residual; time scales and shifts the first norm."""

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
    """Attention of all positions to all, and to learned memories, with a residual; (B, C, H, W) to itself."""

    def __init__(self, channels: int, heads: int, head_channels: int, memories: int):
        super().__init__()
        self.heads, inner = heads, heads * head_channels
        self.norm = RMSNorm(channels)
        self.memory = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, heads, memories, head_channels)))
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The attended picture."""
        b, _, height, width = x.shape
        split = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, height * width)
        q, k, v = split.transpose(3, 4).unbind(1)
        kept = self.memory[:, None].expand(2, b, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, torch.cat([kept[0], k], dim=2), torch.cat([kept[1], v], dim=2))
        return x + cast(Tensor, self.out(mixed.transpose(2, 3).reshape(b, -1, height, width)))


class LinearAttention(nn.Module):
    """Attention whose cost is linear in positions: keys gather values into one small matrix, from which queries read.

    Queries are a softmax over a head's channels, keys one over positions and memories; (B, C, H, W) to itself.
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
        """The attended picture."""
        b, _, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, height * width).unbind(1)
        kept = self.memory[:, None].expand(2, b, -1, -1, -1)
        k, v = torch.cat([kept[0], k], dim=3), torch.cat([kept[1], v], dim=3)
        gathered = k.softmax(dim=3) @ v.transpose(2, 3)
        mixed = gathered.transpose(2, 3) @ (q.softmax(dim=2) * q.shape[2] ** -0.5)
        return x + cast(Tensor, self.norm_out(self.out(mixed.reshape(b, -1, height, width))))


def _halved(c_in: int, c_out: int) -> nn.Sequential:
    """Half the resolution: 2x2 pixels become four times the channels."""
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c_in, c_out, 1))


def _doubled(c_in: int, c_out: int) -> nn.Sequential:
    """Twice the resolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(c_in, c_out, 3, padding=1))
