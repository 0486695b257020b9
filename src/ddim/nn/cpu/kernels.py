"""Float32 CPU kernels, compiled once with the machine's C++ compiler and cached, see `ddim.nn.cpu.library`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ddim.nn.cpu import library
from ddim.nn.cpu.library import Unavailable

PRODUCTS, NUMBERS = 4_000_000, 32_768  # work per thread, about 50 us; less is slower with another thread
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Kernels:
    """The kernels. Tensors are float32 and contiguous, images (B, H, W, C).

    Args:
        library: The compiled library.
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
        """Number of threads; results do not depend on it."""
        self.vector: int = library.ddim_vector()
        self.panel: int = library.ddim_panel()

    def _few(self, work: int, grain: int) -> int:
        """The number of threads for an amount of work, at least `grain` each."""
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
        """A direct convolution.

        Args:
            x: (B, H, W, C).
            weights: The output of `pack`.
            bias: (N,).
            out: The output, (B, Ho, Wo, N).
            side: Kernel size, 3 or 1.
            stride: 1 or 2.
            offset: Zero padding before the first row and column; the padding after the last follows from the shapes.
            up: Whether x is upsampled by 2, nearest neighbour.
            time: Added to the output, (B or 1, N), rows at any stride.
            residual: Added to the output, of the same shape; may be `out` itself.

        Returns:
            `out`.
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
        """A 3x3 convolution of stride 1 and padding 1 by Winograd's F(4x4, 3x3) (Lavin & Gray 2016).

        The arguments are those of `conv`, with `weights` the output of `pack_winograd`. C and N must be multiples of
        `vector`.
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
        """Group norm of x, or of x concatenated with other channels, and SiLU.

        Args:
            x: (B, H, W, C1).
            scale: (C,), where C is C1 plus the channels of `beside`; C and C1 must be multiples of `vector`.
            shift: (C,).
            groups: Number of groups.
            eps: Added to the variance.
            out: The output, (B, H, W, C).
            activate: Whether SiLU follows.
            beside: Channels concatenated after those of x, (B, H, W, C - C1), or None.
            both: Receives the concatenation of x and `beside`, (B, H, W, C), or None.
            modulation: (B or 1, 2 C), rows at any stride, or None: the normalised values are multiplied by 1 + the
                first half, and the second half is added.

        Returns:
            `out`.
        """
        b, h, w, c = out.shape
        beside_at, other = _at(beside), beside.shape[3] if beside is not None else 0
        at = (_at(x), beside_at, _at(scale), _at(shift), _at(modulation), _stride(modulation), _at(out), _at(both))
        threads = self._few(out.numel(), NUMBERS)
        self.library.ddim_norm(*at, b, h * w, c, other, groups, eps, int(activate), threads)
        return out

    def pack(self, weights: Tensor) -> Tensor:
        """Pack weights (N, C, side, side) for `conv`."""
        n, c, side, _ = weights.shape
        return self._panels(weights.permute(2, 3, 1, 0).reshape(side * side, c, n)).transpose(0, 1).contiguous()

    def pack_winograd(self, weights: Tensor) -> Tensor:
        """Transform and pack weights (N, C, 3, 3) for `winograd`: G g G^T, 36 numbers for 9."""
        rows = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
        rows += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
        G = torch.tensor(rows, dtype=torch.float64)
        n, c = weights.shape[:2]
        half = torch.matmul(weights.double(), G.T)  # (N, C, 3, 6)
        return self._panels(torch.matmul(G, half).permute(2, 3, 1, 0).reshape(36, c, n)).contiguous()

    def _panels(self, matrix: Tensor) -> Tensor:
        """Reshape (R, C, N) to (R, panels, C, panel), padded with zeros."""
        r, c, n = matrix.shape
        panels = -(-n // self.panel)
        full = torch.nn.functional.pad(matrix.float(), (0, panels * self.panel - n))
        return full.reshape(r, c, panels, self.panel).permute(0, 2, 1, 3)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stride(rows: Tensor | None) -> int:
    """The stride between the rows of two samples; 0 to broadcast a single row."""
    return 0 if rows is None or len(rows) == 1 else rows.stride(0)


def kernels() -> Kernels:
    """The kernels, compiled if they are not cached yet. The result, or the error, is the same for the whole process.

    Raises:
        Unavailable: If there is no C++ compiler, it fails, or the compiled kernels compute wrong numbers.
    """
    result = _outcome()
    if isinstance(result, str):
        raise Unavailable(result)
    return result


@functools.cache
def _outcome() -> Kernels | str:
    """The kernels, or the reason why they are unavailable."""
    try:
        return library.load(Path(__file__).with_suffix(".cpp"), _accept)
    except Unavailable as error:
        return str(error)


def _accept(built: ctypes.CDLL) -> Kernels:
    """The kernels of a library, after a test.

    Raises:
        Unavailable: If the library lacks the functions, or computes wrong numbers.
    """
    try:
        kernels = Kernels(built)
    except AttributeError:
        raise Unavailable("is another library") from None
    _verify(kernels)
    return kernels


def _verify(kernels: Kernels) -> None:
    """Compare the kernels with torch on a small case, because a compiler may be broken or a cached file damaged."""
    generator = torch.Generator().manual_seed(0)
    c = 2 * kernels.vector
    x = torch.randn(2, 5, 6, c, generator=generator)
    weights, bias = torch.randn(c, c, 3, 3, generator=generator), torch.randn(c, generator=generator)
    expected = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weights, bias, padding=1).permute(0, 2, 3, 1)
    normed = torch.nn.functional.silu(torch.nn.functional.group_norm(x.permute(0, 3, 1, 2), 2, bias, bias, 1e-6))
    results = (
        (kernels.conv(x, kernels.pack(weights), bias, torch.empty_like(x)), expected),
        (kernels.winograd(x, kernels.pack_winograd(weights), bias, torch.empty_like(x)), expected),
        (kernels.norm(x, bias, bias, 2, 1e-6, torch.empty_like(x)), normed.permute(0, 2, 3, 1)),
    )
    if not all(torch.allclose(actual, reference, rtol=1e-4, atol=1e-3) for actual, reference in results):
        raise Unavailable("computes wrong numbers")
