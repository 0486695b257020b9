"""The preset `photos`: a network and recipe for images of any size, chosen by the time there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddim.data.policy import ImagePolicy

NIGHT = 10 * 3600.0  # longest run, in seconds, for which a larger network is chosen if only --steps is given


@dataclass(frozen=True, slots=True)
class Scale:
    """A size of network with its recipe.

    Args:
        steps: The number of steps from which this scale is worthwhile.
        channels: Channels of the first level.
        blocks: Residual blocks per level.
        batch: Images per step.
        lr: The learning rate.
        patched_from: The smallest side of images that are patched 2x2.
    """

    steps: int
    channels: int
    blocks: int
    batch: int
    lr: float
    patched_from: int = 17


SCALES = (
    Scale(0, 32, 1, 32, 2e-3),
    Scale(1500, 48, 1, 32, 1.5e-3),
    Scale(3000, 64, 1, 32, 1e-3),
    Scale(12_000, 96, 2, 64, 5e-4),
    Scale(40_000, 128, 2, 128, 2e-4, patched_from=48),
)
"""From the smallest to the largest."""


def network(scale: Scale, data: ImagePolicy) -> dict[str, Any]:
    """The U-Net of a scale for images of a size, as far as the size's divisors allow.

    Large images are patched, and the resolution is halved until a side is at most 8.
    """
    side = min(data.height, data.width)
    patch = 1 if side < scale.patched_from else 2 if side <= 96 else 4
    while data.height % patch or data.width % patch:
        patch //= 2
    levels = 1
    while side // patch >> (levels - 1) > 8 and not (data.height % (patch << levels) or data.width % (patch << levels)):
        levels += 1
    lowest = data.height // patch >> (levels - 1)
    return {
        "in_channels": data.channels,
        "height": data.height,
        "width": data.width,
        "channels": scale.channels,
        "multipliers": (1, *(2,) * (levels - 1)),
        "blocks": scale.blocks,
        "patch": patch,
        "attention": (lowest,) if lowest <= 16 else (),
        "middle_attention": lowest <= 32,
        "groups": 16,
        "dropout": 0.0,
    }


def recipe(scale: Scale, steps: int) -> dict[str, Any]:
    """The settings of a training at a scale with about this number of steps."""
    return {
        "batch": scale.batch,
        "lr": scale.lr,
        "warmup": max(1, min(1000, steps // 20)),
        "checkpoint_every": max(1, steps // 8),
        "preview_every": max(1, steps // 4),
        "log_every": max(1, min(50, steps // 20)),
    }


def choose(measure: Callable[[Scale], float], steps: Callable[[float], int], limit: float) -> tuple[Scale, float]:
    """The largest scale that is worthwhile, measured from the smallest up.

    Args:
        measure: The seconds per step of a scale.
        steps: The number of steps in the run, from the seconds per step.
        limit: The most seconds that all steps may take.

    Returns:
        The scale, and its seconds per step.
    """
    best, seconds = SCALES[0], measure(SCALES[0])
    for scale in SCALES[1:]:
        if steps(seconds) < scale.steps:
            break  # a larger network is slower
        larger = measure(scale)
        if steps(larger) < scale.steps or steps(larger) * larger > limit:
            break
        best, seconds = scale, larger
    return best, seconds
