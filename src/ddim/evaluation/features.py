"""Feature extractors of images, and the names of the distances in their feature spaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddim.errors import DdimError

INCEPTION = "inception"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BATCH = 64


@dataclass(frozen=True)
class Extractor:
    """A feature extractor.

    Args:
        name: Label of the distances in its feature space.
        sha256: Checksum of the weights.
        function: Function from uint8 (B, H, W, C) in [0, 255] to features (B, D).
        shape: Accepted image shape (H, W, C); None for any.
        batch: Batch size. Smaller batches are padded, so that features do not depend on the other images.
        note: Remark to print with the results.
    """

    name: str
    sha256: str
    function: Callable[[np.ndarray], Tensor]
    shape: tuple[int, int, int] | None = None
    batch: int = BATCH
    note: str = ""

    @property
    def metric(self) -> str:
        """Name of the Frechet distance in this feature space: "FID" only with Inception's standard weights."""
        return metric_name(self.name, self.sha256)

    def __call__(self, images: np.ndarray) -> Tensor:
        """Compute the features of images.

        Args:
            images: uint8, (N, H, W, C).

        Returns:
            Features, float32, (N, D), on the CPU.

        Raises:
            DdimError: If the images have another dtype or shape, or a feature is not finite.
        """
        if images.dtype != np.uint8 or images.ndim != 4:
            problem = f"are {images.dtype} {images.shape}"
            raise DdimError("images", problem, "pass uint8 (N, H, W, C), see ddim.pixels.to_uint8")
        if self.shape is not None and images.shape[1:] != self.shape:
            shown = "x".join(map(str, images.shape[1:]))
            accepted = "x".join(map(str, self.shape))
            raise DdimError(
                f"extractor {self.name}", f"accepts {accepted}, the images are {shown}", "choose another one"
            )
        parts = []
        for first in range(0, len(images), self.batch):
            part = images[first : first + self.batch]
            full = np.concatenate([part, np.repeat(part[-1:], self.batch - len(part), axis=0)])
            with torch.no_grad():
                features = self.function(full)
            if features.ndim != 2 or len(features) != self.batch:
                problem = f"returns {tuple(features.shape)} for {self.batch} images"
                raise DdimError(f"extractor {self.name}", problem, "it must return one vector per image, (B, D)")
            parts.append(features[: len(part)].to("cpu", torch.float32))
        out = torch.cat(parts)
        if not torch.isfinite(out).all():
            raise DdimError(f"extractor {self.name}", "returns numbers that are not finite", "fix it or its weights")
        return out


def metric_name(name: str, sha256: str) -> str:
    """Name of the Frechet distance in an extractor's feature space: "FID" only with Inception's standard weights."""
    return "FID" if (name, sha256) == (INCEPTION, INCEPTION_SHA256) else f"FD({name})"
