"""Inception v3 features for FID, with the weights ported from TensorFlow, as computed by torch-fidelity."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim._io.atomic import sha256
from ddim._io.reading import check_file
from ddim.errors import DdimError
from ddim.evaluation import fidelity
from ddim.evaluation.features import INCEPTION, Extractor
from ddim.evaluation.features import INCEPTION_SHA256 as SHA256

FILE = "weights-inception-2015-12-05-6726825d.pth"
LAYER = "2048"
LARGEST = 1 << 30  # size limit in bytes; the file has 95 million


def inception(
    weights: Path | None = None, device: torch.device | str = "cpu", expected: str = SHA256, batch: int = 32
) -> Extractor:
    """Extractor of Inception v3's 2,048 pooled features; greyscale images are repeated to RGB.

    Args:
        weights: Local weights file; by default torch-fidelity's download, stored in torch's cache.
        device: Device to run on.
        expected: SHA-256 that the file must have. With any but the standard one the extractor is not named
            "inception", and distances in its feature space are not called FID.
        batch: Batch size.

    Raises:
        DdimError: If torch-fidelity is not installed, or the weights are missing, damaged or cannot be downloaded.
    """
    fidelity.need("Inception")
    path = _downloaded() if weights is None else weights
    check_file(path, LARGEST, f"use {FILE}, or remove the option to download it")
    digest = sha256(path)
    if digest != expected:
        problem = f"has SHA-256 {digest[:12]}..., not {expected[:12]}..."
        raise DdimError(path, problem, f"use the file {FILE}, or remove it to download it again")
    network = _network(path).to(device)
    name = INCEPTION if digest == SHA256 else f"inception-{digest[:8]}"

    def function(images: np.ndarray) -> Tensor:
        rgb = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
        [features] = network(torch.from_numpy(np.ascontiguousarray(rgb.transpose(0, 3, 1, 2))).to(device))
        return torch.as_tensor(features)

    return Extractor(name, digest, function, batch=batch)


def _network(path: Path) -> Any:
    """torch-fidelity's network with the weights of a file.

    torch-fidelity would unpickle the file, so it is read here with `weights_only` and passed on re-saved.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        buffer = io.BytesIO()
        torch.save({str(key): torch.as_tensor(value) for key, value in state.items()}, buffer)
        buffer.seek(0)
        return FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], feature_extractor_weights_path=buffer)
    except Exception as error:  # torch and its unpickler raise many exception types
        reason = str(error).strip().splitlines()[0]
        raise DdimError(path, f"does not hold Inception's weights ({reason})", f"use the file {FILE}") from None


def _downloaded() -> Path:
    """The path of the weights in torch's cache, downloaded if missing."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=SHA256[:8], progress=False)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "reason", None) or error
            problem = f"are missing and cannot be downloaded ({reason})"
            hint = f"use --inception-weights {FILE}, or a bundled extractor"
            raise DdimError("Inception's weights", problem, hint) from None
    return path
