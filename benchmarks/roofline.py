"""FLOP/s of the network relative to the machine's matrix products, and the bytes moved per evaluation.

`python -m benchmarks.roofline`
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.estimate import forward_flops
from benchmarks.measuring import by_turns, write
from ddim.nn.cpu.unet import Conv


def ceiling(dtype: torch.dtype, side: int = 2048) -> float:
    """The fastest of ten matrix products, FLOP/s."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def moved_by(network: Any, x: Tensor, condition: Tensor) -> float:
    """Bytes that the layers of the network read and write in float32."""
    moved = [0]

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        moved[0] += 4 * (inputs[0].numel() + output.numel() + sum(p.numel() for p in module.parameters(recurse=False)))

    leaves = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.GroupNorm)]
    handles = [leaf.register_forward_hook(hook) for leaf in leaves]
    with torch.no_grad():
        network.body(x, condition)
    for handle in handles:
        handle.remove()
    return float(moved[0])


def convolutions(part: Any, seen: set[int]) -> Iterator[Conv]:
    """Every convolution of the CPU kernels in a body, once."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, Conv):
        yield part
    elif isinstance(part, list | tuple):
        for inner in part:
            yield from convolutions(inner, seen)
    elif type(part).__module__.startswith("ddim.nn.cpu"):
        for inner in vars(part).values():
            yield from convolutions(inner, seen)


def saved(body: Any, batch: int) -> float:
    """FLOPs saved by Winograd convolutions: three quarters of each, on whole tiles."""
    total = 0.0
    for part in convolutions(body, set()):
        if part.winograd:
            tiles = -(-part.height // 4) * -(-part.width // 4)
            total += 2 * batch * part.weights.shape[2] * part.channels * (9 * part.height * part.width - 36 * tiles)
    return total


def weights(network: Any, body: Any) -> float:
    """Bytes of the weights that are read: packed weights, or those of the network."""
    packed = sum(part.weights.nbytes for part in convolutions(body, set()))
    return float(packed or sum(p.nbytes for p in network.parameters()))


def main(batches: dict[str, tuple[int, ...]] | None = None) -> None:
    """Measure and write results/roofline.json."""
    rows = []
    tops = {str(dtype).removeprefix("torch."): ceiling(dtype) for dtype in {torch.float32, peers.fast_dtype("cpu")}}
    for name, sizes in (batches or {"cifar10": (1, 8), "mnist": (1, 8)}).items():
        config, network = peers.NETWORKS[name]()
        for dtype in ("auto", "float32"):
            model = peers.ours(config, network, dtype=dtype)
            for n in sizes:
                x = torch.randn(n, *config.network.shape, generator=torch.Generator().manual_seed(0))
                condition = network.condition(torch.tensor([500.0])).detach()
                flops, moved = float(n * forward_flops(config.network)), moved_by(network, x, condition)
                level, body = model.schedule.level(500), model.compute.body
                seconds = by_turns({"call": lambda x=x, level=level, model=model: model.denoise(x, level)}, 7)["call"]
                top = tops[str(model.dtype).removeprefix("torch.")]
                rows.append(
                    {
                        "network": name,
                        "precision": model.compute.name,
                        "batch": n,
                        "GFLOP of the network": flops / 1e9,
                        "GFLOP/s": flops / seconds / 1e9,
                        "of the ceiling": flops / seconds / top,
                        "of the ceiling, made": (flops - saved(body, n)) / seconds / top,
                        "MB moved by layers": moved / 1e6,
                        "MB of weights": weights(model.compute.network, body) / 1e6,
                    }
                )
    about = ", ".join(f"{name} {top / 1e9:.0f} GFLOP/s" for name, top in tops.items())
    text = f"the ceiling is the fastest matrix product of size 2048: {about}; 'made' excludes FLOPs saved by Winograd"
    write("roofline", rows, text)


if __name__ == "__main__":
    main()
