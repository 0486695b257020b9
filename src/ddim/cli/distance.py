"""`ddim distance`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._command import note
from ddim.cli._measuring import extractor_options, get_extractor, get_resized, run_counting, size_option
from ddim.cli._options import output_file
from ddim.cli._progress import counted
from ddim.cli._ranges import COUNT
from ddim.errors import DdimError

if TYPE_CHECKING:
    from ddim.evaluation import Statistics


@click.command("distance")
@click.argument("samples")
@click.argument("data")
@click.option("--split", help="Split of SAMPLES, if it is a data set. [default: train]")
@click.option("--against-split", help="Split of DATA, if it is a data set. [default: train]")
@click.option("--limit", type=COUNT, help="Maximum number of images of each set that is not a statistics file.")
@size_option
@extractor_options
@click.option("--any-protocol", is_flag=True, help="Compare statistics even if their protocols differ.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the results as JSON.")
@click.option("--device", help="cpu, cuda, ... [default: a GPU if there is one]")
def command(
    samples: str,
    data: str,
    split: str | None,
    against_split: str | None,
    limit: int | None,
    size: str | None,
    fit: str | None,
    extractor: str | None,
    inception_weights: Path | None,
    any_protocol: bool,
    out: Path | None,
    device: str | None,
) -> dict[str, Any]:
    """Measure the distance of SAMPLES from DATA: FID or another Frechet distance, KID, precision and recall.

    Each is a samples folder, any folder of images, parquet files, or a statistics file.

    \b
    Examples:
      ddim distance samples ./mnist
      ddim distance ./mnist mnist-test.safetensors
      ddim distance samples ./photos --size 64x64x3 --extractor inception
    """
    from ddim.evaluation import check_comparable, distances
    from ddim.evaluation.distances import FEWEST
    from ddim.evaluation.features import metric_name
    from ddim.evaluation.report.tables import number, write_json

    if out is not None:
        output_file(out)
    if extractor is not None and all(Path(source).suffix == ".safetensors" for source in (samples, data)):
        raise DdimError("--extractor", "does not apply to two statistics files", "leave it out")

    def measured(source: str, part: str | None) -> Statistics:
        from ddim.evaluation import from_data, iter_measure, read_statistics

        if Path(source).suffix == ".safetensors":
            if part is not None:
                raise DdimError(source, "is a statistics file, which has no splits", "leave the split out")
            return read_statistics(Path(source))
        dataset = get_resized(source, size, fit, part, limit)
        feature_space = get_extractor(extractor, inception_weights, dataset.policy.shape, dataset.name, device)
        images = from_data(dataset)
        return run_counting(
            iter_measure(images, feature_space), f"features of {dataset.name}", images.count, resumable=False
        )[0]

    first, second = measured(samples, split), measured(data, against_split)
    if not any_protocol:
        check_comparable(first, second)
    figures = distances(first, second, any_protocol=any_protocol)
    protocol = first.protocol
    metric = metric_name(protocol.extractor, protocol.extractor_sha256)
    spread = "" if figures["fd_error"] is None else f" +- {number(figures['fd_error'], 2)} (standard error)"
    click.echo(
        f"{metric} {figures['fd']:.5g}{spread}, {counted(protocol.count, 'images')} against {second.protocol.count}"
    )
    if figures["fd_limit"] is not None:
        estimate = (
            f"{figures['fd_limit']:.4g} +- {number(figures['fd_limit_error'], 2)} (standard error of the extrapolation)"
        )
        click.echo(f"extrapolated to infinitely many samples: {estimate}")
    if figures["kid"] is not None:
        click.echo(f"KID {figures['kid']:.5g} +- {number(figures['kid_std'], 2)} (standard deviation over subsets)")
        click.echo(f"precision {figures['precision']:.4f}, recall {figures['recall']:.4f}")
    else:
        few = min(len(first.features), len(second.features)) < FEWEST
        reason = f"{FEWEST} images of each set" if few else "torch-fidelity (pip install 'ddim[eval]')"
        note(f"note: KID, precision and recall are left out: they need {reason}")
    protocols = {"samples": protocol.model_dump(), "data": second.protocol.model_dump()}
    results: dict[str, Any] = {"metric": metric, **protocols, **figures}
    if out is not None:
        write_json(out, {"format": "ddim-distance", "version": 1, **results})
        click.echo(f"results: {out}")
    return results
