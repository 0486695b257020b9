"""Whether samples can be images at all: their values against the range of pixels and the recorded training data."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ddim.data.policy import DataStatistics
from ddim.errors import DdimError, either, warn
from ddim.model.config import ModelConfig

FAR, FAR_SHARE = 4.0, 0.1
"""Implausible: more than this share of all values at more than `FAR` in size; pixels are in [-1, 1]."""
BEYOND, BEYOND_SHARE, SPREAD = 1.1, 0.1, 1.5
"""Also: more than this share at more than `BEYOND`, and a spread of more than `SPREAD` times the data's."""
MOST = 1024
"""Images that `statistics_of` reads at most."""


def statistics_of(images: Any, read: Any) -> DataStatistics:
    """Mean and standard deviation of a data set, of at most `MOST` images that are evenly spaced in it.

    Args:
        images: A `ddim.data.ImageSet`.
        read: From a batch of it to floats in [-1, 1].
    """
    places = np.unique(np.linspace(0, len(images) - 1, min(MOST, len(images))).round().astype(int))
    values = read(images.batch(places)).double()
    return DataStatistics(mean=float(values.mean()), std=float(values.std(correction=0)))


def implausible(samples: Tensor, config: ModelConfig) -> str:
    """Why samples are no plausible images of a model; "" where nothing speaks against them, and for discrete data.

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
        return f"{far:.0%} of their values are beyond [-{FAR:g}, {FAR:g}], images are in [-1, 1]"
    data, beyond = config.statistics, float((size > BEYOND).double().mean())
    if data is None or beyond <= BEYOND_SHARE:
        return ""
    spread = float((values - data.mean).square().mean().sqrt())
    if spread <= SPREAD * data.std:
        return ""
    return f"their spread is {spread:.2f}, the training data's {data.std:.2f}, and {beyond:.0%} are beyond the range"


def refuse_implausible(samples: Tensor, config: ModelConfig, force: bool) -> None:
    """Stop before the first samples of a run are written, where they are not plausible.

    Args:
        samples: The first samples.
        config: The model's configuration.
        force: Whether to go on all the same.

    Raises:
        DdimError: If they are not plausible and `force` is not given.

    Warns:
        DdimWarning: If they are not plausible and `force` is given.
    """
    why = implausible(samples, config)
    if not why:
        return
    if force:
        warn(f"samples: {why}")
        return
    check = "check the model, its schedule and what it predicts (a longer training may be what it needs)"
    hint = either(check, "write them nevertheless with force=True")
    raise DdimError("samples", f"are not plausible images: {why}", hint)
