"""Parity of the U-Net with diffusers' port of Ho et al.'s network, with the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from bench import randn
from ddim.nn.unet import UNet, UNetConfig

Weights = dict[str, Tensor]


def copied(weights: Weights, peer: str, ours: str) -> Weights:
    return {f"{ours}.{kind}": weights[f"{peer}.{kind}"] for kind in ("weight", "bias")}


def block(weights: Weights, peer: str, ours: str) -> Weights:
    out = {}
    for name in ("norm1", "conv1", "norm2", "conv2"):
        out |= copied(weights, f"{peer}.{name}", f"{ours}.{name}")
    if f"{peer}.conv_shortcut.weight" in weights:
        out |= copied(weights, f"{peer}.conv_shortcut", f"{ours}.skip")
    return out


def attention(weights: Weights, peer: str, ours: str) -> Weights:
    if f"{peer}.group_norm.weight" not in weights:
        return {}
    out = copied(weights, f"{peer}.group_norm", f"{ours}.norm") | copied(weights, f"{peer}.to_out.0", f"{ours}.out")
    for kind in ("weight", "bias"):
        out[f"{ours}.qkv.{kind}"] = torch.cat([weights[f"{peer}.to_{letter}.{kind}"] for letter in "qkv"])
    return out


def translated(weights: Weights, config: UNetConfig) -> Weights:
    """Diffusers' state dict with our names; our blocks are numbered consecutively."""
    out: Weights = {}
    for peer, ours in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
        out |= copied(weights, peer, ours)
    for peer, ours in (("linear_1", "time.0"), ("linear_2", "time.2")):
        out |= copied(weights, f"time_embedding.{peer}", ours)
    order: list[str] = []
    levels = len(config.multipliers)
    for way, per_level, sampler in (("down", config.blocks, "downs"), ("mid", 0, ""), ("up", config.blocks + 1, "ups")):
        if way == "mid":
            for i in range(2):
                order.append(f"mid_block.resnets.{i}")
                out |= block(weights, order[-1], f"middle.{i}")
            out |= attention(weights, "mid_block.attentions.0", "middle_attention")
            continue
        for place in range(levels * per_level):
            level, inner = divmod(place, per_level)
            order.append(f"{way}_blocks.{level}.resnets.{inner}")
            out |= block(weights, order[-1], f"{way}_blocks.{place}")
            out |= attention(weights, f"{way}_blocks.{level}.attentions.{inner}", f"{way}_attention.{place}")
        for level in range(levels - 1):
            out |= copied(weights, f"{way}_blocks.{level}.{way}samplers.0.conv", f"{sampler}.{level}.conv")
    for kind in ("weight", "bias"):
        out[f"time_to_blocks.{kind}"] = torch.cat([weights[f"{name}.time_emb_proj.{kind}"] for name in order])
    return out


@pytest.mark.parametrize("heads", [1, 2])
def test_same_weights_give_the_same_output(heads: int) -> None:
    config = UNetConfig(
        height=16, width=16, channels=16, multipliers=(1, 2, 2), blocks=2, attention=(8,), groups=8, heads=heads
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        port = UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            attention_head_dim=32 // heads,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            norm_num_groups=8,
        ).eval()
        for module in port.modules():
            if isinstance(module, nn.GroupNorm):  # else scale 1 and shift 0 would hide a mix-up
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
    ours = UNet(config).eval()
    ours.load_state_dict(translated(port.state_dict(), config))
    x, t = randn(3, 3, 16, 16, dtype=torch.float32), torch.tensor([1, 500, 1000])
    with torch.no_grad():
        expected, output = port(x, t - 1).sample, ours(x, t.float())
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
