"""--clip, --no-clip and --force, which commands that sample share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def clip_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--clip, --no-clip."""
    text = "Clip the predicted x0 to [-1, 1] in every step. [default: for networks that predict eps, as a diffusers "
    text += "folder's own scheduler did, and with sigma hat, as in the paper]"
    return click.option("--clip/--no-clip", "clip_x0", default=None, help=text)(function)


def force_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--force."""
    text = "Write samples that are no plausible images too: far beyond the range of pixels, or of the training data."
    return click.option("--force", is_flag=True, help=text)(function)
