"""`ddim train`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._datasets import FITS, label_column_option, load_pictures
from ddim.cli._options import check_device
from ddim.cli._progress import progress_bar
from ddim.cli._recipe import configure, put
from ddim.cli._starting import begin_with, classes_of, seconds, vocabulary
from ddim.cli.main import Stopper
from ddim.errors import DdimError
from ddim.names import LOSS_WEIGHTS

if TYPE_CHECKING:
    from ddim.data import ImageSet
    from ddim.data.text import TextSet
    from ddim.train.presets import Preset

_RECIPE = (
    "steps",
    "batch",
    "accumulate",
    "lr",
    "warmup",
    "decay",
    "ema",
    "gamma",
    "flip",
    "precision",
    "seed",
    "checkpoint_every",
    "keep",
    "preview_every",
    "log_every",
)
QUIET = 60.0  # seconds after which a line is printed where there is no terminal to show a bar


@click.command("train")
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run's folder; made, or gone on with.")
@click.option("--preset", "preset_name", help="The recipe; default: the one named like DATA.")
@click.option(
    "--list-presets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda c, p, v: _list(c, v),
    help="Show the presets and exit.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other value of the recipe: network.channels=96, schedule.name=cosine, train.decay_fraction=0.5, ...",
)
@click.option("--split", default="train", show_default=True, help="Which part of the data.")
@click.option("--limit", type=int, help="At most so many pictures.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out pictures that cannot be read, and say which.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Text: a tokenizers file. [default: characters]")
@click.option("--length", type=int, help="Text: tokens of a sequence, instead of the preset's.")
@click.option("--size", type=int, help="Side of the square the pictures are brought to, instead of the preset's.")
@click.option(
    "--fit",
    type=click.Choice(FITS),
    help="Pictures of another shape: crop cuts the largest centred part out, stretch keeps all of each, exact refuses "
    "any other size. [default: the preset's, mostly crop]",
)
@click.option("--channels", type=click.Choice(["1", "3"]), help="Grey or colour, instead of the preset's.")
@click.option("--predicts", type=click.Choice(["eps", "x0", "v"]), help="What the network predicts.")
@click.option("--labels/--no-labels", default=None, help="Learn the data's labels too, for classifier-free guidance.")
@label_column_option
@click.option("--from", "source", metavar="MODEL", help="Begin with the weights of a model, where no state is left.")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option(
    "--budget",
    callback=lambda c, p, v: v and seconds(v),
    metavar="TIME",
    help="Time for all, such as 25min, 90s or 1h30min, instead of --steps; with both, what ends first.",
)
@click.option("--batch", type=int, help="Pictures per step.")
@click.option("--accumulate", type=int, help="Parts a batch is cut into, to save memory.")
@click.option("--lr", type=float, help="Learning rate.")
@click.option("--warmup", type=int, help="Steps over which the learning rate rises.")
@click.option(
    "--decay", type=click.Choice(["none", "linear", "cosine"]), help="How the learning rate falls at the end."
)
@click.option("--ema", type=float, help="Decay of the moving average of the weights.")
@click.option(
    "--loss-weight",
    "gamma",
    type=click.Choice(LOSS_WEIGHTS),
    help="Weights gamma_t of eq. (5): simple is the paper's; vlb and theorem1 are the bound's.",
)
@click.option("--flip/--no-flip", default=None, help="Flip pictures left-right at random.")
@click.option(
    "--precision", type=click.Choice(["auto", "bfloat16", "float32"]), help="auto: bfloat16 where it is fast."
)
@click.option("--compile/--no-compile", "compile_", default=None, help="Run the network through torch.compile.")
@click.option("--seed", type=int, help="Of everything random in the training.")
@click.option("--checkpoint-every", type=int, help="Steps between checkpoints.")
@click.option("--keep", type=int, help="Checkpoints kept.")
@click.option("--preview-every", type=int, help="Steps between preview grids, 0 for none.")
@click.option("--log-every", type=int, help="Steps between lines of metrics.jsonl.")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
def command(
    data: str,
    out: Path,
    preset_name: str | None,
    split: str,
    limit: int | None,
    skip_unreadable: bool,
    tokenizer: Path | None,
    length: int | None,
    size: int | None,
    fit: str | None,
    channels: str | None,
    predicts: str | None,
    labels: bool | None,
    label_column: str | None,
    source: str | None,
    budget: float | None,
    compile_: bool | None,
    device: str | None,
    settings: tuple[str, ...],
    **given: Any,
) -> None:
    """Train a model on DATA: "digits", a folder of pictures, parquet files, a hub name such as owner/name, or a text.

    Of a single text file the first 90 % of the characters are its split train, then 5 % validation and 5 % test; a
    folder may hold train.txt, validation.txt and test.txt.

    Everything is written under --out: checkpoints, metrics, previews, and the model itself in OUT/model. Stop it
    at any moment, in any way; the same command goes on where it stopped, and ends with the same weights.

    \b
    Examples:
      ddim train digits --out runs/digits
      ddim train ./photos --preset cifar10 --out runs/photos
      ddim train ./cifar10 --preset cifar10-fast --budget 25min --out runs/cifar10
      ddim train ./shakespeare.txt --preset tinyshakespeare --out runs/text
      ddim train ./photos --preset cifar10 --size 48 --set network.channels=96 --out runs/small
    """
    began = time.monotonic()
    from ddim.train.run_config import RunConfig, check_run_dir

    name, recipe = _recipe(data, preset_name)
    of_text = len(recipe.data.shape) == 1
    about_text = {"--tokenizer": tokenizer, "--length": length}
    about_pictures = {"--size": size, "--channels": channels, "--flip": given["flip"] or None}
    about_pictures |= {"--labels": labels or None, "--skip-unreadable": skip_unreadable or None, "--fit": fit}
    about_pictures |= {"--label-column": label_column}
    _refuse_others(name, of_text, about_text, about_pictures)
    labels = (recipe.labels or label_column is not None) if labels is None else labels
    if label_column is not None and not labels:
        raise DdimError("--label-column", "is given beside --no-labels", "leave one of them out")
    changes = {
        "data": _changes(height=size, width=size, fit=fit, channels=channels and int(channels), length=length),
        "train": _changes(**{key: given[key] for key in _RECIPE}, compile=compile_, budget=budget),
        "network": {},
        "schedule": {},
        "categorical": {},
    }
    for setting in settings:
        put(changes, setting)
    if "budget" in changes["train"]:
        changes["train"].setdefault("steps", None)
    if of_text and not {"characters", "tokenizer"} & changes["data"].keys():
        changes["data"] |= vocabulary(data, tokenizer)
    model, train = configure(recipe, changes, predicts)  # what is wrong is said before any picture is read
    check_device(device)
    check_run_dir(out)
    found = _find(data, model.data, split, limit, skip_unreadable, label_column)
    if labels:
        changes["network"]["classes"] = classes_of(data, found)
        model, train = configure(recipe, changes, predicts)
    about: dict[str, Any] = {"data": found.name, "split": found.split, "limit": limit, "label_column": label_column}
    about["data_fingerprint"] = found.fingerprint()
    begun, weights = begin_with(source, model) if source else (None, None)
    _train(out, RunConfig(**about, model=model, train=train, begun=begun), found, device, weights, began)


def _recipe(data: str, name: str | None) -> tuple[str, Preset]:
    """The preset of --preset, or the one named like the data."""
    from ddim.data.text import is_text
    from ddim.train.presets import PRESETS, preset

    if name is None:
        name = (Path(data).stem if is_text(data) else Path(data).name).replace("_", "-")
        if name not in PRESETS:
            wrong = f"has no preset of its own name ({name})"
            raise DdimError(data, wrong, f"give --preset, one of {', '.join(PRESETS)}")
    recipe = preset(name)
    if is_text(data) and len(recipe.data.shape) > 1:
        raise DdimError(data, "is text", f"the preset {name} is of pictures: take --preset tinyshakespeare")
    return name, recipe


def _find(
    data: str, policy: Any, split: str, limit: int | None, skip_unreadable: bool, label_column: str | None
) -> ImageSet | TextSet:
    """The data set that a policy asks for."""
    from ddim.data.text import load_text

    if len(policy.shape) == 1:
        return load_text(data, policy, split, limit)
    return load_pictures(data, policy, split, limit, skip_unreadable, label_column)


def _changes(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _list(ctx: click.Context, wanted: bool) -> None:
    if wanted:
        from ddim.train.presets import PRESETS

        for name, recipe in PRESETS.items():
            click.echo(f"{name:16} {recipe.about}")
        ctx.exit()


def _refuse_others(preset: str, of_text: bool, text: dict[str, Any], pictures: dict[str, Any]) -> None:
    """Refuse options about text where the preset is of pictures, and the other way round."""
    for option in [option for option, value in (pictures if of_text else text).items() if value is not None]:
        kind, own = ("pictures", "text") if of_text else ("text", "pictures")
        raise DdimError(option, f"is about {kind}, the preset {preset} of {own}", "leave it out")


def _train(out: Path, config: Any, data: ImageSet | TextSet, device: str | None, weights: Any, began: float) -> None:
    import torch

    from ddim.model.modality import modality_of
    from ddim.train import run

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    line = shlex.join(["ddim", *(click.get_current_context().obj or [])])
    batch, unit = config.train.batch, modality_of(config.model).unit
    report, shown = None, 0.0
    with Stopper() as stopper, progress_bar() as bar:
        task = bar.add_task("training", total=None, rate="")
        start: tuple[float, int] | None = None
        for report in run.train(out, config, data, device, line, stopper, weights, began):
            if start is None:
                start = (time.monotonic(), report.step)
            elapsed = time.monotonic() - start[0]
            rate = (report.step - start[1]) * batch / elapsed if elapsed else 0.0
            told = f"loss {report.loss:.4f}  {rate:.0f} {unit}/s" if rate else ""
            bar.update(task, completed=report.step, total=report.steps, rate=told)
            if not bar.console.is_interactive and elapsed - shown >= QUIET and rate:
                shown = elapsed
                of = f" of about {report.steps}" if report.steps else ""
                bar.console.print(f"step {report.step}{of}: {told}, {elapsed / 60:.0f} min")
            if report.event:
                bar.console.print(f"step {report.step}: {report.event}  {told}".rstrip())
    assert report is not None
    if stopper() and not report.over:
        of = f" of {report.steps}" if report.steps else ""
        click.echo(f"stopped at step {report.step}{of}; run the same command to go on", err=True)
        raise SystemExit(stopper.code)
    done = "done" if start and start[1] < report.step else "nothing left to do"
    click.echo(f"{done}: {report.step} steps, {report.images_seen} {unit} seen; the model is {out / 'model'}")
