"""Our float32 kernels, built once by the machine's own C++ compiler and cached, see `ddim.nn.cpu.library`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ddim.nn.cpu import library
from ddim.nn.cpu.library import Unavailable

PRODUCTS, NUMBERS = 4_000_000, 32_768  # what is worth a thread: about 50 us
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Kernels:
    """The kernels. Tensors are float32, contiguous, pictures (B, H, W, C).

    Args:
        library: The built library.
    """

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.ddim_conv.argtypes = [_P] * 4 + [_L] + [_P] * 2 + [_L] * 7 + [_I] * 5
        library.ddim_winograd.argtypes = [_P] * 4 + [_L] + [_P] * 3 + [_L] * 5 + [_I] * 2
        library.ddim_winograd_scratch.argtypes, library.ddim_winograd_scratch.restype = [_L] * 5 + [_I], _L
        library.ddim_norm.argtypes = [_P] * 5 + [_L] + [_P] * 2 + [_L] * 5 + [ctypes.c_float] + [_I] * 2
        for name in ("ddim_conv", "ddim_winograd", "ddim_norm"):
            getattr(library, name).restype = None
        self.threads = torch.get_num_threads()
        """How many threads compute; no result depends on it."""
        self.vector: int = library.ddim_vector()
        self.panel: int = library.ddim_panel()

    def _few(self, work: int, grain: int) -> int:
        """As many threads as there is work for."""
        return max(1, min(self.threads, work // grain))

    def conv(
        self,
        x: Tensor,
        weights: Tensor,
        bias: Tensor,
        out: Tensor,
        side: int = 3,
        stride: int = 1,
        offset: int = 1,
        up: bool = False,
        time: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """A convolution, directly.

        Args:
            x: (B, H, W, C).
            weights: What `pack` made.
            bias: (N,).
            out: (B, Ho, Wo, N), written.
            side: 3 or 1.
            stride: 1 or 2.
            offset: Zeros before the first row and column; after the last come as many as are needed.
            up: Whether x is read at twice its size, nearest neighbour.
            time: (B or 1, N), rows at any stride, added.
            residual: The shape of `out`, added; may be `out` itself.
        """
        (b, h, w, c), (_, ho, wo, n) = x.shape, out.shape
        at = (_at(x), _at(weights), _at(bias), _at(time), _stride(time), _at(residual), _at(out))
        threads = self._few(2 * b * ho * wo * n * c * side**2, PRODUCTS)
        self.library.ddim_conv(*at, b, h, w, c, n, ho, wo, side, stride, offset, int(up), threads)
        return out

    def winograd(
        self,
        x: Tensor,
        weights: Tensor,
        bias: Tensor,
        out: Tensor,
        up: bool = False,
        time: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """A 3x3 convolution of stride 1 and padding 1 by Winograd's F(4x4, 3x3) (Lavin & Gray 2016); see `conv`.

        `weights` are what `pack_winograd` made; C and N must be multiples of `vector`.
        """
        (b, h, w, n), c = out.shape, x.shape[3]
        threads = self._few(2 * b * h * w * n * c * 36 // 16, PRODUCTS)
        scratch = torch.empty(self.library.ddim_winograd_scratch(b, h, w, c, n, threads))
        at = (_at(x), _at(weights), _at(bias), _at(time), _stride(time), _at(residual), _at(out), _at(scratch))
        self.library.ddim_winograd(*at, b, h, w, c, n, int(up), threads)
        return out

    def norm(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        groups: int,
        eps: float,
        out: Tensor,
        activate: bool = True,
        beside: Tensor | None = None,
        both: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """Group norm, and SiLU after it.

        Args:
            x: (B, H, W, C1).
            scale: (C,), C being C1 and the channels of `beside`; a multiple of `vector`, as is C1.
            shift: (C,).
            groups: Groups of channels.
            eps: What is added to the variance.
            out: (B, H, W, C), written.
            activate: Whether SiLU follows.
            beside: (B, H, W, C - C1), channels that stand behind x's.
            both: (B, H, W, C), where both are to be written side by side, as they are.
            modulation: (B or 1, 2 C), rows at any stride: what is normed is multiplied with 1 + the first half, and the
                second is added.
        """
        b, h, w, c = out.shape
        beside_at, other = _at(beside), beside.shape[3] if beside is not None else 0
        at = (_at(x), beside_at, _at(scale), _at(shift), _at(modulation), _stride(modulation), _at(out), _at(both))
        threads = self._few(out.numel(), NUMBERS)
        self.library.ddim_norm(*at, b, h * w, c, other, groups, eps, int(activate), threads)
        return out

    def pack(self, weights: Tensor) -> Tensor:
        """Weights (N, C, side, side) as `conv` takes them."""
        n, c, side, _ = weights.shape
        return self._panels(weights.permute(2, 3, 1, 0).reshape(side * side, c, n)).transpose(0, 1).contiguous()

    def pack_winograd(self, weights: Tensor) -> Tensor:
        """Weights (N, C, 3, 3) as `winograd` takes them: G g G^T, 36 numbers for 9."""
        rows = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
        rows += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
        G = torch.tensor(rows, dtype=torch.float64)
        n, c = weights.shape[:2]
        half = torch.matmul(weights.double(), G.T)  # (N, C, 3, 6)
        return self._panels(torch.matmul(G, half).permute(2, 3, 1, 0).reshape(36, c, n)).contiguous()

    def _panels(self, matrix: Tensor) -> Tensor:
        """(R, C, N) as (R, panels, C, panel), filled up with zeros."""
        r, c, n = matrix.shape
        panels = -(-n // self.panel)
        full = torch.nn.functional.pad(matrix.float(), (0, panels * self.panel - n))
        return full.reshape(r, c, panels, self.panel).permute(0, 2, 1, 3)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stride(rows: Tensor | None) -> int:
    """What lies between the rows of two samples; 0 where one row is all samples'."""
    return 0 if rows is None or len(rows) == 1 else rows.stride(0)


