"""`ddim train`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim._io import limits
from ddim._io.atomic import write_atomic
from ddim.cli._command import detail
from ddim.cli._datasets import FITS, label_column_option, load_images
from ddim.cli._fitting import fitted
from ddim.cli._options import OutputFolder, check_device, output_file, resolution
from ddim.cli._progress import counted, duration, progress_bar, suggest_sampling
from ddim.cli._ranges import BATCH, COUNT, POSITIVE, SEED, Real, Whole
from ddim.cli._recipe import add_setting, configure
from ddim.cli._recipe_file import PARTS
from ddim.cli._resume import resumed
from ddim.cli._starting import classes_of, initial_weights, seconds, vocabulary
from ddim.cli.main import Stopper, started
from ddim.errors import DdimError
from ddim.names import LOGGERS, LOSS_WEIGHTS

if TYPE_CHECKING:
    from ddim.data import ImageSet
    from ddim.data.text import TextSet
    from ddim.train.presets import Preset

_TRAIN_OPTIONS = (
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
QUIET = 60.0  # seconds between progress lines without a terminal


@click.command("train")
@click.argument("data", required=False)
@click.option("--out", type=OutputFolder(), help="Run directory; created or resumed.  [required]")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Resume this run with the command that started it; only options that do not change its steps can be added.",
)
@click.option("--preset", "preset_name", help="Training preset. [default: the one named like DATA]")
@click.option(
    "--list-presets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda c, p, v: _list(c, v),
    help="List the presets and exit.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting: network.channels=96, schedule.name=cosine, train.decay_fraction=0.5, ...; --set help "
    "lists all keys with their values.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Recipe file, YAML as --show prints it, with all or some of its keys; other options override it.",
)
@click.option("--save-config", type=click.Path(path_type=Path), metavar="FILE", help="Also write the recipe to a file.")
@click.option("--show", is_flag=True, help="Print the whole recipe, with all options applied, and exit.")
@click.option("--split", default="train", show_default=True, help="Split of the data.")
@click.option("--limit", type=COUNT, help="Maximum number of images.")
@click.option(
    "--skip-unreadable", is_flag=True, help="Skip images that cannot be read, with a warning that lists them."
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Text: tokenizers file. [default: characters]")
@click.option("--length", type=Whole(1, limits.LENGTH), help="Text: tokens per sequence, instead of the preset's.")
@click.option(
    "--size",
    callback=lambda c, p, v: resolution(v),
    metavar="SIDE|HxW",
    help="Resize images to a square of this side, or to height x width, instead of the preset's.",
)
@click.option(
    "--fit",
    type=click.Choice(FITS),
    help="How images of another shape are resized: crop cuts out the largest centred part, stretch keeps the whole "
    "image, exact refuses any other size. [default: the preset's, mostly crop]",
)
@click.option("--channels", type=click.Choice(["1", "3"]), help="Grey or colour, instead of the preset's.")
@click.option("--predicts", type=click.Choice(["eps", "x0", "v"]), help="What the network predicts.")
@click.option("--labels/--no-labels", default=None, help="Train with the data's labels, for classifier-free guidance.")
@label_column_option
@click.option("--from", "source", metavar="MODEL", help="Initialise a new run with a model's weights.")
@click.option("--steps", type=COUNT, help="Number of optimiser steps.")
@click.option(
    "--budget",
    callback=lambda c, p, v: v and seconds(v),
    metavar="TIME",
    help="Total time, such as 25min, 90s or 1h30min, instead of --steps; with both, whichever ends first.",
)
@click.option("--batch", type=BATCH, help="Images or sequences per step.")
@click.option("--accumulate", type=BATCH, help="Number of parts a batch is split into, to save memory.")
@click.option("--lr", type=POSITIVE, help="Learning rate.")
@click.option("--warmup", type=Whole(0, limits.COUNT), help="Steps of learning-rate warmup.")
@click.option("--decay", type=click.Choice(["none", "linear", "cosine"]), help="Learning-rate decay at the end.")
@click.option("--ema", type=Real(0, 1), help="Decay of the exponential moving average of the weights.")
@click.option(
    "--loss-weight",
    "gamma",
    type=click.Choice(LOSS_WEIGHTS),
    help="Weights gamma_t of eq. (5): simple is the paper's; vlb and theorem1 are those of the variational bound.",
)
@click.option("--flip/--no-flip", default=None, help="Flip images left-right at random.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    help="Training precision; auto is bfloat16 where it is fast.",
)
@click.option("--compile/--no-compile", "compile_", default=None, help="Run the network through torch.compile.")
@click.option("--seed", type=SEED, help="Seed of all randomness in training.")
@click.option("--checkpoint-every", type=COUNT, help="Steps between checkpoints.")
@click.option("--keep", type=COUNT, help="Number of checkpoints to keep.")
@click.option("--preview-every", type=Whole(0, limits.COUNT), help="Steps between preview sheets, 0 for none.")
@click.option("--log-every", type=COUNT, help="Steps between lines of metrics.jsonl.")
@click.option(
    "--log",
    type=click.Choice(LOGGERS),
    help="Log the metrics to this as well as to metrics.jsonl. [default: tensorboard, if installed]",
)
@click.option("--device", help="cpu, cuda, ... [default: a GPU if there is one]")
def command(
    data: str | None,
    out: Path | None,
    resume: Path | None,
    config_file: Path | None,
    save_config: Path | None,
    show: bool,
    preset_name: str | None,
    split: str,
    limit: int | None,
    skip_unreadable: bool,
    tokenizer: Path | None,
    length: int | None,
    size: tuple[int, int] | None,
    fit: str | None,
    channels: str | None,
    predicts: str | None,
    labels: bool | None,
    label_column: str | None,
    source: str | None,
    budget: float | None,
    compile_: bool | None,
    device: str | None,
    log: str | None,
    settings: tuple[str, ...],
    **options: Any,
) -> dict[str, Any]:
    """Train a model on DATA: "digits", a folder of images, parquet files, a hub name such as owner/name, or a text.

    A single text file is split into the first 90 % of its characters (train), then 5 % (validation) and 5 % (test). A
    folder can contain train.txt, validation.txt and test.txt.

    Everything is written under --out: checkpoints, metrics, previews, and the model itself in OUT/model. A run can be
    stopped or killed at any time; --resume RUN, or the same command again, resumes it, with the same final weights.

    \b
    Examples:
      ddim train digits --out runs/digits
      ddim train ./photos --preset photos --budget 30min --out runs/photos
      ddim train ./cifar10 --preset cifar10-fast --budget 25min --out runs/cifar10
      ddim train ./shakespeare.txt --preset tinyshakespeare --out runs/text
      ddim train ./photos --preset photos --size 48x64 --budget 8h --out runs/night
      ddim train --resume runs/photos
      ddim train --preset cifar10 --show > recipe.yaml
      ddim train ./photos --config recipe.yaml --out runs/photos
    """
    start_time = started()
    if resume is not None:
        return resumed(resume)
    from ddim.cli._recipe_file import as_values, changed, check_keys, listing, read_recipe, settings_of, to_yaml
    from ddim.train.logger import check_logger
    from ddim.train.presets import preset
    from ddim.train.run_config import RunConfig, check_run_dir

    check_logger(log)
    file = {} if config_file is None else read_recipe(config_file)
    preset_name = preset_name or file.get("preset")
    if "help" in settings and data is preset_name is None:
        click.echo(listing(None, settings_of(None)))
        return {"settings": settings_of(None)}
    if data is None and not (preset_name and (show or "help" in settings)):
        raise click.MissingParameter(param_hint="'DATA'", param_type="argument")
    if out is None and not (show or "help" in settings):
        raise click.MissingParameter(param_hint="'--out'", param_type="option")
    name, recipe = (preset_name or "", preset(preset_name or "")) if data is None else _recipe(data, preset_name)
    if file:
        check_keys(recipe, [(str(config_file), f"{part}.{key}") for part in PARTS for key in file.get(part, {})])
        recipe = changed(recipe, file, file.get("predicts"), file.get("labels"))
    if "help" in settings:
        click.echo(listing(name, settings_of(recipe)))
        return {"settings": settings_of(recipe)}
    check_keys(recipe, [(f"--set {setting}", setting.partition("=")[0]) for setting in settings])
    of_text = len(recipe.data.shape) == 1
    text_options = {"--tokenizer": tokenizer, "--length": length}
    image_options = {"--size": size, "--channels": channels, "--flip": options["flip"] or None}
    image_options |= {"--labels": labels or None, "--skip-unreadable": skip_unreadable or None, "--fit": fit}
    image_options |= {"--label-column": label_column}
    _check_modality(name, of_text, text_options, image_options)
    labels = (recipe.labels or label_column is not None) if labels is None else labels
    if label_column is not None and not labels:
        raise DdimError("--label-column", "cannot be combined with --no-labels", "leave one of them out")
    changes = {
        "data": _changes(fit=fit, channels=channels and int(channels), length=length)
        | (dict(zip(("height", "width"), size, strict=True)) if size else {}),
        "train": _changes(**{key: options[key] for key in _TRAIN_OPTIONS}, compile=compile_, budget=budget),
        "network": {},
        "schedule": {},
        "categorical": {},
    }
    if show or save_config is not None:
        shown = {part: {**values} for part, values in changes.items()}
        for setting in settings:
            add_setting(shown, setting)
        values = as_values(name, changed(recipe, shown, predicts, labels))
        if save_config is not None:
            write_atomic(output_file(save_config), to_yaml(values).encode())
        if show:
            click.echo(to_yaml(values), nl=False)
            return values
    assert data is not None
    assert out is not None
    for setting in settings:
        add_setting(changes, setting)
    if "budget" in changes["train"]:
        changes["train"].setdefault("steps", None)
    elif name == "photos" and not file and "steps" in changes["train"]:
        changes["train"]["budget"] = None
    if of_text and not {"characters", "tokenizer"} & changes["data"].keys():
        changes["data"] |= vocabulary(data, tokenizer)
    model, train = configure(recipe, changes, predicts)  # report bad settings before any image is read
    check_device(device)
    check_run_dir(out)
    dataset = _load(data, model.data, split, limit, skip_unreadable, label_column)
    if labels:
        changes["network"]["classes"] = classes_of(data, dataset)
    device = device or _default_device()
    model, train = fitted("" if file else name, recipe, changes, predicts, dataset, device, out)
    record: dict[str, Any] = {
        "data": dataset.name,
        "split": dataset.split,
        "limit": limit,
        "label_column": label_column,
    }
    record["data_fingerprint"] = dataset.fingerprint()
    origin, weights = initial_weights(source, model) if source else (None, None)
    detail(f"{model.network}, precision {train.precision}; {len(dataset)} items of {dataset.name}")
    config = RunConfig(**record, model=model, train=train, init_from=origin)
    return _train(out, config, dataset, device, weights, start_time, log)


def _recipe(data: str, name: str | None) -> tuple[str, Preset]:
    """The name and preset of --preset, or of the preset named like the data."""
    from ddim.data.text import is_text
    from ddim.train.presets import PRESETS, preset

    if name is None:
        name = (Path(data).stem if is_text(data) else Path(data).name).replace("_", "-")
        if name not in PRESETS:
            problem = f"has no preset of the same name ({name})"
            raise DdimError(data, problem, f"use --preset with one of {', '.join(PRESETS)}")
    recipe = preset(name)
    if is_text(data) and len(recipe.data.shape) > 1:
        raise DdimError(data, "is text", f"the preset {name} is for images: use --preset tinyshakespeare")
    return name, recipe


def _load(
    data: str, policy: Any, split: str, limit: int | None, skip_unreadable: bool, label_column: str | None
) -> ImageSet | TextSet:
    """Load the data set for a data policy, of images or text."""
    from ddim.data.text import load_text

    if len(policy.shape) == 1:
        return load_text(data, policy, split, limit)
    return load_images(data, policy, split, limit, skip_unreadable, label_column)


def _changes(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _list(ctx: click.Context, requested: bool) -> None:
    if requested:
        from ddim.train.presets import PRESETS

        for name, recipe in PRESETS.items():
            click.echo(f"{name:16} {recipe.about}")
        ctx.exit()


def _check_modality(preset: str, of_text: bool, text: dict[str, Any], images: dict[str, Any]) -> None:
    """Refuse options about text if the preset is for images, and the reverse."""
    for option in [option for option, value in (images if of_text else text).items() if value is not None]:
        applies_to, preset_data = ("images", "text") if of_text else ("text", "images")
        raise DdimError(option, f"applies to {applies_to}, the preset {preset} is for {preset_data}", "leave it out")


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _train(
    out: Path,
    config: Any,
    data: ImageSet | TextSet,
    device: str,
    weights: Any,
    start_time: float,
    log: str | None,
) -> dict[str, Any]:
    from ddim.model.modality import modality_of
    from ddim.train import run

    line = shlex.join(["ddim", *(click.get_current_context().obj or [])])
    batch, unit = config.train.batch, modality_of(config.model).unit
    report, printed = None, 0.0
    with Stopper("stopping and saving; Ctrl-C again stops without saving") as stopper, progress_bar() as bar:
        task = bar.add_task("training", total=None, rate="")
        start: tuple[float, int] | None = None
        for report in run.train(out, config, data, device, line, stopper, weights, start_time, stopper, log):
            if start is None:
                start = (time.monotonic(), report.step)
            elapsed = time.monotonic() - start[0]
            rate = (report.step - start[1]) * batch / elapsed if elapsed else 0.0
            status = f"loss {report.loss:.4f}  {rate:.0f} {unit}/s" if rate else ""
            exact: dict[str, Any] = (
                {} if report.left is None else {"left": report.left}
            )  # the bar estimates it otherwise
            bar.update(task, completed=report.step, total=report.steps, rate=status, **exact)
            if not bar.console.is_interactive and elapsed - printed >= QUIET and rate:
                printed = elapsed
                of = f" of about {report.steps}" if report.steps else ""
                bar.console.print(f"step {report.step}{of}: {status}, {duration(elapsed)}")
            if report.event:
                bar.console.print(f"step {report.step}: {report.event}  {status}".rstrip())
    assert report is not None
    if stopper() and not report.over:
        of = f" of {report.steps}" if report.steps else ""
        click.echo(f"stopped at step {report.step}{of}; resume with `ddim train --resume {out}`", err=True)
        raise SystemExit(stopper.code)
    done = "done" if start and start[1] < report.step else "nothing left to do"
    seen = f"{counted(report.images_seen, unit)} seen"
    click.echo(f"{done}: {counted(report.step, 'steps')}, {seen}; the model is {out / 'model'}")
    suggest_sampling(out, config.model)
    results = {"step": report.step, "images_seen": report.images_seen, "loss": report.loss}
    return {"out": out, "model": out / "model", **results}
