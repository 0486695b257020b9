"""The native float32 kernels: torch's results up to rounding, and bits that depend only on the sample."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import randn
from ddim.errors import DdimError
from ddim.nn.cpu import kernels as native
from ddim.nn.cpu import library
from ddim.nn.cpu.threads import ThreadTuner
from ddim.nn.cpu.unet import NativeUNet, fits
from ddim.nn.unet import UNetConfig
from models import new_network, tiny_config, tiny_model, tiny_network

try:
    KERNELS = native.kernels()
except library.Unavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)
V = KERNELS.vector


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    KERNELS.threads = 2
    yield
    torch.set_num_threads(before)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def floats(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed, dtype=torch.float32)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert theirs.norm() > 0
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


SIZES = [(1, 8, 8), (3, 7, 5), (2, 16, 16), (5, 9, 4), (1, 1, 3)]
CHANNELS = [(V, V), (2 * V, 5 * V), (3 * V, 2 * V)]


@pytest.mark.parametrize(("size", "channels"), [*itertools.product(SIZES[:4], CHANNELS)])
@pytest.mark.parametrize("up", [False, True])
def test_winograd_equals_the_convolution(size: tuple[int, int, int], channels: tuple[int, int], up: bool) -> None:
    (b, h, w), (c, n) = size, channels
    x, weights, bias = floats(b, c, h, w), floats(n, c, 3, 3, seed=1), floats(n, seed=2)
    time, residual = floats(b, n, seed=3), floats(b, n, h << up, w << up, seed=4)
    wide = F.interpolate(x, scale_factor=2.0) if up else x
    expected = nhwc(
        F.conv2d(wide.double(), weights.double(), bias.double(), padding=1) + time[:, :, None, None] + residual
    )
    out = torch.empty(expected.shape)
    KERNELS.winograd(nhwc(x), KERNELS.pack_winograd(weights), bias, out, up, time, nhwc(residual))
    close(out, expected)


CASES = [(3, 1, 1), (1, 1, 0), (3, 2, 1), (3, 2, 0)]  # side, stride, offset


@pytest.mark.parametrize(("size", "case"), [*itertools.product(SIZES[:3], CASES)])
@pytest.mark.parametrize("channels", [(1, 3), (V, V + 1), (5, 4 * V), (2 * V, 3 * V)])
def test_direct_convolution_equals_torchs(
    size: tuple[int, ...], case: tuple[int, ...], channels: tuple[int, int]
) -> None:
    (b, h, w), (side, stride, offset), (c, n) = size, case, channels
    h, w = h + h % stride, w + w % stride
    x, weights, bias = floats(b, c, h, w), floats(n, c, side, side, seed=1), floats(n, seed=2)
    far = side - 1 - offset if stride == 1 else side - stride - offset
    padded = F.pad(x.double(), (offset, max(far, 0), offset, max(far, 0)))
    expected = F.conv2d(padded, weights.double(), bias.double(), stride=stride)
    time, residual = floats(1, n, seed=3), floats(*expected.shape, seed=4)
    expected = nhwc(expected + time[:, :, None, None] + residual)
    out = torch.empty(expected.shape)
    KERNELS.conv(nhwc(x), KERNELS.pack(weights), bias, out, side, stride, offset, False, time, nhwc(residual))
    close(out, expected)


@pytest.mark.parametrize(("size", "groups"), [*itertools.product(SIZES, [1, 4])])
@pytest.mark.parametrize("activate", [True, False])
def test_norm_equals_group_norm(size: tuple[int, int, int], groups: int, activate: bool) -> None:
    b, h, w = size
    c, other = 4 * V, V
    x = floats(b, c, h, w) * 3 + 40  # a mean that a one-pass variance would not survive
    scale, shift, modulation = floats(c, seed=1), floats(c, seed=2), floats(b, 2 * c, seed=3)
    normed = F.group_norm(x.double(), groups, scale.double(), shift.double(), 1e-5)
    mod = modulation[:, :, None, None]
    expected = normed * (1 + mod[:, :c]) + mod[:, c:]
    expected = nhwc(F.silu(expected) if activate else expected)
    out, both = torch.empty(expected.shape), torch.empty(expected.shape)
    first, second = nhwc(x[:, : c - other]), nhwc(x[:, c - other :])
    KERNELS.norm(first, scale, shift, groups, 1e-5, out, activate, second, both, modulation)
    close(out, expected, 1e-4)
    assert torch.equal(both, nhwc(x))


def test_silu_at_extreme_values() -> None:
    x = torch.tensor([-1e4, -200.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 88.0, 200.0, 1e4])
    for value in x:
        flat = torch.full((1, 1, 1, V), float(value))
        # a variance of 0: the shift alone is left
        out = KERNELS.norm(flat, torch.ones(V), flat.flatten(), 1, 1.0, torch.empty_like(flat))
        torch.testing.assert_close(out[0, 0, 0], F.silu(value.double()).float().expand(V), rtol=1e-6, atol=1e-30)


NETWORKS: dict[str, UNetConfig] = {
    "plain": tiny_network(channels=2 * V, multipliers=(1, 2)),
    "as Ho et al.": tiny_network(
        height=16, width=16, channels=32, multipliers=(1, 2, 2), blocks=2, attention=(8,), in_channels=3
    ),
    "patches": tiny_network(height=16, width=16, patch=2, channels=32, heads=2),
    "not square": tiny_network(height=8, width=12, channels=32, attention=(8, 4)),
    "as OpenAI's": tiny_network(
        channels=32, scale_shift=True, resample="block", padding="both", head_channels=16, learned_variance=True
    ),
    "as diffusers'": tiny_network(channels=32, padding="both", norm_eps=1e-5, embedding="cos-sin", embedding_shift=0),
    "no attention": tiny_network(channels=32, attention=(), middle_attention=False, multipliers=(1,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_native_network_equals_the_network(name: str) -> None:
    network = new_network(NETWORKS[name]).eval().requires_grad_(False)
    assert fits(network, V)
    native_body = NativeUNet(network, KERNELS)
    x = floats(5, *network.config.shape)
    for t in (torch.tensor([3.0]), torch.tensor([1.0, 20.0, 300.0, 700.0, 1000.0])):
        condition = network.condition(t)
        actual = native_body(x, condition)
        close(actual, network.double().body(x.double(), condition.double()), 3e-5)
        network.float()


@pytest.mark.parametrize("name", NETWORKS)
def test_bits_depend_only_on_the_sample(name: str) -> None:
    """Not on the batch, a sample's position in it, the number of threads, or earlier calls."""
    network = new_network(NETWORKS[name]).eval().requires_grad_(False)
    body = NativeUNet(network, KERNELS)
    x, condition = floats(7, *network.config.shape), network.condition(torch.tensor([50.0]))
    whole = body(x, condition)
    assert torch.equal(whole, torch.cat([body(part, condition) for part in x.split(1)]))
    assert torch.equal(whole, torch.cat([body(part, condition) for part in x.split(3)]))
    assert torch.equal(whole.flip(0), body(x.flip(0), condition))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(whole, NativeUNet(network, KERNELS)(x, condition))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_acquired_buffer_is_released(name: str) -> None:
    network = new_network(NETWORKS[name]).eval().requires_grad_(False)
    body, x, saved = NativeUNet(network, KERNELS), floats(2, *NETWORKS[name].shape), []
    condition = network.condition(torch.tensor([50.0]))
    for _ in range(5):
        body(x, condition)
        saved.append(sum(len(tensors) for buffers in body.pool for tensors in buffers.free.values()))
    assert len({*saved}) == 1


