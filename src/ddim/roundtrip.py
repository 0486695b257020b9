"""Encoding and decoding pictures and measuring what comes back: the paper's Table 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddim.latents import reconstruction_error
from ddim.model import Model
from ddim.pixels import to_float, to_uint8
from ddim.plan import Plan


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Some pictures after a round trip.

    Args:
        again: What came back, uint8 (N, H, W, C).
        error: `reconstruction_error` of each, float64 (N,).
        latent_std: Standard deviation of each latent's numbers, float32 (N,).
    """

    again: np.ndarray
    error: Tensor
    latent_std: Tensor

    @property
    def mse(self) -> float:
        """The mean error."""
        return float(self.error.mean())

    @property
    def standard_error(self) -> float | None:
        """The mean's standard error over the pictures; None for a single one."""
        return float(self.error.std() / len(self.error) ** 0.5) if len(self.error) > 1 else None


def round_trips(model: Model, pictures: np.ndarray, up: Plan, down: Plan) -> Iterator[RoundTrip]:
    """Encode and decode pictures in micro-batches.

    Args:
        model: The model.
        pictures: uint8, (N, H, W, C).
        up: The plan that encodes.
        down: The plan that decodes.

    Yields:
        A `RoundTrip` of up to `model.micro_batch` pictures.
    """
    for part in torch.split(to_float(pictures), model.micro_batch):
        latents = torch.cat([*model.run_blocks(up, part)])
        again = torch.cat([*model.run_blocks(down, latents)]).cpu()
        yield RoundTrip(to_uint8(again), reconstruction_error(part, again), latents.flatten(1).std(dim=1).cpu())


def join(parts: list[RoundTrip]) -> RoundTrip:
    """Several round trips of the same plans as one."""
    return RoundTrip(
        np.concatenate([part.again for part in parts]),
        torch.cat([part.error for part in parts]),
        torch.cat([part.latent_std for part in parts]),
    )
