"""Shared parts of commands that measure sample quality: extractor, data, and statistics with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ddim.cli._command import note
from ddim.cli._datasets import FITS, load_images, refit
from ddim.cli._options import check_device
from ddim.cli._progress import counted, run_with_progress
from ddim.errors import DdimError, warn
from ddim.names import SPACINGS

if TYPE_CHECKING:
    from ddim.data import ImagePolicy, ImageSet
    from ddim.evaluation import Extractor, Statistics

T = TypeVar("T")


def extractor_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --extractor and --inception-weights."""
    for option in (
        click.option(
            "--inception-weights",
            type=click.Path(path_type=Path),
            help="Local file of Inception weights; by default they are downloaded on first use.",
        ),
        click.option(
            "--extractor",
            help="Feature space: inception (its distance is FID), a bundled one (digits28, clothing28, colour32), or a "
            "TorchScript or torch.export file, whose code is run. [default: the bundled one that fits the data]",
        ),
    ):
        function = option(function)
    return function


def table_grid_option(default: str) -> Callable[..., Any]:
    """Add --grid, by name only: a list of timesteps fixes S, and a table has several S."""
    text = f"Rule that spaces the timesteps: {', '.join(SPACINGS)}. [default: {default}]"
    return click.option("--grid", type=click.Choice(SPACINGS), metavar="NAME", help=text)


def size_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --size and --fit."""
    text = "With --size, for images of another shape: crop cuts out the largest centred part, stretch keeps the whole "
    text += "image, exact refuses any other size. [default: crop]"
    function = click.option("--fit", type=click.Choice(FITS), help=text)(function)
    text = "Resize images to height x width x channels, such as 32x32x3. [default: not resized; all must have one size]"
    return click.option("--size", help=text)(function)


def size_policy(size: str | None, fit: str | None = None) -> ImagePolicy | None:
    """The data policy of --size and --fit; None without --size."""
    from pydantic import ValidationError

    from ddim.data import ImagePolicy

    if size is None:
        if fit is not None:
            raise DdimError("--fit", "needs --size", "add --size, such as --size 32x32x3, or leave it out")
        return None
    try:
        height, width, channels = (int(part) for part in size.split("x"))
        policy = ImagePolicy(height=height, width=width, channels=channels)
    except (ValueError, ValidationError):
        problem = "is not height x width x channels, with 1 or 3 channels"
        raise DdimError(f"--size {size}", problem, "write --size 32x32x3") from None
    return refit(policy, fit)  # type: ignore[no-any-return]


def get_extractor(
    name: str | None, weights: Path | None, shape: tuple[int, int, int], data: str, device: str | None
) -> Extractor:
    """The requested extractor, or else the bundled one that fits, which is then printed.

    Args:
        name: The value of --extractor.
        weights: The value of --inception-weights.
        shape: (H, W, C) of the images.
        data: The data set's name, which decides if two bundled extractors fit.
        device: The value of --device.
    """
    import torch

    from ddim.evaluation import extractors

    check_device(device)
    chosen = name or ("inception" if weights else extractors.choose(shape, data))
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = extractors.load(chosen, target, weights)
    if loaded.shape not in (None, shape):
        expected, actual = ("x".join(map(str, dims)) for dims in (loaded.shape or (), shape))
        raise DdimError(f"--extractor {chosen}", f"takes {expected}, the images are {actual}", "choose another one")
    if name is None:
        note(f"extractor: {loaded.name} ({loaded.note})" if loaded.note else f"extractor: {loaded.name}")
    return loaded


def get_data(data: str, policy: ImagePolicy | None, split: str | None, limit: int | None) -> ImageSet:
    """The data set of a command's DATA argument; "digits" at 28x28 is made to look like MNIST."""
    from ddim.data import digits_as_mnist

    if data == "digits" and policy is not None and policy.shape == (28, 28, 1):
        return digits_as_mnist(split or "train", limit)
    return load_images(data, policy, split or "train", limit)


def get_resized(data: str, size: str | None, fit: str | None, split: str | None, limit: int | None) -> ImageSet:
    """The images of a command that takes their resolution from --size and --fit instead of a model."""
    from ddim.data.image import MisfitError

    policy = size_policy(size, fit)
    try:
        return get_data(data, policy, split, limit)
    except MisfitError as error:
        if policy is not None:
            raise
        raise DdimError(error.subject, error.problem, "resize them with --size, such as 32x32x3") from None


def run_counting(steps: Generator[int, None, T], title: str, total: int, resumable: bool) -> T:
    """Run a generator of counts with a progress bar; on a signal, stop and exit with its code.

    Args:
        steps: Yields the number of images done; its return value is returned.
        title: The text before the bar.
        total: The number of images.
        resumable: Whether partial results are stored, so that the message proposes to resume.
    """
    initial: int | None = None

    def status(done: int, seconds: float) -> tuple[int, str]:
        nonlocal initial
        initial = done if initial is None else initial
        return done, f"{(done - initial) / seconds:.1f} images/s"

    def stopped(done: int) -> str:
        return f"{title}: {done} of {total}" + ("; run the same command to resume" if resumable else "")

    return run_with_progress(steps, title, total, status, stopped)


def reference_statistics(data: ImageSet, extractor: Extractor, folder: Path | None) -> Statistics:
    """Statistics of a data set.

    Args:
        data: The data.
        extractor: The feature space.
        folder: Where the statistics are stored, and resumed from; not stored if None.
    """
    from ddim._io.atomic import make_folder
    from ddim.evaluation import from_data, iter_measure
    from ddim.evaluation.fid_table import digest

    images = from_data(data)
    if images.count < 2:
        raise DdimError(data.name, "has one image", "use two or more, better thousands")
    path = folder and folder / f"{data.split}-{digest(images.what, extractor)}.safetensors"
    if folder is not None:
        make_folder(folder)
    statistics, _ = run_counting(
        iter_measure(images, extractor, path), f"features of {data.name}", images.count, path is not None
    )
    count, dim = statistics.moments.count, statistics.moments.dim
    if count <= dim:
        warn(f"{data.name}: {counted(count, 'images')} for {dim} features: the distance means little")
    return statistics
