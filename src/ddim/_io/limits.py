"""The largest sizes that are accepted, so that a slip of the finger is refused before anything is allocated.

They are far beyond what anybody trains or samples today, and within what the arithmetic of the library can count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ddim.errors import DdimError

TIMES = 1_000_000
"""T, the times of a schedule."""
COUNT = 10**15
"""Optimiser steps, and whatever else is only counted."""
BATCH = 1 << 20
"""Images per optimiser step."""
MICRO_BATCH = 4096
"""Samples that the network sees at once when sampling: a part of that size is computed whatever is asked for."""
SAMPLES = 10**9
"""Samples of one request."""
INDEX = 1 << 63
"""The index after a run's last sample."""
PIXELS = 50_000_000
"""Pixels of an image, and of the resolution a model works at."""
PARAMETERS = 4_000_000_000
"""Parameters of a network: 16 GB in float32."""
ACTIVATIONS = 1 << 33
"""Numbers in the first layer's output for a part of a batch: 34 GB in float32."""
LEVELS, BLOCKS, DEPTH = 16, 64, 1024
"""Levels of a U-Net, its blocks in each, and layers of a transformer."""
WIDTH, MULTIPLE, LENGTH = 1 << 16, 1 << 10, 1 << 20
"""Channels, multiples of them, and tokens of a sequence."""
CATEGORIES, CLASSES = 1 << 20, 1 << 20
"""Kinds of tokens, and labels."""


def check_parameters(count: int) -> None:
    """Refuse a network that is too large to be built.

    Args:
        count: Its parameters, estimated.

    Raises:
        ValueError: If there are more than `PARAMETERS`.
    """
    if count > PARAMETERS:
        raise ValueError(f"the network would have {count:,} parameters, more than {PARAMETERS:,}")


def check_pixels(height: int, width: int) -> None:
    """Refuse a resolution that is larger than that of any image which is read.

    Raises:
        ValueError: If it has more than `PIXELS` pixels.
    """
    if height * width > PIXELS:
        raise ValueError(f"{height}x{width} are more than {PIXELS:,} pixels")


def check_levels(multipliers: Sequence[int]) -> None:
    """Refuse too many levels of a U-Net, or too wide ones.

    Raises:
        ValueError: Saying which.
    """
    if len(multipliers) > LEVELS:
        raise ValueError(f"there are {len(multipliers)} levels, more than {LEVELS}")
    if any(value > MULTIPLE for value in multipliers):
        raise ValueError(f"a level is more than {MULTIPLE} times as wide as the first")


def check_batch(network: Any, recipe: Any) -> None:
    """Refuse a batch whose first layer alone would not fit into memory.

    Args:
        network: A network's configuration.
        recipe: A `ddim.model.config.TrainConfig`.

    Raises:
        DdimError: If that layer's output holds more than `ACTIVATIONS` numbers.
    """
    part = recipe.batch // recipe.accumulate
    channels = getattr(network, "channels", None) or network.width
    count = part * channels * math.prod(network.shape[-2:])
    if count > ACTIVATIONS:
        wrong = f"of {recipe.batch:,} in {recipe.accumulate} parts needs {count:,} numbers for its first layer alone"
        raise DdimError("batch", wrong, "lower the batch or the resolution, or accumulate it in more parts")


def check_samples(n: int, start: int = 0) -> None:
    """Refuse a number of samples, or a first index, that cannot be counted.

    Raises:
        DdimError: If n is more than `SAMPLES`, or the last index not below `INDEX`.
    """
    if n > SAMPLES:
        raise DdimError(f"n {n}", f"is more than {SAMPLES:,}", "ask for fewer, several times, each with its own start")
    if start + n > INDEX:
        raise DdimError(f"start {start}", f"ends beyond sample {INDEX:,}", "begin at a lower index")


def unet_parameters(
    channels: Sequence[int], blocks: int, embedding: int, inside: int = 0, attended: Sequence[bool] = ()
) -> int:
    """An estimate of the parameters of a U-Net: those of its 3x3 convolutions, attention and time layers.

    Args:
        channels: Of each level.
        blocks: Residual blocks per level on the way down, one more on the way up.
        embedding: Width of the time embedding.
        inside: Channels of its input and output together.
        attended: For each level, whether its blocks are followed by attention.
    """
    total, now, skips, times = 9 * inside * channels[0] + embedding * embedding, channels[0], [channels[0]], 0
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
