"""The options --clip, --no-clip and --force, shared by commands that sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def clip_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --clip and --no-clip."""
    text = "Clip the predicted x_0 to [-1, 1] in every step. [default: for networks that predict eps, and with sigma "
    text += "hat, as in the paper; for a diffusers folder as its own scheduler does]"
    return click.option("--clip/--no-clip", "clip_x0", default=None, help=text)(function)


def force_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --force."""
    text = "Write samples even if they are implausible: far beyond the range of pixels or of the training data."
    return click.option("--force", is_flag=True, help=text)(function)
