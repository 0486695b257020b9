"""The body of a `UNet` computed by the float32 kernels: the same network with its weights packed once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.nn.blocks import Attention, Block, Down, Up
from ddim.nn.cpu.kernels import Kernels
from ddim.nn.cpu.threads import Buffers, ThreadTuner
from ddim.nn.unet import UNet


def fits(network: nn.Module, vector: int) -> bool:
    """Whether the kernels support a network: a U-Net whose channel numbers are multiples of the vector length."""
    if not isinstance(network, UNet):
        return False
    c = network.config
    return all(c.channels * m % vector == 0 for m in (1, *c.multipliers))


class Conv:
    """A convolution with packed weights, by the algorithm that is faster at the resolution of its output.

    Args:
        kernels: The kernels.
        layer: A convolution, or a linear layer, which is treated as a 1x1 convolution.
        height: Height of its output.
        width: Width of its output.
        up: Whether the input is upsampled by 2.
        offset: Zero padding before the first row and column; half the kernel size if None.
    """

    def __init__(
        self,
        kernels: Kernels,
        layer: nn.Conv2d | nn.Linear,
        height: int,
        width: int,
        up: bool = False,
        offset: int | None = None,
    ):
        weights = layer.weight if isinstance(layer, nn.Conv2d) else layer.weight[:, :, None, None]
        self.kernels, self.height, self.width, self.up = kernels, height, width, up
        n, c, self.side, _ = weights.shape
        self.stride = layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
        self.offset = self.side // 2 if offset is None else offset
        self.channels = n
        self.bias = cast(Tensor, layer.bias).float().contiguous()
        fits = self.side == 3 and self.stride == 1 and c % kernels.vector == n % kernels.vector == 0
        # Winograd reads 36 weights instead of 9: that is faster from 16 tiles per image on, or from 4 if they fit into
        # a cache. The choice must not depend on the batch size, because a sample's bits must not.
        tiles, small = -(-height // 4) * -(-width // 4), 36 * 4 * c * n <= 5 << 20
        self.winograd = fits and (tiles >= 16 or (tiles >= 4 and small))
        self.weights = kernels.pack_winograd(weights) if self.winograd else kernels.pack(weights)

    def __call__(
        self,
        x: Tensor,
        buffers: Buffers,
        time: Tensor | None = None,
        residual: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """The output, (B, H, W, N), written to `into`, which may be the residual, or to a buffer."""
        out = buffers.acquire(len(x), self.height, self.width, self.channels) if into is None else into
        if self.winograd:
            return self.kernels.winograd(x, self.weights, self.bias, out, self.up, time, residual)
        at = (self.side, self.stride, self.offset, self.up)
        return self.kernels.conv(x, self.weights, self.bias, out, *at, time, residual)


class Norm:
    """Group norm, with or without SiLU."""

    def __init__(self, kernels: Kernels, layer: nn.GroupNorm, activate: bool = True):
        self.kernels, self.groups, self.eps, self.activate = kernels, layer.num_groups, layer.eps, activate
        self.scale, self.shift = (cast(Tensor, t).detach().float().contiguous() for t in (layer.weight, layer.bias))

    def __call__(self, x: Tensor, buffers: Buffers, **others: Any) -> Tensor:
        """The output, (B, H, W, C); `others` are passed to `Kernels.norm`."""
        out = buffers.acquire(*x.shape[:3], len(self.scale))
        return self.kernels.norm(x, self.scale, self.shift, self.groups, self.eps, out, self.activate, **others)


class _Block:
    """`ddim.nn.blocks.Block` with the kernels; `height` and `width` are those of the output."""

    def __init__(self, kernels: Kernels, block: Block, height: int, width: int):
        self.scale_shift, self.resample = block.scale_shift, block.resample
        self.norm1, self.norm2 = Norm(kernels, block.norm1), Norm(kernels, block.norm2)
        self.conv1 = Conv(kernels, block.conv1, height, width, up=block.resample == "up")
        self.conv2 = Conv(kernels, block.conv2, height, width)
        self.skip = Conv(kernels, block.skip, height, width) if isinstance(block.skip, nn.Conv2d) else None

    def __call__(self, x: Tensor, time: Tensor, buffers: Buffers, beside: Tensor | None = None) -> Tensor:
        """The block's output for x (B, H, W, C), concatenated with `beside`; neither is released."""
        both = None if beside is None else buffers.acquire(*x.shape[:3], x.shape[3] + beside.shape[3])
        h = self.norm1(x, buffers, beside=beside, both=both)
        unnormed = x if both is None else both
        pooled = None
        if self.resample == "down":
            wide, h, pooled = h, _halved(h, buffers), _halved(unnormed, buffers)
            unnormed = pooled
            buffers.release(wide)
        elif self.resample == "up":
            unnormed = unnormed.repeat_interleave(2, 1).repeat_interleave(2, 2)
        middle = self.conv1(h, buffers, None if self.scale_shift else time)
        buffers.release(h)
        h = self.norm2(middle, buffers, modulation=time if self.scale_shift else None)
        # The skip convolution overwrites `middle`, which has its shape and is not needed any more.
        residual = self.skip(unnormed, buffers, into=middle) if self.skip else unnormed
        out = self.conv2(h, buffers, None, residual, residual if self.skip else middle)
        buffers.release(h, both, pooled)
        return out


