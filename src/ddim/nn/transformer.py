"""A compact transformer over tokens (Vaswani et al. 2017), conditioned by adaptive norms (Peebles & Xie 2023).

Rotary positions (Su et al. 2021), bidirectional attention, pre-norm blocks. The time conditioning is six vectors that
all blocks share, plus six learned vectors of each block (Chen et al. 2023, "adaLN-single").
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ddim._io import limits
from ddim.nn.base import Network, zero

_PARTS = 6  # shift, scale and gate, for attention and for the MLP


class TransformerConfig(BaseModel):
    """The architecture of a `Transformer`.

    Args:
        kind: Always "transformer".
        categories: Vocabulary size K, including the mask token if there is one.
        length: Tokens per sequence, L.
        width: Channels of a token; `2 * heads` must divide it.
        depth: Blocks.
        heads: Attention heads.
        mlp: Hidden channels of a block's MLP, in multiples of `width`.
        local: Kernel size of the two convolutions before the blocks, odd; 0 for no convolutions. On text they provide
            the letters around each letter, which attention is slow to learn.
        dropout: Dropout rate inside the blocks.
        classes: Number of labels, 0 for none. Label `classes` means "no label".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["transformer"] = "transformer"
    categories: int = Field(2, ge=2, le=limits.CATEGORIES + 1)
    length: int = Field(256, ge=1, le=limits.LENGTH)
    width: int = Field(192, ge=2, le=limits.WIDTH)
    depth: int = Field(4, ge=1, le=limits.DEPTH)
    heads: int = Field(4, ge=1)
    mlp: int = Field(4, ge=1, le=limits.MULTIPLE)
    local: int = Field(5, ge=0, le=limits.WIDTH)
    dropout: float = Field(0.0, ge=0, lt=1)
    classes: int = Field(0, ge=0, le=limits.CLASSES)

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.width % (2 * self.heads):
            raise ValueError(f"{self.heads} heads with an even number of channels do not divide width {self.width}")
        if self.local and self.local % 2 == 0:
            raise ValueError(f"local {self.local} is even; use an odd number, or 0")
        limits.check_parameters(self.parameters)
        return self

    @property
    def parameters(self) -> int:
        """An estimate of the number of parameters, without building the network."""
        square, ends = self.width**2, self.width * (2 * self.categories + self.classes)
        return (self.depth * (4 + 2 * self.mlp) + 10 + 2 * self.local) * square + ends

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (L,)."""
        return (self.length,)

    def build(self) -> Transformer:
        """The network, its weights drawn from the global generator."""
        return Transformer(self)

    def __str__(self) -> str:
        local = f", two convolutions over {self.local} tokens before them" if self.local else ""
        return f"transformer, {self.depth} blocks of width {self.width}, {self.heads} heads{local}"


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: channels (j, j + D/2) of the token at position l are rotated by l 10000^(-2j/D).

    Args:
        x: Queries or keys, (B, heads, L, D).

    Returns:
        A tensor of the same shape and dtype.
    """
    half = x.shape[-1] // 2
    rates = torch.exp(torch.arange(half, device=x.device, dtype=torch.float32) * (-math.log(10000) / half))
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Layer(nn.Module):
    """A block: attention and an MLP, each with an adaptive norm before and a gate after it; (B, L, D) to itself."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, hidden = config.width, config.mlp * config.width
        self.heads = config.heads
        self.own = nn.Parameter(torch.zeros(_PARTS, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(config.dropout)
        for last in (self.out, self.mlp_out):
            nn.init.zeros_(last.bias)
            last.weight.data /= math.sqrt(2 * config.depth)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The block's output; `condition` is (B or 1, 6, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (condition + self.own).unsqueeze(2).unbind(1)
        h = _norm(x) * (1 + scale1) + shift1
        b, length, width = h.shape
        q, k, v = self.qkv(h).view(b, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).reshape(b, length, width)
        x = x + (1 + gate1) * self.dropout(self.out(mixed))
        h = _norm(x) * (1 + scale2) + shift2
        return cast(Tensor, x + (1 + gate2) * self.dropout(self.mlp_out(F.silu(self.mlp_in(h)))))


class Transformer(Network):
    """The network: predicts the logits of p(x_0 | x_t), (B, L, K), from tokens x_t (B, L) and a time."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.classes + 1, width) if config.classes else None
        self.token = nn.Embedding(config.categories, width)
        self.local = _convolutions(width, config.local) if config.local else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.logits = zero(nn.Linear(width, config.categories))
        self.time_to_blocks = zero(nn.Linear(width, (_PARTS + 2) * width))

    @property
    def entry(self) -> nn.Module:
        """The embedding of tokens."""
        return self.token

    def body(self, x: Tensor, condition: Tensor) -> Tensor:
        """Everything but the time layers.

        Args:
            x: int64, (B, L).
            condition: The output of `condition`, (B or 1, 8 D).

        Returns:
            Logits, (B, L, K).
        """
        parts = condition.view(len(condition), _PARTS + 2, -1)
        h = self.token(x)
        if self.local is not None:
            h = h + self.local(h.mT).mT
        for layer in self.layers:
            h = layer(h, parts[:, :_PARTS])
        shift, scale = parts[:, _PARTS:].unsqueeze(2).unbind(1)
        return cast(Tensor, self.logits(_norm(h) * (1 + scale) + shift))


def _convolutions(width: int, size: int) -> nn.Sequential:
    first, second = (nn.Conv1d(width, width, size, padding=size // 2) for _ in range(2))
    return nn.Sequential(first, nn.SiLU(), second)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
