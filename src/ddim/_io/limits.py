"""Upper limits of sizes and counts, so that a typo is refused before anything is allocated.

They are far above practical sizes, and small enough for the library's arithmetic to be exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ddim.errors import DdimError

TIMES = 1_000_000
"""T, the number of timesteps of a schedule."""
COUNT = 10**15
"""Optimiser steps and other counts."""
BATCH = 1 << 20
"""Images per optimiser step."""
MICRO_BATCH = 4096
"""Samples in a micro-batch when sampling; a full micro-batch is computed whatever the number requested."""
SAMPLES = 10**9
"""Samples of one request."""
INDEX = 1 << 63
"""Upper bound (exclusive) of the index of a sample."""
PIXELS = 50_000_000
"""Pixels of an image file, and of a model's resolution."""
PARAMETERS = 4_000_000_000
"""Parameters of a network: 16 GB in float32."""
ACTIVATIONS = 1 << 33
"""Values in the first layer's output for one accumulation step: 34 GB in float32."""
LEVELS, BLOCKS, DEPTH = 16, 64, 1024
"""Levels of a U-Net, its blocks in each, and layers of a transformer."""
WIDTH, MULTIPLE, LENGTH = 1 << 16, 1 << 10, 1 << 20
"""Channels, channel multipliers, and tokens of a sequence."""
CATEGORIES, CLASSES = 1 << 20, 1 << 20
"""Vocabulary size, and number of classes."""


def check_parameters(count: int) -> None:
    """Check the size of a network before it is built.

    Args:
        count: Estimated number of parameters.

    Raises:
        ValueError: If there are more than `PARAMETERS`.
    """
    if count > PARAMETERS:
        raise ValueError(f"the network would have {count:,} parameters, more than {PARAMETERS:,}")


def check_pixels(height: int, width: int) -> None:
    """Check a resolution against the limit for image files.

    Raises:
        ValueError: If it has more than `PIXELS` pixels.
    """
    if height * width > PIXELS:
        raise ValueError(f"{height}x{width} are more than {PIXELS:,} pixels")


def check_levels(multipliers: Sequence[int]) -> None:
    """Check the number of levels of a U-Net and their channel multipliers.

    Raises:
        ValueError: If there are more than `LEVELS`, or a multiplier is larger than `MULTIPLE`.
    """
    if len(multipliers) > LEVELS:
        raise ValueError(f"there are {len(multipliers)} levels, more than {LEVELS}")
    if any(value > MULTIPLE for value in multipliers):
        raise ValueError(f"a level is more than {MULTIPLE} times as wide as the first")


def check_batch(network: Any, recipe: Any) -> None:
    """Check that a batch's first layer can fit into memory.

    Args:
        network: A network's configuration.
        recipe: A `ddim.model.config.TrainConfig`.

    Raises:
        DdimError: If the first layer's output has more than `ACTIVATIONS` values.
    """
    micro_batch = recipe.batch // recipe.accumulate
    channels = getattr(network, "channels", None) or network.width
    count = micro_batch * channels * math.prod(network.shape[-2:])
    if count > ACTIVATIONS:
        problem = f"of {recipe.batch:,} in {recipe.accumulate} parts needs {count:,} values in its first layer alone"
        raise DdimError("batch", problem, "reduce the batch or resolution, or accumulate it in more parts")


def check_samples(n: int, start: int = 0) -> None:
    """Check the number of samples of a request and its first index.

    Raises:
        DdimError: If n is more than `SAMPLES`, or start + n more than `INDEX`.
    """
    if n > SAMPLES:
        raise DdimError(f"n {n}", f"is more than {SAMPLES:,}", "request fewer at a time, with different starts")
    if start + n > INDEX:
        raise DdimError(f"start {start}", f"ends beyond sample {INDEX:,}", "use a lower start")


def unet_parameters(
    channels: Sequence[int], blocks: int, embedding: int, image_channels: int = 0, attended: Sequence[bool] = ()
) -> int:
    """Estimate the number of parameters of a U-Net from its 3x3 convolutions, attention and time layers.

    Args:
        channels: Channels of each level.
        blocks: Residual blocks per level of the encoder; the decoder has one more.
        embedding: Width of the time embedding.
        image_channels: Sum of the input and output channels.
        attended: For each level, whether its blocks are followed by attention.
    """
    total, now, skips, times = 9 * image_channels * channels[0] + embedding * embedding, channels[0], [channels[0]], 0
    for level, width in enumerate(channels):
        for _ in range(blocks):
            total += 9 * (now * width + width * width) + (now * width if now != width else 0)
            total += 4 * width * width if attended and attended[level] else 0
            now, times = width, times + width
            skips.append(now)
        if level < len(channels) - 1:
            total += 9 * now * now
            skips.append(now)
    total, times = total + 4 * 9 * now * now, times + 2 * now
    for level, width in reversed(list(enumerate(channels))):
        for _ in range(blocks + 1):
            before = now + skips.pop()
            total += 9 * (before * width + width * width) + before * width
            total += 4 * width * width if attended and attended[level] else 0
            now, times = width, times + width
        total += 9 * now * now if level else 0
    return total + embedding * times
