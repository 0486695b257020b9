from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from pydantic import ValidationError
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from bench import randn
from ddim.nn.base import sinusoidal
from ddim.nn.blocks import Attention, Block
from ddim.nn.ema import EMA
from ddim.nn.unet import UNet, UNetConfig

SMALL = UNetConfig(
    in_channels=2, height=8, width=8, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4, dropout=0.0
)


def unet(config: UNetConfig = SMALL, seed: int = 0) -> UNet:
    """A network with random weights everywhere, also where it would start at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(config)
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.kaiming_uniform_(parameter)
    return network.eval().requires_grad_(False)


def random_image(config: UNetConfig = SMALL, batch: int = 3) -> Tensor:
    return randn(batch, config.in_channels, config.height, config.width, dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"height": 30}, r"\b30x32\b"),
        ({"width": 20, "patch": 2}, r"\b32x20\b"),
        ({"groups": 24}, r"\b128\b"),
        ({"heads": 3}, r"\b128\b"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"channels": 33}, "channels"),
        ({"dropout": 1.0}, "dropout"),
        ({"blocks": 0}, r"\bblocks\b"),
        ({"depth": 3}, "depth"),
    ],
)
def test_invalid_shapes_raise_an_error(settings: dict, wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        UNetConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"in_channels": 1},
        {"in_channels": 3, "patch": 2},
        {"height": 4, "width": 12},
        {"height": 12, "width": 4, "patch": 2, "attention": (6, 3)},
        {"multipliers": (2,), "blocks": 3, "attention": (8,)},
        {"multipliers": (1, 3, 1), "attention": (), "middle_attention": False, "heads": 2},
        {"classes": 5},
    ],
)
def test_the_output_has_the_inputs_shape(settings: dict) -> None:
    config = UNetConfig(**{**SMALL.model_dump(), **settings})
    x, t = random_image(config), torch.tensor([1.0, 5.0, 1000.0])
    network = unet(config)
    assert network(x, t).shape == x.shape
    assert torch.equal(network.body(x, network.condition(t)), network(x, t))
    # One condition serves a whole batch.
    whole = network.body(x, network.condition(torch.tensor([5.0])))
    torch.testing.assert_close(whole, network(x, torch.full((3,), 5.0)), rtol=0, atol=1e-5)


def test_a_new_network_outputs_zero() -> None:
    assert not UNet(SMALL)(random_image(), torch.tensor([1.0, 2.0, 3.0])).any()
    assert unet()(random_image(), torch.tensor([1.0, 2.0, 3.0])).abs().mean() > 0.01


def test_new_blocks_are_the_identity() -> None:
    """As in Ho et al.'s code: each residual branch starts at zero."""
    block, attention = Block(4, 4, groups=2, dropout=0.0), Attention(4, groups=2, heads=1)
    x = randn(2, 4, 6, 6, dtype=torch.float32)
    assert torch.equal(block(x, torch.ones(2, 4)), x)
    assert torch.equal(attention(x), x)


def test_every_weight_is_used() -> None:
    config = UNetConfig(**{**SMALL.model_dump(), "classes": 2})
    network = unet(config).requires_grad_(True)
    network(random_image(), torch.tensor([1.0, 500.0, 1000.0]), torch.tensor([0, 1, 2])).square().sum().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


@pytest.mark.parametrize("channels", [4, 8, 128])
def test_time_t_is_embedded_as_t_minus_1(channels: int) -> None:
    """The embedding of DDPM as diffusers has it, at times counted from 0."""
    config = UNetConfig(**{**SMALL.model_dump(), "channels": channels})
    network, fed = unet(config), []
    network.time.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    t = torch.tensor([1.0, 2.0, 3.5, 500.0, 1000.0])
    network.condition(t)
    expected = get_timestep_embedding(t - 1, channels, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(fed[0], expected, rtol=0, atol=1e-4)  # float32 knows an angle of 999 to 6e-5
    network.condition(torch.tensor([500]))
    assert torch.equal(fed[1], fed[0][3:4])
    assert not torch.allclose(sinusoidal(t, channels), expected)


def test_labels_have_an_effect_and_no_label_is_a_label() -> None:
    network, t = unet(UNetConfig(**{**SMALL.model_dump(), "classes": 3})), torch.full((4,), 7.0)
    conditions = network.condition(t, torch.arange(4))
    assert len({row.numpy().tobytes() for row in conditions}) == 4
    torch.testing.assert_close(network.condition(t)[0], conditions[3], rtol=0, atol=1e-6)


def test_memory_formats_agree() -> None:
    network, x, t = unet(), random_image(), torch.tensor([1.0, 10.0, 999.0])
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    expected = network(x, t)
    torch.testing.assert_close(other(x.to(memory_format=torch.channels_last), t), expected, rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    network, x, t = unet(), random_image(batch=5), torch.tensor([1.0, 10.0, 100.0, 500.0, 999.0])
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, network(x, t), rtol=0, atol=1e-5)


def test_a_bfloat16_body_is_close_and_times_stay_float32() -> None:
    network, x, t = unet(), random_image(), torch.tensor([1.0, 10.0, 999.0])
    fast = copy.deepcopy(network).cast_body(torch.bfloat16)
    time_layers = ("time.", "time_to_blocks.", "label.")
    for name, parameter in fast.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith(time_layers) else torch.bfloat16), name
    assert torch.equal(fast.condition(t), network.condition(t))
    output, expected = fast(x.bfloat16(), t), network(x, t)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() / expected.norm() < 3e-2


@pytest.mark.slow
def test_the_body_is_one_graph_for_all_times() -> None:
    network, x = unet(), random_image()
    torch._dynamo.reset()
    body, whole = CompileCounter(), CompileCounter()
    compiled_body = torch.compile(network.body, fullgraph=True, backend=body)
    compiled = torch.compile(network, fullgraph=True, backend=whole)
    for t in (1.0, 2.0, 500.5, 1000.0):
        times = torch.full((3,), t)
        expected = network(x, times)
        torch.testing.assert_close(compiled_body(x, network.condition(times)), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled(x, times), expected, rtol=0, atol=1e-5)
    assert (body.frame_count, whole.frame_count) == (1, 1)


def test_the_default_is_the_network_of_ddpm() -> None:
    """As many weights as diffusers' port of Ho et al.'s CIFAR-10 network, config of google/ddpm-cifar10-32."""
    with torch.device("meta"):
        native = UNet(UNetConfig())
        port = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        )
    count = sum(parameter.numel() for parameter in native.parameters())
    assert count == sum(parameter.numel() for parameter in port.parameters())
    assert round(count / 1e6, 1) == 35.7


def test_the_ema_decay_is_warmed_up() -> None:
    network = nn.Linear(2, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    ema = EMA(network, decay=0.5)
    expected = 1.0
    for n, value in enumerate([3.0, -2.0, 5.0, 0.5, 8.0, 1.0, 1.0, 1.0, 4.0, 4.0]):
        nn.init.constant_(network.weight, value)
        ema.update(network, n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(ema.module.weight, torch.full((1, 2), expected), rtol=1e-6, atol=0)
    assert not ema.module.training
    assert not ema.module.weight.requires_grad
    assert network.weight.requires_grad
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\b1\b"):
            EMA(network, decay)
