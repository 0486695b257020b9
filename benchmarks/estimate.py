"""Estimates the training cost of a preset: FLOPs of its network, and the steps that fit into a time budget.

`python -m benchmarks.estimate [--preset cifar10-fast] [--tflops 790] [--share 0.3] [--budget 25min]`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddim.cli._starting import seconds
from ddim.errors import DdimError
from ddim.train.presets import preset

TRAINED = 3  # FLOPs of a training step in forward passes: the backward pass has two products for each in the forward


def flops(network: nn.Module, *inputs: torch.Tensor) -> int:
    """FLOPs of the convolutions and matrix products of network(*inputs); nothing is computed on the meta device.

    Attention is counted on the meta device only: torch's counter does not support the fused kernel of the CPU.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return int(counter.get_total_flops())


def built(config: Any) -> tuple[nn.Module, torch.Tensor]:
    """The network of a configuration and one sample of its data, on the meta device."""
    with torch.device("meta"):
        network = config.build().eval()
        return network, torch.zeros(1, *config.shape, dtype=torch.int64 if config.categories else torch.float32)


def forward_flops(config: Any) -> int:
    """FLOPs of one sample through the network of a configuration."""
    network, x = built(config)
    return flops(network, x, torch.ones(1, device="meta"))


def estimate(name: str, tflops: float, share: float, budget: float) -> dict[str, float]:
    """Estimate the training cost of a preset.

    Args:
        name: The preset.
        tflops: The ceiling in TFLOP/s, > 0.
        share: Fraction of it that training reaches, in (0, 1].
        budget: Training time in seconds.

    Raises:
        DdimError: If there is no such preset, or an argument is out of range.
    """
    if not (tflops > 0 and 0 < share <= 1):
        raise DdimError(
            f"{tflops} TFLOP/s at a share of {share}", "is out of range", "use --tflops > 0 and --share in (0, 1]"
        )
    recipe = preset(name)
    network, _ = built(recipe.network)
    parameters, forward = sum(p.numel() for p in network.parameters()), forward_flops(recipe.network)
    rate = tflops * 1e12 * share / (TRAINED * forward)
    return {
        "parameters (M)": parameters / 1e6,
        "bf16 size (MB)": 2 * parameters / 1e6,
        "GFLOP an image, forward": forward / 1e9,
        "GFLOP an image, trained": TRAINED * forward / 1e9,
        "images/s": rate,
        "batch": recipe.train.batch,
        "steps in the budget": rate * budget // recipe.train.batch,
        "images seen in the budget": rate * budget,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the estimate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=__doc__)
    parser.add_argument("--preset", default="cifar10-fast")
    parser.add_argument("--tflops", type=float, default=790.0, help="peak TFLOP/s of the device")
    parser.add_argument("--share", type=float, default=0.3, help="fraction of the peak that is reached")
    parser.add_argument("--budget", default="25min", help="training time")
    options = parser.parse_args(argv)
    try:
        figures = estimate(options.preset, options.tflops, options.share, seconds(options.budget))
    except DdimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.preset}: {options.budget} at {options.share:.0%} of {options.tflops:g} TFLOP/s")
    for what, value in figures.items():
        print(f"  {what:26} {value:,.0f}" if value >= 1000 or value == int(value) else f"  {what:26} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
