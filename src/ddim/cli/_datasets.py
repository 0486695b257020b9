"""Shared options about data sets, and reading a data set with a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._progress import progress_bar
from ddim.errors import DdimError

if TYPE_CHECKING:
    from ddim.data import ImagePolicy, ImageSet

FITS = ("crop", "stretch", "exact")


def fit_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --fit."""
    text = "How images of another shape are resized to the model's: crop cuts out the largest centred part, stretch "
    text += "keeps the whole image, exact refuses any other size. [default: as the model was trained, mostly crop]"
    return click.option("--fit", type=click.Choice(FITS), help=text)(function)


def label_column_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --label-column."""
    text = "The column of a table or hub data set that holds the labels. [default: label]"
    return click.option("--label-column", metavar="NAME", help=text)(function)


def refit(policy: Any, fit: str | None) -> Any:
    """A model's data policy with the fit of --fit; unchanged if `fit` is None.

    Raises:
        DdimError: If the policy is for text and `fit` is not None.
    """
    if fit is None:
        return policy
    if len(policy.shape) == 1:
        raise DdimError("--fit", "applies to images only", "leave it out")
    return policy.model_copy(update={"fit": fit})


def load_images(
    data: str,
    policy: ImagePolicy | None,
    split: str,
    limit: int | None,
    skip_unreadable: bool = False,
    label_column: str | None = None,
) -> ImageSet:
    """Load the images of a command's DATA argument with a progress bar, see `ddim.data.load`."""
    from ddim.data import iter_load

    with progress_bar(transient=True) as bar:
        task = bar.add_task(f"reading {Path(data).name}", total=None, rate="")
        steps = iter_load(data, policy, split, limit, skip_unreadable, label_column)
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                images: ImageSet = end.value
                return images
            bar.update(task, completed=done, total=total)