class _Attention:
    """`ddim.nn.blocks.Attention` with the kernels."""

    def __init__(self, kernels: Kernels, attention: Attention, height: int, width: int):
        self.heads = attention.heads
        self.norm = Norm(kernels, attention.norm, activate=False)
        self.qkv = Conv(kernels, attention.qkv, height, width)
        self.out = Conv(kernels, attention.out, height, width)

    def __call__(self, x: Tensor, buffers: Buffers) -> Tensor:
        """x plus the attention output, written to x."""
        b, height, width, c = x.shape
        h = self.norm(x, buffers)
        mixed = self.qkv(h, buffers)
        q, k, v = mixed.view(b, height * width, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        buffers.release(h)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height, width, c)
        buffers.release(mixed)
        return self.out(attended, buffers, residual=x, into=x)


class NativeUNet:
    """A U-Net's body, called like `UNet.body` and equal to it up to rounding, about 1e-5 of the output.

    A sample's bits depend neither on the batch nor on the number of threads.

    Args:
        network: The network, float32, on a CPU, that `fits` accepts.
        kernels: The kernels.
    """

    def __init__(self, network: UNet, kernels: Kernels):
        self.network, self.kernels, self.pool = network, kernels, [Buffers()]
        self.tuners: dict[tuple[int, int], ThreadTuner] = {}
        c, last = network.config, len(network.config.multipliers) - 1
        sizes = [(c.height // c.patch >> level, c.width // c.patch >> level) for level in range(last + 1)]
        self.conv_in = Conv(kernels, network.conv_in, *sizes[0])
        self.down = self._levels(network.down_blocks, network.down_attention, sizes, c.blocks)
        self.downs = [self._resampled(part, *size) for part, size in zip(network.downs, sizes[1:], strict=True)]
        first, second = (_Block(kernels, cast(Block, part), *sizes[-1]) for part in network.middle)
        self.middle = [(first, self._attention(network.middle_attention, *sizes[-1])), (second, None)]
        self.up = self._levels(network.up_blocks, network.up_attention, sizes[::-1], c.blocks + 1)
        self.ups = [self._resampled(part, *size) for part, size in zip(network.ups, sizes[-2::-1], strict=True)]
        self.norm_out = Norm(kernels, network.norm_out)
        self.conv_out = Conv(kernels, network.conv_out, *sizes[0])

    def __call__(self, x: Tensor, condition: Tensor) -> Tensor:
        """The output of `UNet.body`; if a gradient is needed, it is computed by the network itself."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self.network.body(x, condition)
        try:
            buffers = self.pool.pop()  # buffers are used by one thread at a time
        except IndexError:
            buffers = Buffers()
        patch, most = self.network.config.patch, torch.get_num_threads()
        tuner = self.tuners.setdefault((len(x), most), ThreadTuner(most))
        threads, started = tuner.threads(), time.perf_counter()
        with torch.no_grad(), _threads(threads, most):
            self.kernels.threads = threads
            x = F.pixel_unshuffle(x, patch) if patch > 1 else x
            out = self._body(x.permute(0, 2, 3, 1).contiguous(), condition, buffers)
            result = out.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
            buffers.release(out)
            result = F.pixel_shuffle(result, patch) if patch > 1 else result
        tuner.took(threads, time.perf_counter() - started)
        self.pool.append(buffers)
        return result

    def _body(self, x: Tensor, condition: Tensor, buffers: Buffers) -> Tensor:
        times = iter(torch.split(condition, self.network.widths, dim=1))
        h = self.conv_in(x, buffers)
        skips = [h]
        for level, steps in enumerate(self.down):
            for step in steps:
                h = self._run(step, h, times, buffers)
                skips.append(h)
            if level < len(self.downs):
                h = self._change(self.downs[level], h, times, buffers)
                skips.append(h)
        for step in self.middle:
            last, h = h, self._run(step, h, times, buffers)
            if last is not skips[-1]:
                buffers.release(last)
        for level, steps in enumerate(self.up):
            for step in steps:
                last, beside = h, skips.pop()
                h = self._run(step, h, times, buffers, beside)
                buffers.release(last, beside)
            if level < len(self.ups):
                last, h = h, self._change(self.ups[level], h, times, buffers)
                buffers.release(last)
        normed = self.norm_out(h, buffers)
        out = self.conv_out(normed, buffers)
        buffers.release(h, normed)
        return out

    @staticmethod
    def _run(
        step: tuple[_Block, _Attention | None],
        h: Tensor,
        times: Iterator[Tensor],
        buffers: Buffers,
        beside: Tensor | None = None,
    ) -> Tensor:
        block, attention = step
        h = block(h, next(times), buffers, beside)
        return attention(h, buffers) if attention else h

    @staticmethod
    def _change(part: _Block | Conv, h: Tensor, times: Iterator[Tensor], buffers: Buffers) -> Tensor:
        return part(h, next(times), buffers) if isinstance(part, _Block) else part(h, buffers)

    def _levels(
        self, blocks: nn.ModuleList, attention: nn.ModuleList, sizes: list[tuple[int, int]], per_level: int
    ) -> list[list[tuple[_Block, _Attention | None]]]:
        levels = []
        for level, size in enumerate(sizes):
            indices = range(level * per_level, (level + 1) * per_level)
            built = [_Block(self.kernels, cast(Block, blocks[i]), *size) for i in indices]
            levels.append(
                [(block, self._attention(attention[i], *size)) for block, i in zip(built, indices, strict=True)]
            )
        return levels

    def _attention(self, part: nn.Module, height: int, width: int) -> _Attention | None:
        return _Attention(self.kernels, part, height, width) if isinstance(part, Attention) else None

    def _resampled(self, part: nn.Module, height: int, width: int) -> _Block | Conv:
        if isinstance(part, Block):
            return _Block(self.kernels, part, height, width)
        assert isinstance(part, Down | Up)
        offset = 0 if isinstance(part, Down) and part.far else 1
        return Conv(self.kernels, part.conv, height, width, isinstance(part, Up), offset)


@contextlib.contextmanager
def _threads(number: int, most: int) -> Iterator[None]:
    """Set the number of threads of torch's kernels within the context."""
    if number == most:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(most)


def _halved(x: Tensor, buffers: Buffers) -> Tensor:
    """2x2 average pooling: (B, H, W, C) to (B, H/2, W/2, C)."""
    b, h, w, c = x.shape
    return torch.mean(x.view(b, h // 2, 2, w // 2, 2, c), (2, 4), out=buffers.acquire(b, h // 2, w // 2, c))
