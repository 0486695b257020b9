"""Checks of what a caller passes in: numbers, sizes and tensors, refused at the entry with their name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddim.errors import DdimError, shorten

GUIDANCE = 10_000.0
"""The largest scale of guidance."""


def whole(value: Any, name: str, least: int | None = None, most: int | None = None) -> int:
    """A whole number in a range, as an int.

    Raises:
        DdimError: If it is not one; a float such as 1.5 or 2.0 is none, nor is True.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise DdimError(f"{name} {_shown(value)}", "is not a whole number", "give one such as 1")
    made = int(value)
    if least is not None and made < least:
        raise DdimError(f"{name} {_shown(made)}", f"is less than {least}", f"give {least} or more")
    if most is not None and made > most:
        raise DdimError(f"{name} {_shown(made)}", f"is more than {most:,}", f"give {most:,} or less")
    return made


def finite(value: Any, name: str, most: float | None = None) -> float:
    """A finite real number, as a float.

    Args:
        value: The number.
        name: What to call it in an error.
        most: Its largest absolute value.

    Raises:
        DdimError: If it is not one, or larger.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    real |= isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta
    try:
        made = float(value) if real else math.nan
    except OverflowError:
        made = math.inf
    if not math.isfinite(made):
        raise DdimError(f"{name} {_shown(value)}", "is not a finite number", "give a number such as 2")
    if most is not None and abs(made) > most:
        raise DdimError(f"{name} {made:g}", f"is beyond {most:g}", "give a number such as 2")
    return made


def floats(value: Any, name: str, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of finite floats with one entry per sample; one pass over it.

    Args:
        value: The tensor, or a numpy array.
        name: What to call it in an error.
        shape: Shape of one sample; None for any.

    Raises:
        DdimError: If it is something else, holds no numbers (meta) or complex ones, or one that is not finite, or its
            samples are of another shape.
    """
    if not isinstance(value, Tensor):
        value = _tensor(value, name)
    assert isinstance(value, Tensor)
    if value.is_meta:
        raise DdimError(name, "are on the device meta, which holds no numbers", "give a tensor with numbers")
    if not value.is_floating_point():
        raise DdimError(name, f"are {value.dtype}", "give floats in [-1, 1], see ddim.pixels.to_float")
    if shape is not None and tuple(value.shape[1:]) != tuple(shape):
        wrong = f"are {tuple(value.shape)}, the model's are {tuple(shape)} each"
        raise DdimError(name, wrong, "give (N, ...) of this model's shape")
    if not torch.isfinite(value).all():
        raise DdimError(name, "hold a number that is not finite", "find where it comes from")
    return value


def _shown(value: Any) -> str:
    try:
        return shorten(repr(value))
    except ValueError:  # a whole number of more digits than Python prints
        return "of very many digits"


def _tensor(value: Any, name: str) -> Tensor:
    try:
        if not hasattr(value, "__array__"):
            raise TypeError
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise DdimError(name, f"are of type {type(value).__name__}", "give a tensor or a numpy array") from None
