"""The DDPM U-Net (Ho et al. 2020): group norm, SiLU, attention at chosen resolutions, sinusoidal time embedding.

`UNet.condition` computes everything that depends on time alone, once per time; the graph of `UNet.body`, the rest of
the network, does not depend on the time.
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
from ddim._io.terminal import counted
from ddim.nn.base import Network, network_time, sinusoidal, zero
from ddim.nn.blocks import Attention, Block, Down, Norm, Up


class UNetConfig(BaseModel):
    """The architecture of a `UNet`. The defaults are the 35.7 M-parameter CIFAR-10 network of Ho et al.

    Args:
        kind: Always "unet".
        in_channels: Image channels.
        height: Image height; `patch * 2^(levels - 1)` must divide it.
        width: Image width; `patch * 2^(levels - 1)` must divide it.
        channels: Channels of the first level.
        multipliers: Channels of each level, in multiples of `channels`.
        blocks: Residual blocks per level of the encoder (the decoder has one more).
        attention: Resolutions (height after patching) at which blocks are followed by self-attention.
        middle_attention: Whether the middle has attention.
        heads: Attention heads.
        groups: Group-norm groups; must divide every level's channels.
        dropout: Dropout rate inside the blocks.
        patch: Side of the square of pixels that becomes one position (1 for no patching).
        classes: Number of labels, 0 for none. Label `classes` means "no label".
        categories: 0 for real-valued images; else the number of values of a channel, including the mask if there is
            one, and the network is a `CategoricalUNet`.
        norm_eps: Added to the variance in group norm.
        head_channels: Channels per attention head, instead of `heads`; 0 to use `heads`.
        padding: Padding of strided convolutions: at the "far" edges (Ho et al.) or at "both".
        embedding: The order of the time embedding's halves.
        embedding_shift: With 1 the lowest frequency is 1/10000 of the highest, with 0 one step above.
        time_scale: Factor of t - 1 before it is embedded.
        scale_shift: Whether time scales and shifts a block's second norm instead of being added before it.
        resample: Whether the resolution changes in a convolution ("conv") or in a residual block ("block").
        learned_variance: Whether the output has twice the channels; the second half interpolates the log-variance of a
            step between its bounds (Nichol & Dhariwal 2021).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["unet"] = "unet"
    in_channels: int = Field(3, ge=1, le=limits.WIDTH)
    height: int = Field(32, ge=1)
    width: int = Field(32, ge=1)
    channels: int = Field(128, ge=4, le=limits.WIDTH, multiple_of=2)
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = Field(2, ge=1, le=limits.BLOCKS)
    attention: tuple[int, ...] = (16,)
    middle_attention: bool = True
    heads: int = Field(1, ge=1)
    groups: int = Field(32, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    patch: int = Field(1, ge=1)
    classes: int = Field(0, ge=0, le=limits.CLASSES)
    categories: int = Field(0, ge=0, le=256)
    norm_eps: float = Field(1e-6, gt=0, allow_inf_nan=False)
    head_channels: int = Field(0, ge=0)
    padding: Literal["far", "both"] = "far"
    embedding: Literal["sin-cos", "cos-sin"] = "sin-cos"
    embedding_shift: Literal[0, 1] = 1
    time_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    scale_shift: bool = False
    resample: Literal["conv", "block"] = "conv"
    learned_variance: bool = False

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError("multipliers must be integers >= 1")
        limits.check_levels(self.multipliers)
        limits.check_pixels(self.height, self.width)
        factor = self.patch * 2 ** (len(self.multipliers) - 1)
        if self.height % factor or self.width % factor:
            raise ValueError(f"{self.height}x{self.width} is not divisible by {factor} (patch times 2^(levels - 1))")
        sides = [self.height // self.patch // 2**level for level in range(len(self.multipliers))]
        for side in self.attention:
            if side not in sides:
                raise ValueError(f"no level has the attention resolution {side}; they have {sides}")
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.groups:
                raise ValueError(f"{self.groups} groups do not divide {self.channels * multiplier} channels")
            if self.channels * multiplier % (self.head_channels or self.heads):
                heads = f"{self.heads} heads" if not self.head_channels else f"heads of {self.head_channels}"
                raise ValueError(f"{heads} do not divide {self.channels * multiplier} channels")
        if self.learned_variance and self.categories:
            raise ValueError("discrete data have no learned variance")
        limits.check_parameters(self.parameters)
        return self

    @property
    def parameters(self) -> int:
        """An estimate of the number of parameters, without building the network."""
        widths, embedding = [self.channels * multiplier for multiplier in self.multipliers], 4 * self.channels
        ends = self.in_channels * self.patch**2 * max(1, self.categories) * (3 if self.learned_variance else 2)
        attended = [self.height // self.patch >> level in self.attention for level in range(len(widths))]
        labels = self.classes * embedding + 2 * self.categories**2
        return limits.unet_parameters(widths, self.blocks, embedding, ends, attended) + labels

    def heads_of(self, width: int) -> int:
        """Number of attention heads at `width` channels."""
        return width // self.head_channels if self.head_channels else self.heads

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W)."""
        return (self.in_channels, self.height, self.width)

    def build(self) -> UNet | CategoricalUNet:
        """The network, its weights drawn from the global generator."""
        return CategoricalUNet(self) if self.categories else UNet(self)

    def __str__(self) -> str:
        blocks = counted(self.blocks, "blocks")
        text = f"U-Net, {self.channels} channels x {list(self.multipliers)}, {blocks}, patch {self.patch}, "
        return text + f"attention at {list(self.attention)}" + (f", {self.categories} ids" if self.categories else "")


class UNet(Network):
    """The network: predicts eps, x_0 or v, whichever it was trained for, from x_t and a time."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c, channels = config, [config.channels * m for m in config.multipliers]
        embedding = 4 * c.channels
        self.time = nn.Sequential(nn.Linear(c.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(c.classes + 1, embedding) if c.classes else None
        self.conv_in = nn.Conv2d(c.in_channels * c.patch**2, c.channels, 3, padding=1)
        self.widths: list[int] = []
        side, now, skips = c.height // c.patch, c.channels, [c.channels]
        self.down_blocks, self.down_attention, self.downs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(channels):
            for _ in range(c.blocks):
                self.down_blocks.append(self._block(now, width))
                self.down_attention.append(self._attention(width, side in c.attention))
                now = width
                skips.append(now)
            if level < len(channels) - 1:
                in_block = c.resample == "block"
                self.downs.append(self._block(now, now, "down") if in_block else Down(now, c.padding))
                skips.append(now)
                side //= 2
        self.middle = nn.ModuleList([self._block(now, now), self._block(now, now)])
        self.middle_attention = self._attention(now, c.middle_attention)
        self.up_blocks, self.up_attention, self.ups = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            for _ in range(c.blocks + 1):
                self.up_blocks.append(self._block(now + skips.pop(), width))
                self.up_attention.append(self._attention(width, side in c.attention))
                now = width
            if level:
                self.ups.append(self._block(now, now, "up") if c.resample == "block" else Up(now))
                side *= 2
        self.norm_out = Norm(c.groups, now, eps=c.norm_eps)
        out = c.in_channels * c.patch**2 * (2 if c.learned_variance else 1)
        self.conv_out = zero(nn.Conv2d(now, out, 3, padding=1))
        self.time_to_blocks = nn.Linear(embedding, sum(self.widths))

    def _block(self, c_in: int, c_out: int, resample: str = "") -> Block:
        c = self.config
        self.widths.append(2 * c_out if c.scale_shift else c_out)
        return Block(c_in, c_out, c.groups, c.dropout, c.norm_eps, c.scale_shift, resample)

    def _attention(self, width: int, present: bool) -> nn.Module:
        c = self.config
        return Attention(width, c.groups, c.heads_of(width), c.norm_eps) if present else nn.Identity()

    @override
    def embed(self, t: Tensor) -> Tensor:
        c = self.config
        return sinusoidal(network_time(t) * c.time_scale, c.channels, c.embedding == "cos-sin", c.embedding_shift)

    @property
    def entry(self) -> nn.Module:
        """The first convolution."""
        return self.conv_in

    def enter(self, x: Tensor) -> Tensor:
        """Convert images to the body's dtype and channels-last memory."""
        return x.to(self.conv_in.weight.dtype, memory_format=torch.channels_last)

    def body(self, x: Tensor, condition: Tensor) -> Tensor:
        """Everything but the time layers.

        Args:
            x: (B, C, H, W).
            condition: The output of `condition`, (B or 1, sum of widths), in the dtype of x.

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with learned variance, the prediction first.
        """
        times = iter(torch.split(condition, self.widths, dim=1))
        h = self.conv_in(F.pixel_unshuffle(x, self.config.patch) if self.config.patch > 1 else x)
        if self.norm_out.fused:  # cuDNN may return NCHW for one input channel, and later layers preserve it
            h = h.contiguous(memory_format=torch.channels_last)
        skips = [h]
        index, levels = 0, len(self.config.multipliers)
        for level in range(levels):
            for _ in range(self.config.blocks):
                h = self.down_attention[index](self.down_blocks[index](h, next(times)))
                skips.append(h)
                index += 1
            if level < levels - 1:
                h = self._resampled(self.downs[level], h, times)
                skips.append(h)
        h = self.middle_attention(self.middle[0](h, next(times)))
        h = self.middle[1](h, next(times))
        index = 0
        for level in range(levels):
            for _ in range(self.config.blocks + 1):
                h = self.up_attention[index](self.up_blocks[index](torch.cat([h, skips.pop()], dim=1), next(times)))
                index += 1
            if level < levels - 1:
                h = self._resampled(self.ups[level], h, times)
        h = self.conv_out(self.norm_out.then(h))
        return F.pixel_shuffle(h, self.config.patch) if self.config.patch > 1 else cast(Tensor, h)

    @staticmethod
    def _resampled(part: nn.Module, h: Tensor, times: Iterator[Tensor]) -> Tensor:
        return cast(Tensor, part(h, next(times)) if isinstance(part, Block) else part(h))


class CategoricalUNet(Network):
    """A U-Net over quantised images: predicts the logits of p(x_0 | x_t) from ids x_t (B, C, H, W) and a time.

    Each id is embedded in K dimensions, so the inner U-Net has C K input and output channels.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.categories, config.categories)
        inside = {"in_channels": config.in_channels * config.categories, "categories": 0}
        self.unet = UNet(config.model_copy(update=inside))

    @property
    def time(self) -> nn.Sequential:  # type: ignore[override]
        """The time layers of the inner U-Net."""
        return self.unet.time

    @property
    def label(self) -> nn.Embedding | None:  # type: ignore[override]
        """The label embedding of the inner U-Net."""
        return self.unet.label

    @property
    def time_to_blocks(self) -> nn.Linear:  # type: ignore[override]
        """The last time layer of the inner U-Net."""
        return self.unet.time_to_blocks

    @override
    def embed(self, t: Tensor) -> Tensor:
        return self.unet.embed(t)

    @property
    def entry(self) -> nn.Module:
        """The embedding of ids."""
        return self.token

    def body(self, x: Tensor, condition: Tensor) -> Tensor:
        """Everything but the time layers.

        Args:
            x: int64, (B, C, H, W).
            condition: The output of `condition`, in the dtype of the body.

        Returns:
            Logits, (B, C, H, W, K).
        """
        b, c, h, w = x.shape
        inner = self.token(x).permute(0, 1, 4, 2, 3).reshape(b, -1, h, w)
        out = self.unet.body(inner.contiguous(memory_format=torch.channels_last), condition)
        return out.reshape(b, c, self.config.categories, h, w).permute(0, 1, 3, 4, 2)
