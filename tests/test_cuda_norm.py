"""The fused group norm for CUDA against PyTorch's in float64; by Triton's interpreter where there is no GPU.

Without a GPU it needs Triton and TRITON_INTERPRET=1 in the environment, and is skipped otherwise.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (CUDA or INTERPRETED):
    pytest.skip("needs Triton, and a CUDA GPU or TRITON_INTERPRET=1", allow_module_level=True)

from ddim.nn import cuda_norm  # noqa: E402
from ddim.nn.blocks import fuse_norms  # noqa: E402
from models import new_network, tiny_network  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# Where the CIFAR-10 network norms: (channels, side).
CIFAR10 = [(c, 32) for c in (128, 256, 384)] + [(c, 16) for c in (128, 256, 384, 512)]
CIFAR10 += [(c, side) for c in (256, 512) for side in (8, 4)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, own: bool = True) -> dict[str, Any]:
    n, c = shape[:2]
    rows = n if own else 1
    return {
        "x": randn(*shape, dtype=dtype).to(memory_format=torch.channels_last),
        "weight": randn(c, seed=1, dtype=dtype),
        "bias": randn(c, seed=2, dtype=dtype),
        "time": randn(rows, 3 * c, seed=3, dtype=dtype)[:, c : 2 * c],  # a part of all blocks' times
        "offset": randn(c, seed=4, dtype=dtype),
        "scale_shift": randn(rows, 3 * c, seed=5, dtype=dtype)[:, : 2 * c],
    }


def reference(groups: int, eps: float, silu: bool, **tensors: Any) -> Tensor:
    """The same in float64, from PyTorch's operators."""
    x, weight, bias, time, offset, scale_shift = (
        None if tensors.get(name) is None else tensors[name].double()
        for name in ("x", "weight", "bias", "time", "offset", "scale_shift")
    )
    x = x if time is None else x + time[:, :, None, None]
    x = x if offset is None else x + offset[:, None, None]
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale_shift is not None:
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def check(groups: int, silu: bool = True, eps: float = 1e-6, **tensors: Any) -> None:
    actual = cuda_norm.group_norm(groups=groups, eps=eps, silu=silu, **tensors)
    x = tensors["x"]
    assert actual.dtype == x.dtype
    assert actual.shape == x.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(actual.double(), reference(groups, eps, silu, **tensors), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("channels", "side"), CIFAR10)
def test_equals_group_norm_at_every_shape_of_the_cifar10_network(channels: int, side: int) -> None:
    tensors = inputs((2, channels, side, side), torch.bfloat16, own=False)
    check(32, **{name: tensors[name] for name in ("x", "weight", "bias")})
    check(32, **{name: tensors[name] for name in ("x", "weight", "bias", "time", "offset")})


@pytest.mark.parametrize("mode", ["resident", "looped", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_all_fused_operations(
    mode: str, dtype: torch.dtype, own: bool, silu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_norm, "RESIDENT", 256 if mode == "resident" else 16)
    monkeypatch.setattr(cuda_norm, "ENOUGH", 1 if mode == "looped" else 1024)
    shape = (3, 96, 13, 11)
    tiles = cuda_norm.tiling(3, 96, 143, 8)
    assert (tiles.splits > 1, tiles.block_p >= 143) == {
        "resident": (False, True),
        "looped": (False, False),
        "split": (True, False),
    }[mode]
    tensors = inputs(shape, dtype, own)
    check(8, silu, **tensors)
    for name in ("time", "offset", "scale_shift"):
        check(8, silu, **{**tensors, name: None})


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 2), 1),
        ((2, 6, 5, 3), 3),
        ((1, 100, 7, 9), 1),
        ((1, 35, 40, 3), 7),
        ((2, 40, 17, 19), 40),
        ((1, 1536, 3, 3), 2),
        ((1, 72, 33, 31), 24),
        ((1, 20, 70, 70), 5),
    ],
)
@pytest.mark.parametrize("enough", [1, 10**6])
def test_odd_sizes(shape: tuple[int, ...], groups: int, enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_norm, "ENOUGH", enough)
    check(groups, **inputs(shape))


