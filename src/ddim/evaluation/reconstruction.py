"""Encoding and decoding pictures and measuring what comes back: the paper's Table 2."""

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
    """Some pictures after a round trip.

    Args:
        again: What came back, uint8 (N, H, W, C).
        error: `reconstruction_error` of each, float64 (N,).
        largest: The largest error of each, of pictures in [-1, 1], float64 (N,).
        latent_std: Standard deviation of each latent's numbers, float32 (N,).
        calls: Network calls that encoding took, for each, int64 (N,).
        seconds: How long it took, up and down, for each, float64 (N,).
    """

    again: np.ndarray
    error: Tensor
    largest: Tensor
    latent_std: Tensor
    calls: Tensor
    seconds: Tensor

    @property
    def mse(self) -> float:
        """The mean error."""
        return float(self.error.mean())

    @property
    def standard_error(self) -> float | None:
        """The mean's standard error over the pictures; None for a single one."""
        return float(self.error.std() / len(self.error) ** 0.5) if len(self.error) > 1 else None

    @property
    def rms(self) -> float:
        """The root of the mean error, of pictures in [-1, 1]."""
        return 2 * math.sqrt(self.mse)


def round_trips(model: Model, pictures: np.ndarray, way: Inversion) -> Iterator[RoundTrip]:
    """Encode and decode pictures in micro-batches.

    Args:
        model: The model.
        pictures: uint8, (N, H, W, C).
        way: The method and its plans, see `Model.inversion`.

    Yields:
        A `RoundTrip` of up to `model.micro_batch` pictures.
    """
    for part in torch.split(to_float(pictures), model.micro_batch):
        begun = time.monotonic()
        [made] = model.encode_blocks(way, part)
        start, beside = (made.latents, []) if made.earlier is None else (made.earlier, [made.latents])
        again = torch.cat([*model.run_blocks(way.resume_plan, start, beside)]).cpu()
        yield RoundTrip(
            to_uint8(again),
            reconstruction_error(part, again),
            (part.double() - again.double()).abs().flatten(1).amax(1),
            made.latents.flatten(1).std(dim=1).float().cpu(),
            torch.full((len(part),), made.calls),
            torch.full((len(part),), (time.monotonic() - begun) / len(part), dtype=torch.float64),
        )


def join(parts: list[RoundTrip]) -> RoundTrip:
    """Several round trips of the same plans as one."""
    again = np.concatenate([part.again for part in parts])
    names = ("error", "largest", "latent_std", "calls", "seconds")
    return RoundTrip(again, *(torch.cat([getattr(part, name) for part in parts]) for name in names))
