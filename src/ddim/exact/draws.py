"""Shared by the data distributions: draws, where sample i is a function of (seed, i), and validation of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.process.rng import Noise

# Row numbers of `Noise` that nothing else uses: plan rows count up from 0, and the data order of a training uses the
# largest number. So data drawn with a seed is independent of a run's noise with the same seed.
DATA = 2**64 - 4
NOISE = 2**64 - 5


def normals(n: int, seed: int, shape: tuple[int, ...], row: int = DATA) -> Tensor:
    """Standard normal numbers, drawn in float32 and cast to float64: (n, *shape).

    Raises:
        DdimError: If the seed is out of range.
    """
    return Noise(seed, tuple(range(n)), shape).row(row).double()


def uniforms(n: int, seed: int, length: int, row: int = DATA) -> Tensor:
    """Uniform numbers in (0, 1), the normal CDF of `normals`: float64, (n, length)."""
    u: Tensor = torch.special.ndtr(normals(n, seed, (length,), row))
    return u


def distribution(name: str, probabilities: Tensor | None, size: int | None) -> Tensor:
    """Validate the probabilities of a discrete distribution.

    Args:
        name: Its name in error messages.
        probabilities: (K,), >= 0, of sum 1 up to float32 rounding, which is normalised away; uniform if None.
        size: K, or None for any size.

    Returns:
        float64, (K,).

    Raises:
        DdimError: If it is not a distribution, or not of that size.
    """
    if probabilities is None:
        assert size is not None
        return torch.full((size,), 1 / size, dtype=torch.float64)
    vector = torch.as_tensor(probabilities).double()
    if vector.ndim != 1 or not len(vector) or (size is not None and len(vector) != size):
        expected = "(K,)" if size is None else f"({size},)"
        raise DdimError(f"{name} of shape {tuple(vector.shape)}", "is not valid", f"pass {expected}")
    if not bool((vector >= 0).all()) or not abs(float(vector.sum()) - 1) <= 1e-5:
        raise DdimError(name, "is not a distribution", "use numbers >= 0 of sum 1")
    return vector / vector.sum()
