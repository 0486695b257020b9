"""Small networks of other libraries, with their module names and arithmetic and random weights, for parity tests.

Times count from 0, as there. Only the layer names and the arithmetic are those of the libraries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights in all layers, including scales and shifts of norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith((".g", "mem_kv")) or (parameter.ndim == 1 and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.2 if parameter.ndim == 1 else 1.2 / math.sqrt(fan)))
    return network.eval()


def waves(t: Tensor, channels: int, lowest: float) -> list[Tensor]:
    """Sines and cosines of t, their rates falling in equal ratios; the last but `lowest` is 1/10000."""
    half = channels // 2
    rates = torch.tensor([10000 ** -(i / (half - lowest)) for i in range(half)], dtype=torch.float32)
    return [(t.float()[:, None] * rates).sin(), (t.float()[:, None] * rates).cos()]


def scaled_softmax_mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head: (B, C, N) each, queries by keys, to (B, C, N)."""
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(q.shape[1]), dim=2)
    return torch.einsum("bnm,bcm->bcn", weights, v)


# The DDIM authors' code and the PyTorch port of DDPM ------------------------------------------------------------------


class OfficialBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, time: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, c_in, eps=1e-6), nn.GroupNorm(32, c_out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(time, c_out)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(time))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class OfficialAttention(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        mixed = scaled_softmax_mix(*(layer(normed).flatten(2) for layer in (self.q, self.k, self.v)))
        return x + self.proj_out(mixed.view_as(x))


class OfficialResample(nn.Module):
    def __init__(self, c: int, direction: str):
        super().__init__()
        self.direction = direction
        self.conv = nn.Conv2d(c, c, 3, stride=2) if direction == "down" else nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "down":
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class OfficialNet(nn.Module):
    """models/diffusion.py of the DDIM authors."""

    def __init__(self, colours: int, width: int, multipliers: Sequence[int], blocks: int, attends: Sequence[int]):
        super().__init__()
        self.width, self.levels = width, len(multipliers)
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])
        self.conv_in = nn.Conv2d(colours, width, 3, padding=1)
        self.down, self.up, self.mid = nn.ModuleList(), nn.ModuleList(), nn.Module()
        skips, now = [width], width
        for level, multiplier in enumerate(multipliers):
            part = self._level(level in attends)
            for _ in range(blocks):
                now = self._add(part, now, width * multiplier)
                skips.append(now)
            if level < self.levels - 1:
                part.downsample = OfficialResample(now, "down")
                skips.append(now)
            self.down.append(part)
        self.mid.block_1, self.mid.block_2 = (OfficialBlock(now, now, 4 * width) for _ in range(2))
        self.mid.attn_1 = OfficialAttention(now)
        ups = []
        for level in reversed(range(self.levels)):
            part = self._level(level in attends)
            for _ in range(blocks + 1):
                now = self._add(part, now + skips.pop(), width * multipliers[level])
            if level:
                part.upsample = OfficialResample(now, "up")
            ups.append(part)
        self.up.extend(ups[::-1])
        self.norm_out = nn.GroupNorm(32, now, eps=1e-6)
        self.conv_out = nn.Conv2d(now, colours, 3, padding=1)

    @staticmethod
    def _level(attends: bool) -> nn.Module:
        part = nn.Module()
        part.block, part.attn, part.attends = nn.ModuleList(), nn.ModuleList(), attends
        return part

    def _add(self, part: nn.Module, c_in: int, c_out: int) -> int:
        part.block.append(OfficialBlock(c_in, c_out, 4 * self.width))
        if part.attends:
            part.attn.append(OfficialAttention(c_out))
        return c_out

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second = self.temb.dense
        time = second(F.silu(first(torch.cat(waves(t, self.width, 1), dim=1))))
        h = self.conv_in(x)
        skips = [h]
        for part in self.down:
            for at, block in enumerate(part.block):
                h = block(h, time)
                h = part.attn[at](h) if part.attends else h
                skips.append(h)
            if hasattr(part, "downsample"):
                h = part.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, time)), time)
        for part in reversed(self.up):
            for at, block in enumerate(part.block):
                h = block(torch.cat([h, skips.pop()], dim=1), time)
                h = part.attn[at](h) if part.attends else h
            if hasattr(part, "upsample"):
                h = part.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# OpenAI's improved-diffusion and guided-diffusion ---------------------------------------------------------------------


class OpenAIBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, time: int, scale_shift: bool, change: str = ""):
        super().__init__()
        self.scale_shift, self.change = scale_shift, change
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * c_out if scale_shift else c_out))
        conv = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, c_out), nn.SiLU(), nn.Dropout(0.5), conv)
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.change == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.change == "up" else x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers[2](self._resampled(self.in_layers[1](self.in_layers[0](x))))
        condition = self.emb_layers(time)[..., None, None]
        if self.scale_shift:
            half = condition.shape[1] // 2
            h = self.out_layers[0](h) * (condition[:, :half] + 1) + condition[:, half:]
        else:
            h = self.out_layers[0](h + condition)
        return self.out_layers[1:](h) + self.skip_connection(self._resampled(x))


class OpenAIAttention(nn.Module):
    def __init__(self, c: int, heads: int, order: str):
        super().__init__()
        self.heads, self.order = heads, order
        self.norm, self.qkv, self.proj_out = nn.GroupNorm(32, c), nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        rows, each = self.qkv(self.norm(x.flatten(2))), x.shape[1] // self.heads
        out = []
        for head in range(self.heads):
            if self.order == "legacy":  # the head's q, k and v stand one after another
                parts = [rows[:, (3 * head + i) * each : (3 * head + i + 1) * each] for i in range(3)]
            else:  # all heads' q, all k, all v
                parts = [rows[:, i * x.shape[1] :][:, head * each : (head + 1) * each] for i in range(3)]
            out.append(scaled_softmax_mix(*parts))
        return x + self.proj_out(torch.cat(out, dim=1)).view_as(x)


class Halved(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.op(x)


class Doubled(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class First(nn.Conv2d):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class OpenAINet(nn.Module):
    """UNetModel of both of OpenAI's libraries."""

    def __init__(
        self,
        colours: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attends: Sequence[int] = (),
        heads: int = 1,
        head_channels: int = 0,
        order: str = "legacy",
        scale_shift: bool = False,
        updown: bool = False,
        learned: bool = False,
        classes: int = 0,
    ):
        super().__init__()
        self.width, time = width, 4 * width

        def block(c_in: int, c_out: int, change: str = "") -> nn.Module:
            return OpenAIBlock(c_in, c_out, time, scale_shift, change)

        def attention(c: int) -> nn.Module:
            return OpenAIAttention(c, c // head_channels if head_channels else heads, order)

        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        if classes:
            self.label_emb = nn.Embedding(classes, time)
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(colours, width, 3, padding=1)])])
        skips, now, last = [width], width, len(multipliers) - 1
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                parts = [block(now, width * multiplier)]
                now = width * multiplier
                parts += [attention(now)] if level in attends else []
                self.input_blocks.append(nn.ModuleList(parts))
                skips.append(now)
            if level < last:
                self.input_blocks.append(nn.ModuleList([block(now, now, "down") if updown else Halved(now)]))
                skips.append(now)
        self.middle_block = nn.ModuleList([block(now, now), attention(now), block(now, now)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for at in range(blocks + 1):
                parts = [block(now + skips.pop(), width * multipliers[level])]
                now = width * multipliers[level]
                parts += [attention(now)] if level in attends else []
                if level and at == blocks:
                    parts += [block(now, now, "up") if updown else Doubled(now)]
                self.output_blocks.append(nn.ModuleList(parts))
        out = nn.Conv2d(now, colours * (2 if learned else 1), 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time_embed(torch.cat(waves(t, self.width, 0)[::-1], dim=1))
        h, skips = x, []
        for parts in self.input_blocks:
            for part in parts:
                h = part(h, time)
            skips.append(h)
        for part in self.middle_block:
            h = part(h, time)
        for parts in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for part in parts:
                h = part(h, time)
        return self.out(h)
