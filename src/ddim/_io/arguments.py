"""Validation of arguments: numbers, sizes and tensors."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ddim.errors import DdimError, shorten

P = ParamSpec("P")
R = TypeVar("R")

GUIDANCE = 10_000.0
"""The largest guidance scale."""


def suggest_names(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: an unknown keyword argument is refused with the nearest name.

    Raises:
        DdimError: By the decorated function, for a keyword that it does not have.
    """
    names = [*inspect.signature(function).parameters]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs.keys() - {*names}:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(n for n in names if n != 'self')}"
            raise DdimError(f"{function.__name__}: argument {name}", "is unknown", hint)
        return function(*args, **kwargs)

    return checked


def whole(value: Any, name: str, least: int | None = None, most: int | None = None) -> int:
    """Check that a value is an integer in a range, and return it as an int.

    Raises:
        DdimError: If it is out of range or not an integer; floats such as 2.0 and bools are refused.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise DdimError(f"{name} {_repr(value)}", "is not an integer", "use one such as 1")
    number = int(value)
    if least is not None and number < least:
        raise DdimError(f"{name} {_repr(number)}", f"is less than {least}", f"use {least} or more")
    if most is not None and number > most:
        raise DdimError(f"{name} {_repr(number)}", f"is more than {most:,}", f"use {most:,} or less")
    return number


def finite(value: Any, name: str, most: float | None = None) -> float:
    """Check that a value is a finite real number, and return it as a float.

    Args:
        value: A number, or a tensor with one element.
        name: Its name in an error.
        most: Its largest absolute value.

    Raises:
        DdimError: If it is not a finite real number, or too large.
    """
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_real |= isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta
    try:
        number = float(value) if is_real else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DdimError(f"{name} {_repr(value)}", "is not a finite number", "use a number such as 2")
    if most is not None and abs(number) > most:
        raise DdimError(f"{name} {number:g}", f"is beyond {most:g}", "use a number such as 2")
    return number


def floats(value: Any, name: str, shape: Sequence[int] | None = None) -> Tensor:
    """Check that a value is a tensor of finite floats, (N, ...), in one pass over it.

    Args:
        value: A tensor or numpy array.
        name: Its name in an error.
        shape: Shape of one sample; None for any.

    Raises:
        DdimError: If it has another type, is on the meta device, is not floating point, has a value that is not finite,
            or its samples have another shape.
    """
    if not isinstance(value, Tensor):
        value = _tensor(value, name)
    assert isinstance(value, Tensor)
    if value.is_meta:
        raise DdimError(name, "are on the meta device, which has no data", "pass a tensor with data")
    if not value.is_floating_point():
        raise DdimError(name, f"are {value.dtype}", "pass floats in [-1, 1], see ddim.pixels.to_float")
    if shape is not None and tuple(value.shape[1:]) != tuple(shape):
        problem = f"have shape {tuple(value.shape)}, each must be {tuple(shape)}"
        raise DdimError(name, problem, "pass (N, ...) of that shape")
    if not torch.isfinite(value).all():
        raise DdimError(name, "have a number that is not finite", "remove NaN and infinity")
    return value


def _repr(value: Any) -> str:
    try:
        return shorten(repr(value))
    except ValueError:  # an integer with more digits than Python converts to text
        return "of too many digits"


def _tensor(value: Any, name: str) -> Tensor:
    try:
        if not hasattr(value, "__array__"):
            raise TypeError
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise DdimError(name, f"are of type {type(value).__name__}", "pass a tensor or a numpy array") from None
