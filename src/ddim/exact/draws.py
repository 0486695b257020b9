"""What the instruments share: draws, where sample i is a function of (seed, i), and distributions over K kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.process.rng import Noise

# Rows of a plan count up from 0, and the orders of a training use the last number of all. These two are nobody's, so
# that data drawn with a seed is independent of a run's noise with the same seed.
DATA = 2**64 - 4
NOISE = 2**64 - 5


def normals(n: int, seed: int, shape: tuple[int, ...], row: int = DATA) -> Tensor:
    """Standard normal numbers (single precision, cast): float64, (n, *shape).

    Raises:
        DdimError: If the seed is out of range.
    """
    return Noise(seed, tuple(range(n)), shape).row(row).double()


def uniforms(n: int, seed: int, length: int, row: int = DATA) -> Tensor:
    """Numbers in (0, 1), the normal distribution function of `normals`: float64, (n, length)."""
    u: Tensor = torch.special.ndtr(normals(n, seed, (length,), row))
    return u


def distribution(name: str, given: Tensor | None, size: int | None) -> Tensor:
    """A checked distribution.

    Args:
        name: What to call it in messages.
        given: (K,), >= 0, of sum 1 but for rounding in single precision, which is divided away; uniform if None.
        size: K, or None if any will do.

    Returns:
        float64, (K,).

    Raises:
        DdimError: If it is none, or not of that size.
    """
    if given is None:
        assert size is not None
        return torch.full((size,), 1 / size, dtype=torch.float64)
    vector = torch.as_tensor(given).double()
    if vector.ndim != 1 or not len(vector) or (size is not None and len(vector) != size):
        wanted = "(K,)" if size is None else f"({size},)"
        raise DdimError(f"{name} of shape {tuple(vector.shape)}", "does not fit", f"give {wanted}")
    if not bool((vector >= 0).all()) or not abs(float(vector.sum()) - 1) <= 1e-5:
        raise DdimError(name, "is no distribution", "give numbers >= 0 of sum 1")
    return vector / vector.sum()
