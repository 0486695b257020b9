"""The Unet of denoising-diffusion-pytorch, version 2, with its module names and arithmetic, for parity tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foreign_nets import scaled_softmax_mix, waves


class Gained(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12) * self.g * math.sqrt(x.shape[1])


class LucidBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, time: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * c_out))
        self.block1, self.block2 = nn.Module(), nn.Module()
        for part, now in ((self.block1, c_in), (self.block2, c_out)):
            part.proj, part.norm = nn.Conv2d(now, c_out, 3, padding=1), Gained(c_out)
        self.res_conv = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.mlp(time)[..., None, None].chunk(2, dim=1)
        h = self.block1.norm(self.block1.proj(x))
        h = F.silu(h * (1 + scale) + shift)
        return F.silu(self.block2.norm(self.block2.proj(h))) + self.res_conv(x)


class LucidAttention(nn.Module):
    def __init__(self, c: int, heads: int, each: int, full: bool, memories: int = 4):
        super().__init__()
        self.heads, self.each, self.full = heads, each, full
        self.norm, self.to_qkv = Gained(c), nn.Conv2d(c, 3 * heads * each, 1, bias=False)
        sides = (memories, each) if full else (each, memories)
        self.mem_kv = nn.Parameter(torch.zeros(2, heads, *sides))
        conv = nn.Conv2d(heads * each, c, 1)
        self.to_out = conv if full else nn.Sequential(conv, Gained(c))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        memory = self.mem_kv.transpose(2, 3) if self.full else self.mem_kv
        heads = []
        for head in range(self.heads):
            rows = slice(head * self.each, (head + 1) * self.each)
            stored = memory[:, head][:, None].expand(-1, len(x), -1, -1)
            keys, values = torch.cat([stored[0], k[:, rows]], dim=2), torch.cat([stored[1], v[:, rows]], dim=2)
            if self.full:
                heads.append(scaled_softmax_mix(q[:, rows], keys, values))
                continue
            table = torch.einsum("bcn,bdn->bcd", keys.softmax(dim=2), values)
            query = q[:, rows].softmax(dim=1) / math.sqrt(self.each)
            heads.append(torch.einsum("bcd,bcn->bdn", table, query))
        mixed = torch.cat(heads, dim=1).unflatten(2, x.shape[2:])
        return x + self.to_out(mixed)


class FoldedPixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        squares = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return squares.reshape(b, 4 * c, h // 2, w // 2)


class LucidNet(nn.Module):
    """The class Unet of denoising-diffusion-pytorch."""

    def __init__(
        self,
        dim: int,
        multipliers: Sequence[int],
        colours: int = 3,
        first: int | None = None,
        full: Sequence[bool] | None = None,
        heads: Sequence[int] | None = None,
        each: Sequence[int] | None = None,
    ):
        super().__init__()
        count = len(multipliers)
        full, heads = full or [*[False] * (count - 1), True], heads or [4] * count
        each, self.dim = each or [32] * count, dim
        widths = [first or dim, *(dim * m for m in multipliers)]
        time = 4 * dim
        self.init_conv = nn.Conv2d(colours, widths[0], 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Identity(), nn.Linear(dim, time), nn.GELU(), nn.Linear(time, time))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level in range(count):
            now, after, last = widths[level], widths[level + 1], level == count - 1
            change = nn.Sequential(FoldedPixels(), nn.Conv2d(4 * now, after, 1))
            parts = [LucidBlock(now, now, time), LucidBlock(now, now, time)]
            parts += [LucidAttention(now, heads[level], each[level], full[level])]
            self.downs.append(nn.ModuleList([*parts, nn.Conv2d(now, after, 3, padding=1) if last else change]))
        now = widths[-1]
        self.mid_block1, self.mid_block2 = LucidBlock(now, now, time), LucidBlock(now, now, time)
        self.mid_attn = LucidAttention(now, heads[-1], each[-1], True)
        for level in reversed(range(count)):
            now, after = widths[level + 1], widths[level]
            conv = nn.Conv2d(now, after, 3, padding=1)
            parts = [LucidBlock(now + after, now, time), LucidBlock(now + after, now, time)]
            parts += [LucidAttention(now, heads[level], each[level], full[level])]
            self.ups.append(nn.ModuleList([*parts, nn.Sequential(nn.Identity(), conv) if level else conv]))
        self.final_res_block = LucidBlock(2 * widths[0], widths[0], time)
        self.final_conv = nn.Conv2d(widths[0], colours, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time_mlp(torch.cat(waves(t, self.dim, 1), dim=1))
        h = first = self.init_conv(x)
        skips = []
        for block1, block2, attention, change in self.downs:
            h = block1(h, time)
            skips.append(h)
            h = attention(block2(h, time))
            skips.append(h)
            h = change(h)
        h = self.mid_block2(self.mid_attn(self.mid_block1(h, time)), time)
        for block1, block2, attention, change in self.ups:
            h = block1(torch.cat([h, skips.pop()], dim=1), time)
            h = attention(block2(torch.cat([h, skips.pop()], dim=1), time))
            if isinstance(change, nn.Sequential):
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = change(h)
        return self.final_conv(self.final_res_block(torch.cat([h, first], dim=1), time))
