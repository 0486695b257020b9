"""Plausibility checks: whether the values of samples fit the range of pixels and the training data's statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ddim.data.policy import DataStatistics
from ddim.errors import DdimError, either, warn
from ddim.model.config import ModelConfig

FAR, FAR_SHARE = 4.0, 0.1
"""Samples are implausible if more than `FAR_SHARE` of all values exceed `FAR` in size; pixels are in [-1, 1]."""
BEYOND, BEYOND_SHARE, SPREAD = 1.1, 0.1, 1.5
"""Also if more than `BEYOND_SHARE` exceed `BEYOND` and the spread is more than `SPREAD` times the data's."""
MOST = 1024
"""The maximum number of images that `statistics_of` reads."""


def statistics_of(images: Any, read: Any) -> DataStatistics:
    """Mean and standard deviation of a data set, from at most `MOST` images spaced evenly in it.

    Args:
        images: A `ddim.data.ImageSet`.
        read: Function from a batch of it to floats in [-1, 1].
    """
    indices = np.unique(np.linspace(0, len(images) - 1, min(MOST, len(images))).round().astype(int))
    values = read(images.batch(indices)).double()
    return DataStatistics(mean=float(values.mean()), std=float(values.std(correction=0)))


def implausible(samples: Tensor, config: ModelConfig) -> str:
    """The reason why samples are not plausible images of a model; "" if they are plausible, or for discrete data.

    Args:
        samples: (N, C, H, W), nominally in [-1, 1], finite.
        config: The model's configuration.
    """
    if config.categorical is not None or not samples.numel():
        return ""
    values = samples.double()
    size = values.abs()
    far = float((size > FAR).double().mean())
    if far > FAR_SHARE:
        return f"{far:.0%} of their values are outside [-{FAR:g}, {FAR:g}], images are in [-1, 1]"
    data, outside = config.statistics, float((size > BEYOND).double().mean())
    if data is None or outside <= BEYOND_SHARE:
        return ""
    spread = float((values - data.mean).square().mean().sqrt())
    if spread <= SPREAD * data.std:
        return ""
    return f"their spread is {spread:.2f}, the training data's {data.std:.2f}, and {outside:.0%} are outside the range"


def refuse_implausible(samples: Tensor, config: ModelConfig, force: bool) -> None:
    """Raise an error for implausible samples, before the first samples of a run are written.

    Args:
        samples: The first samples.
        config: The model's configuration.
        force: Whether to continue with a warning instead.

    Raises:
        DdimError: If they are not plausible and `force` is False.

    Warns:
        DdimWarning: If they are not plausible and `force` is True.
    """
    reason = implausible(samples, config)
    if not reason:
        return
    if force:
        warn(f"samples: {reason}")
        return
    check = "check the model, its schedule and what it predicts (it may need a longer training)"
    hint = either(check, "write them anyway with force=True")
    raise DdimError("samples", f"are not plausible images: {reason}", hint)
