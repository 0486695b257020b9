"""The door to torch-fidelity: KID, precision and recall, and Inception's architecture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ddim.errors import DdimError

_KEPT: list[torch.library.Library] = []


def mend_torchvision() -> None:
    """Let torchvision be imported beside a torch whose build its compiled part does not fit.

    Without that part it fails at import on two operators that nothing here uses; they are declared, not defined.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _KEPT:
        return
    for compiled in Path(found.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(compiled))  # type: ignore[no-untyped-call]
            return
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _KEPT.append(library)


def installed() -> bool:
    """Whether torch-fidelity is there."""
    return importlib.util.find_spec("torch_fidelity") is not None


def need(what: str) -> None:
    """Refuse what torch-fidelity is needed for where it is not there.

    Args:
        what: What is asked for.

    Raises:
        DdimError: If it is not there.
    """
    if not installed():
        raise DdimError(what, "needs torch-fidelity, which is not installed", "run: pip install 'ddim[eval]'")
    mend_torchvision()


def kid(a: torch.Tensor, b: torch.Tensor, seed: int = 0, subsets: int = 50) -> dict[str, Any]:
    """KID (Binkowski et al. 2018): the unbiased squared MMD by a cubic kernel, mean and deviation over subsets.

    Being unbiased it is negative about half of the time where the two are alike, by about its deviation: it is an
    estimate of a distance, and left as it is.

    Args:
        a: Features, (N, D).
        b: Features, (M, D).
        seed: Of the subsets; the library takes 32 bits of it.
        subsets: How many.

    Returns:
        "kid", "kid_std" (of single subsets) and "kid_subset", their size: 1,000, or half of the smaller set.

    Raises:
        DdimError: If torch-fidelity is not there, or a set has fewer than four vectors.
    """
    need("KID")
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(1000, len(a) // 2, len(b) // 2)
    if size < 2:
        raise DdimError("KID", f"cannot be had of {min(len(a), len(b))} pictures", "give four or more")
    settings = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed % 2**32, "verbose": False}
    found = kid_features_to_metric(a.double(), b.double(), **settings)
    return {"kid": found[KEY_METRIC_KID_MEAN], "kid_std": found[KEY_METRIC_KID_STD], "kid_subset": size}


def precision_recall(samples: torch.Tensor, real: torch.Tensor, neighbours: int = 3) -> dict[str, Any]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) by balls of the k-th neighbour.

    Args:
        samples: Features of samples, (N, D).
        real: Features of data, (M, D).
        neighbours: k.

    Returns:
        "precision" and "recall", each in [0, 1], and "neighbours".

    Raises:
        DdimError: If torch-fidelity is not there, or a set has too few vectors.
    """
    need("precision and recall")
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(samples), len(real)) <= neighbours:
        raise DdimError("precision and recall", "of too few pictures", f"give more than {neighbours} of each")
    found = prc_features_to_metric(samples, real, prc_neighborhood=neighbours, verbose=False, save_cpu_ram=True)
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL], "neighbours": neighbours}