def test_samples_are_bit_identical_at_any_batch_size() -> None:
    model = tiny_model(dtype="float32-fast", channels=2 * V, classes=3)
    plan = model.plan(4, eta=1.0)
    labels = [0, 1, 2, 1, 0]
    five = model.sample(5, plan=plan, labels=labels)
    assert torch.equal(five, torch.cat([model.sample(1, plan=plan, start=i, labels=labels[i]) for i in range(5)]))
    other = tiny_model(dtype="float32-fast", channels=2 * V, classes=3, micro_batch=2)
    assert torch.equal(five, other.sample(5, plan=plan, labels=labels))
    assert model.conditions == other.conditions
    close(five, tiny_model(dtype="float32", channels=2 * V, classes=3).sample(5, plan=plan, labels=labels), 1e-4)


def test_gradients_are_the_networks() -> None:
    model, plain = (tiny_model(dtype=dtype, channels=2 * V) for dtype in ("float32-fast", "float32"))
    level = model.schedule.level(400)
    grads = []
    for batch in (model, plain):
        x = floats(2, *model.shape).requires_grad_()
        batch.denoise(x, level).eps.square().sum().backward()
        grads.append(x.grad)
    close(*grads)


def test_the_chosen_precision() -> None:
    assert tiny_model(dtype="float32", channels=2 * V).compute.name == "float32"
    assert tiny_model(dtype="auto", channels=2 * V).compute.name in ("float32-fast", "bfloat16")
    assert tiny_model(dtype="auto", kind="text").compute.name in ("float32", "bfloat16")
    assert not fits(new_network(tiny_network(channels=V + 4, groups=4)), V)
    for changes, words in (({"kind": "text"}, "U-Net"), ({"channels": 20, "groups": 4}, r"^float32-fast: ")):
        with pytest.raises(DdimError, match=words):
            _ = tiny_model(dtype="float32-fast", **changes).compute.name
    with pytest.raises(DdimError, match=r"^float32-fast and compile: "):
        tiny_model(dtype="float32-fast").compute.__class__(
            new_network(tiny_network()), torch.device("cpu"), "float32-fast", True, 8
        )


def test_the_faster_number_of_threads_is_used() -> None:
    pace = ThreadTuner(4)

    def calls(number: int, four: float, one: float) -> list[int]:
        used = []
        for _ in range(number):
            used.append(pace.threads())
            pace.took(used[-1], four if used[-1] == 4 else one)
        return used

    assert set(calls(6, 0.3, 0.5)) == {4, 1}
    assert calls(ThreadTuner.AGAIN, 0.3, 0.5).count(4) == ThreadTuner.AGAIN - 1
    assert calls(3, 5.0, 0.5) == [4, 1, 1]  # another process has begun to use the cores
    assert (
        calls(2 * ThreadTuner.AGAIN, 0.3, 0.5)[-ThreadTuner.AGAIN :].count(4) == ThreadTuner.AGAIN - 1
    )  # it has ended
    assert ThreadTuner(1).threads() == 1


def test_a_text_model_has_no_native_kernels() -> None:
    assert not fits(new_network(tiny_config("text").network), V)
