"""Feature statistics of a set of images, with the protocol that produced them, and their file format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ddim._io.safetensors import read_tensors, write_tensors
from ddim.errors import DdimError, either
from ddim.evaluation.moments import Moments

FORMAT = "ddim-statistics"


class Protocol(BaseModel):
    """How statistics were computed.

    Args:
        data: Name of the dataset or folder, or of the model and its plan.
        split: Split of the dataset; "" if it has none.
        fingerprint: Content hash that distinguishes datasets of the same name; "" if unknown.
        count: Number of images.
        grid: Resolution and channels of the extractor's input, such as "28x28x1".
        resize: How images of other sizes are resized to it, such as "crop, lanczos"; "" if they never are.
        extractor: Name of the extractor.
        extractor_sha256: Checksum of the extractor's weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str
    split: str = ""
    fingerprint: str = ""
    count: int = Field(ge=1)
    grid: str
    resize: str = ""
    extractor: str
    extractor_sha256: str


@dataclass(frozen=True, eq=False)
class Statistics:
    """Feature statistics of a set of images.

    Args:
        moments: Count, mean and scatter of the features of all images.
        features: Features of a subset, float32, (K, D), for metrics that need individual vectors.
        protocol: How the statistics were computed.
    """

    moments: Moments
    features: Tensor
    protocol: Protocol

    def save(self, path: Path) -> None:
        """Write a statistics file: safetensors, with the protocol in its metadata.

        Raises:
            DdimError: If it cannot be written.
        """
        tensors = {"mean": self.moments.mean, "scatter": self.moments.scatter, "features": self.features}
        write_tensors(path, tensors, {"format": FORMAT, "version": 1, "protocol": self.protocol.model_dump()})


def read(path: Path) -> Statistics:
    """Read a statistics file. Nothing in it is ever executed.

    Raises:
        DdimError: If it is not a statistics file, or holds values that are not finite or shapes that do not match.
    """
    tensors, meta = read_tensors(path)
    again = "write it again with `ddim statistics`"
    if meta.get("format") != FORMAT or meta.get("version") != 1:
        raise DdimError(path, "is not a statistics file of this version", again)
    try:
        protocol = Protocol.model_validate(meta.get("protocol"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("protocol", *first["loc"]))
        raise DdimError(path, f"has no valid protocol ({where}: {first['msg']})", again) from None
    mean, scatter, features = (tensors.get(name) for name in ("mean", "scatter", "features"))
    if mean is None or scatter is None or features is None or mean.ndim != 1:
        raise DdimError(path, "lacks a mean, scatter or features", again)
    dim = len(mean)
    if scatter.shape != (dim, dim) or features.ndim != 2 or features.shape[1] != dim:
        raise DdimError(path, "has a mean, scatter and features of different dimensions", again)
    if mean.dtype != torch.float64 or scatter.dtype != torch.float64:
        raise DdimError(path, "has moments that are not float64", again)
    features = features.float()
    if not all(torch.isfinite(part).all() for part in (mean, scatter, features)):
        raise DdimError(path, "has numbers that are not finite", "compute it again from valid images")
    return Statistics(Moments(dim, protocol.count, mean, scatter), features, protocol)


def check_comparable(a: Statistics, b: Statistics) -> None:
    """Check that two statistics were computed with the same protocol, up to the data that are compared.

    Name, split, fingerprint and count of the data may differ.

    Raises:
        DdimError: If the extractor, its checksum, the resolution or the resizing differs.
    """
    names: dict[str, Any] = {
        "extractor": "",
        "extractor_sha256": "the extractor's checksum",
        "grid": "the resolution",
        "resize": "",
    }
    for key, display in names.items():
        first, second = getattr(a.protocol, key), getattr(b.protocol, key)
        if first != second and (key != "resize" or (first and second)):  # samples are never resized
            problem = f"have different protocols: {display or key} is {first} and {second}"
            raise DdimError(
                "statistics",
                problem,
                either("compute both with one protocol", "use any_protocol=True"),
            )
