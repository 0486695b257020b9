"""Reconstruction error of images after encoding and decoding: the paper's Table 2."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddim.data.pixels import to_float, to_uint8
from ddim.model.image import Model
from ddim.sampling.inversion import Inversion
from ddim.sampling.latents import reconstruction_error


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Images after encoding and decoding.

    Args:
        again: Reconstructed images, uint8 (N, H, W, C).
        error: `reconstruction_error` of each image, float64 (N,).
        largest: Largest absolute error of each image, in units of [-1, 1], float64 (N,).
        latent_std: Standard deviation of each latent's elements, float32 (N,).
        nfe: Network evaluations for encoding each image, int64 (N,).
        seconds: Time per image for encoding and decoding, float64 (N,).
    """

    again: np.ndarray
    error: Tensor
    largest: Tensor
    latent_std: Tensor
    nfe: Tensor
    seconds: Tensor

    @property
    def mse(self) -> float:
        """The mean error."""
        return float(self.error.mean())

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean over the images; None for a single image."""
        return float(self.error.std() / len(self.error) ** 0.5) if len(self.error) > 1 else None

    @property
    def rms(self) -> float:
        """Root mean squared error of images in [-1, 1]."""
        return 2 * math.sqrt(self.mse)


def round_trips(model: Model, images: np.ndarray, way: Inversion) -> Iterator[RoundTrip]:
    """Encode and decode images in micro-batches.

    Args:
        model: The model.
        images: uint8, (N, H, W, C).
        way: The inversion method and its plans, see `Model.inversion`.

    Yields:
        A `RoundTrip` of up to `model.micro_batch` images.
    """
    for part in torch.split(to_float(images), model.micro_batch):
        start_time = time.monotonic()
        [encoding] = model.encode_blocks(way, part)
        start, beside = (encoding.latents, []) if encoding.earlier is None else (encoding.earlier, [encoding.latents])
        again = torch.cat([*model.run_blocks(way.resume_plan, start, beside)]).cpu()
        yield RoundTrip(
            to_uint8(again),
            reconstruction_error(part, again),
            (part.double() - again.double()).abs().flatten(1).amax(1),
            encoding.latents.flatten(1).std(dim=1).float().cpu(),
            torch.full((len(part),), encoding.nfe),
            torch.full((len(part),), (time.monotonic() - start_time) / len(part), dtype=torch.float64),
        )


def join(parts: list[RoundTrip]) -> RoundTrip:
    """Concatenate round trips of the same plans."""
    again = np.concatenate([part.again for part in parts])
    names = ("error", "largest", "latent_std", "nfe", "seconds")
    return RoundTrip(again, *(torch.cat([getattr(part, name) for part in parts]) for name in names))
