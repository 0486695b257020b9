"""`ddim statistics`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddim.cli._measuring import extractor_options, get_extractor, get_resized, run_counting, size_option
from ddim.cli._options import output_file
from ddim.cli._progress import counted
from ddim.cli._ranges import COUNT


@click.command("statistics")
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Statistics file, *.safetensors.")
@click.option("--split", help="Split of a data set: train or test. [default: train]")
@click.option("--limit", type=COUNT, help="Maximum number of images.")
@size_option
@extractor_options
@click.option("--device", help="cpu, cuda, ... [default: a GPU if there is one]")
def command(
    data: str,
    out: Path,
    split: str | None,
    limit: int | None,
    size: str | None,
    fit: str | None,
    extractor: str | None,
    inception_weights: Path | None,
    device: str | None,
) -> dict[str, Any]:
    """Write the feature statistics of DATA (a folder, parquet files, a hub name) with their protocol.

    If the images have several sizes, --size resizes them to one; the protocol in the file records how.

    \b
    Examples:
      ddim statistics ./mnist --split test --out mnist-test.safetensors
      ddim statistics ./photos --size 64x64x3 --extractor inception --out photos.safetensors
    """
    from ddim.evaluation import from_data, iter_measure

    output_file(out)
    dataset = get_resized(data, size, fit, split, limit)
    feature_space = get_extractor(extractor, inception_weights, dataset.policy.shape, dataset.name, device)
    images = from_data(dataset)
    statistics, _ = run_counting(
        iter_measure(images, feature_space), f"features of {dataset.name}", images.count, resumable=False
    )
    statistics.moments.covariance  # raises an error for a single image  # noqa: B018
    statistics.save(out)
    moments = statistics.moments
    description = (
        f"{counted(moments.count, 'images')} {images.grid}, {counted(moments.dim, 'features')} of {feature_space.name}"
    )
    click.echo(f"{description}: {out}")
    return {"out": out, "n": moments.count, "features": moments.dim, "extractor": feature_space.name}
