"""Wrapper of torch-fidelity: KID, precision and recall, and the check that it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ddim.errors import DdimError

_LIBRARIES: list[torch.library.Library] = []


def patch_torchvision() -> None:
    """Make torchvision importable if its compiled extension does not match the installed torch build.

    Without the extension, its import fails on two operators that this package does not use; they are declared here
    without an implementation.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _LIBRARIES:
        return
    for compiled in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(compiled))  # type: ignore[no-untyped-call]
            return
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)


def installed() -> bool:
    """Whether torch-fidelity is installed."""
    return importlib.util.find_spec("torch_fidelity") is not None


def need(what: str) -> None:
    """Check that torch-fidelity is installed and prepare its import.

    Args:
        what: The requested feature, for the error message.

    Raises:
        DdimError: If torch-fidelity is not installed.
    """
    if not installed():
        raise DdimError(what, "needs torch-fidelity, which is not installed", "run: pip install 'ddim[eval]'")
    patch_torchvision()


def kid(a: torch.Tensor, b: torch.Tensor, seed: int = 0, subsets: int = 50) -> dict[str, Any]:
    """KID (Binkowski et al. 2018): unbiased squared MMD with a cubic kernel, mean and standard deviation over subsets.

    For sets with the same distribution it is negative about half of the time, since it is unbiased; it is not clipped.

    Args:
        a: Features, (N, D).
        b: Features, (M, D).
        seed: Seed of the subsets; torch-fidelity uses the lower 32 bits.
        subsets: Number of subsets.

    Returns:
        "kid"; "kid_std", the standard deviation over subsets; "kid_subset", the subset size: 1,000, or half of the
        smaller set if that is less.

    Raises:
        DdimError: If torch-fidelity is not installed, or a set has fewer than four vectors.
    """
    need("KID")
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(1000, len(a) // 2, len(b) // 2)
    if size < 2:
        raise DdimError("KID", f"is not defined for {min(len(a), len(b))} images", "use four or more")
    settings = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed % 2**32, "verbose": False}
    metrics = kid_features_to_metric(a.double(), b.double(), **settings)
    return {"kid": metrics[KEY_METRIC_KID_MEAN], "kid_std": metrics[KEY_METRIC_KID_STD], "kid_subset": size}


def precision_recall(samples: torch.Tensor, real: torch.Tensor, neighbours: int = 3) -> dict[str, Any]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) with k-nearest-neighbour balls.

    Args:
        samples: Features of samples, (N, D).
        real: Features of data, (M, D).
        neighbours: k.

    Returns:
        "precision" and "recall", each in [0, 1], and "neighbours".

    Raises:
        DdimError: If torch-fidelity is not installed, or a set has k vectors or fewer.
    """
    need("precision and recall")
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(samples), len(real)) <= neighbours:
        raise DdimError("precision and recall", "need more images", f"use more than {neighbours} of each")
    metrics = prc_features_to_metric(samples, real, prc_neighborhood=neighbours, verbose=False, save_cpu_ram=True)
    return {"precision": metrics[KEY_METRIC_PRECISION], "recall": metrics[KEY_METRIC_RECALL], "neighbours": neighbours}