def kernels() -> Kernels:
    """The kernels, built if they are not in the cache yet; whatever comes of it holds for the whole process.

    Raises:
        Unavailable: If there is no C++ compiler, it fails, or what it built computes wrong numbers.
    """
    made = _outcome()
    if isinstance(made, str):
        raise Unavailable(made)
    return made


@functools.cache
def _outcome() -> Kernels | str:
    """The kernels, or why there are none."""
    try:
        return library.load(Path(__file__).with_suffix(".cpp"), _sound)
    except Unavailable as error:
        return str(error)


def _sound(built: ctypes.CDLL) -> Kernels:
    """The kernels of a library.

    Raises:
        Unavailable: If it is another library, or computes wrong numbers.
    """
    try:
        made = Kernels(built)
    except AttributeError:
        raise Unavailable("is another library") from None
    _try(made)
    return made


def _try(kernels: Kernels) -> None:
    """Hold the kernels against torch on a small case: a compiler may be broken, a cache too."""
    generator = torch.Generator().manual_seed(0)
    c = 2 * kernels.vector
    x = torch.randn(2, 5, 6, c, generator=generator)
    weights, bias = torch.randn(c, c, 3, 3, generator=generator), torch.randn(c, generator=generator)
    expected = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weights, bias, padding=1).permute(0, 2, 3, 1)
    normed = torch.nn.functional.silu(torch.nn.functional.group_norm(x.permute(0, 3, 1, 2), 2, bias, bias, 1e-6))
    made = (
        (kernels.conv(x, kernels.pack(weights), bias, torch.empty_like(x)), expected),
        (kernels.winograd(x, kernels.pack_winograd(weights), bias, torch.empty_like(x)), expected),
        (kernels.norm(x, bias, bias, 2, 1e-6, torch.empty_like(x)), normed.permute(0, 2, 3, 1)),
    )
    if not all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3) for ours, theirs in made):
        raise Unavailable("computes wrong numbers")