@pytest.mark.parametrize("mode", ["resident", "looped", "split"])
def test_a_large_mean_loses_no_precision(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sums of squares about zero, float32 would lose a spread of 10^-4 of the mean."""
    monkeypatch.setattr(cuda_norm, "RESIDENT", 1024 if mode == "resident" else 16)
    monkeypatch.setattr(cuda_norm, "ENOUGH", 1 if mode == "looped" else 1024)
    x = (randn(1, 32, 24, 24) + 1e4).to(memory_format=torch.channels_last)
    weight, bias = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    actual = cuda_norm.group_norm(x, weight, bias, 4, 1e-6)
    torch.testing.assert_close(
        actual.double(), reference(4, 1e-6, False, x=x, weight=weight, bias=bias), rtol=0, atol=5e-3
    )


@pytest.mark.parametrize("shape", [(2, 128, 8, 8), (3, 5, 7, 9), (1, 300, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = (randn(*shape, seed=seed, dtype=dtype).to(memory_format=torch.channels_last) for seed in (0, 1))
    bias, other = (randn(shape[1], seed=seed, dtype=dtype) for seed in (2, 3))
    for more in (None, other):
        actual = cuda_norm.residual(a, b, bias, more)
        expected = a.double() + b.double() + (bias if more is None else bias.double() + more.double())[:, None, None]
        torch.testing.assert_close(
            actual, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
        assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("changes", [{}, {"scale_shift": True, "resample": "block"}])
def test_a_network_with_fused_norms_is_the_same(changes: dict[str, Any]) -> None:
    config = tiny_network(**changes)
    network = new_network(config).to(DEVICE).eval().requires_grad_(False).cast_body(torch.float32)
    x, t = randn(2, *config.shape), torch.tensor([3.0, 500.0], device=DEVICE)
    x = network.enter(x)
    plain = network(x, t)
    assert fuse_norms(network) == sum(isinstance(part, torch.nn.GroupNorm) for part in network.modules())
    torch.testing.assert_close(network(x, t), plain, rtol=1e-4, atol=1e-5)
    if INTERPRETED:  # on a GPU tests/test_gpu.py compiles networks
        compiled = torch.compile(network.body, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, network.condition(t)), plain, rtol=1e-4, atol=1e-5)
    # In other memory, and where a gradient is wanted, PyTorch's operators compute it.
    asked = x.contiguous().requires_grad_()
    network(asked, t).sum().backward()
    assert asked.grad is not None
    torch.testing.assert_close(network(x.contiguous(), t), plain, rtol=1e-4, atol=1e-5)


def test_no_samples_give_no_samples() -> None:
    x = torch.empty(0, 8, 4, 4, device=DEVICE).to(memory_format=torch.channels_last)
    assert cuda_norm.group_norm(x, randn(8), randn(8), 2, 1e-6).shape == x.shape


def test_other_memory_formats_dtypes_and_shapes_raise_an_error() -> None:
    good = inputs((2, 8, 4, 4))
    bad: dict[str, Any] = {
        "x": good["x"].contiguous(),
        "weight": randn(7),
        "bias": randn(16)[::2],
        "time": randn(3, 8),
        "offset": randn(2, 8),
        "scale_shift": randn(2, 8),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError):
            cuda_norm.group_norm(groups=2, eps=1e-6, **{**good, name: value})
    with pytest.raises(ValueError):
        cuda_norm.group_norm(groups=2, eps=1e-6, **{**good, "x": good["x"].double()})
    with pytest.raises(ValueError):
        cuda_norm.group_norm(groups=3, eps=1e-6, **good)


def test_a_compiled_function_uses_the_custom_operator() -> None:
    tensors = inputs((2, 16, 6, 6))

    def function(x: Tensor) -> Tensor:
        return 2 * cuda_norm.group_norm(groups=4, eps=1e-6, silu=True, **{**tensors, "x": x})

    actual = torch.compile(function, backend="eager" if INTERPRETED else "inductor", fullgraph=True)(tensors["x"])
    torch.testing.assert_close(actual, function(tensors["x"]))


def test_the_operator_passes_opcheck() -> None:
    tensors = inputs((2, 16, 6, 6))
    names = ("x", "weight", "bias")
    arguments = (*(tensors[name] for name in names), 4, 1e-6, True, tensors["time"], None, None)
    torch.library.opcheck(torch.ops.ddim.group_norm.default, arguments, test_utils=("test_schema", "test_faketensor"))
