"""`ddim demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._options import OutputFolder, device_options, load_any, load_model
from ddim.cli._progress import progress_bar

if TYPE_CHECKING:
    import numpy as np

    from ddim.model.model import Model

LATENTS, SHOWN = 32, 12
TEXT = "tinyshakespeare"
STEPS = (5, 10, 20, 50, 100)


@click.command("demo")
@click.option(
    "--out",
    default="demo",
    show_default=True,
    type=OutputFolder(),
    help="Folder for the figures.",
)
@click.option("--model", default="mnist", show_default=True, help="A model of 28x28 grey digits.")
@click.option(
    "--mnist",
    help="Folder with MNIST. [default: ./mnist or ./data/mnist, else scikit-learn's digits]",
)
@device_options
def command(out: Path, model: str, mnist: str | None, device: str | None, dtype: str, compile_: bool) -> dict[str, Any]:
    """Sample 32 latents with 5 to 100 network evaluations, interpolate, encode and decode digits, and sample a text.

    \b
    Example:
      ddim demo --out demo
    """
    from ddim._io.atomic import make_folder

    loaded = load_model(model, device, dtype, compile_)
    exact = load_model(model, device, "float32" if dtype == "auto" else dtype, compile_)
    make_folder(out)
    panels = {"sample consistency": _consistency(loaded, out / "consistency.png")}
    panels["interpolation"] = _interpolation(loaded, out / "interpolation.png")
    panels["reconstruction"], caption = _reconstruction(exact, out / "reconstruction.png", mnist)
    click.echo(f"reconstruction: {caption}")
    for title, path in panels.items():
        click.echo(f"{title:19} {path.resolve()}")
    click.echo(_text(device, dtype, compile_))
    return {"figures": panels, "reconstruction": caption}


def _consistency(model: Model, path: Path) -> Path:
    """Sample the same latents with every number of steps: with eta = 0 they give the same digits."""
    import torch

    from ddim._io.png import labelled_rows, save_png
    from ddim.data.pixels import to_uint8

    rows: list[tuple[str, np.ndarray]] = []
    table = [f"{'plan':36} {'NFE':>5} {'images/s':>9}"]
    jobs = [(steps, eta) for eta in (0.0, 1.0) for steps in STEPS]
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=sum(steps for steps, _ in jobs) * LATENTS, rate="")
        for steps, eta in jobs:
            plan = model.plan(steps, eta=eta)
            started, parts = time.monotonic(), []
            for part in model.sample_blocks(plan, range(LATENTS), seed=0):
                parts.append(part)
                bar.advance(task, len(part) * plan.nfe)
            seconds = time.monotonic() - started
            table.append(f"{plan.name:36} {plan.nfe:5d} {LATENTS / seconds:9.1f}")
            rows.append((f"S={steps} eta={eta:g}", to_uint8(torch.cat(parts))))
    click.echo("\n".join(table))
    caption = f"The same {LATENTS} latents in every row. With eta = 0 the digit hardly depends on the NFE."
    save_png(path, labelled_rows(rows, caption))
    return path


def _interpolation(model: Model, path: Path) -> Path:
    import torch

    from ddim._io.png import labelled_rows, save_png
    from ddim.data.pixels import to_uint8
    from ddim.sampling.latents import slerp_path

    plan, rows = model.plan(50, sampler="ddim"), []
    for first, last in ((0, 1), (2, 3), (4, 5)):
        ends = model.noise([first, last], seed=0).start()
        images = torch.cat([*model.run_blocks(plan, slerp_path(ends[0], ends[1], 11))])
        rows.append((f"{first} to {last}", to_uint8(images)))
    save_png(path, labelled_rows(rows, "Slerp between two latents, S = 50, eta = 0", zoom=2))
    return path


def _reconstruction(model: Model, path: Path, mnist: str | None) -> tuple[Path, str]:
    from ddim import data
    from ddim._io.png import labelled_rows, save_png
    from ddim.evaluation.reconstruction import join, round_trips

    source = mnist or next((str(folder) for folder in _MNIST_FOLDERS if folder.is_dir()), None)
    if source:
        dataset, label = data.load(source, model.policy, "test", SHOWN), "MNIST test digits"
    else:
        dataset, label = (
            data.digits_as_mnist("test", SHOWN),
            "scikit-learn's 8x8 digits resized to 28x28, contrast raised",
        )
    digits = dataset.batch(range(len(dataset)))
    rows, errors = [("original", digits)], []
    for steps in (10, 50):
        trip = join(list(round_trips(model, digits, model.inversion(steps=steps))))
        rows.append((f"S={steps}", trip.again))
        errors.append(f"{trip.mse:.4f} (S={steps})")
    caption = f"{label}, encoded and decoded; mean squared error in [0, 1]: {', '.join(errors)}"
    save_png(path, labelled_rows(rows, caption, zoom=2))
    return path, caption


def _text(device: str | None, dtype: str, compile_: bool) -> str:
    """A sample of the bundled model of text, with a heading."""
    from ddim.model.model import Model

    model = load_any(TEXT, device, dtype, compile_, micro_batch=1)
    assert isinstance(model, Model)
    plan = model.plan(32, eta=0.1, temperature=0.4)
    with progress_bar(transient=True) as bar:
        task = bar.add_task("sampling text", total=1, rate="")
        [text] = model.text(model.sample(1, seed=0, plan=plan))
        bar.advance(task)
    rule = "-" * 60
    return f"{TEXT}: {plan.name}, {plan.nfe} network evaluations\n{rule}\n{text}\n{rule}"


_MNIST_FOLDERS = (Path("mnist"), Path("data/mnist"))
