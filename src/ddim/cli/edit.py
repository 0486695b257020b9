"""`ddim edit`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._clipping import clip_option, force_option
from ddim.cli._options import OutputFolder, device_options, grid_option, load_model, numbers, output_file, steps_option
from ddim.cli._progress import counted, run_sampling
from ddim.cli._ranges import COUNT, SEED, TIMES, Real, Whole
from ddim.errors import DdimError, warn

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ddim.evaluation.sample_folder import Edit
    from ddim.model.model import Model
    from ddim.plan.plan import Plan
    from ddim.sampling.x0_hooks import Operator

STEPS = 50
ETA = 0.85
ROUNDS = 5


@click.command("edit")
@click.argument("model")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=OutputFolder(), help="Folder of variants; created or resumed.")
@click.option("-n", "n", type=COUNT, default=8, show_default=True, help="Number of variants.")
@click.option("--start-at", type=TIMES, help="Start from IMAGE noised to this timestep, 1..T; lower keeps more.")
@click.option("--mask", type=click.Path(path_type=Path), help="Mask image: white is kept, black is filled in.")
@click.option("--upscale", type=Whole(2), help="Super-resolution: IMAGE is this many times smaller than the model's.")
@click.option("--colour", is_flag=True, help="Colourise IMAGE, taken as grey.")
@steps_option(STEPS)
@grid_option()
@click.option("--eta", type=Real(0), default=ETA, show_default=True, help="Noise scale: 0 is DDIM, 1 is DDPM.")
@clip_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the run.")
@click.option("--label", type=Whole(), help="Label, for a model trained with labels.")
@click.option("--guidance", type=Real(), help="Scale of classifier-free guidance, with --label.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write one PNG: IMAGE, its fixed part, variants.")
@force_option
@device_options
def command(
    model: str,
    image: Path,
    out: Path,
    n: int,
    start_at: int | None,
    mask: Path | None,
    upscale: int | None,
    colour: bool,
    steps: int | None,
    grid: str | None,
    eta: float,
    clip_x0: bool | None,
    seed: int,
    label: int | None,
    guidance: float | None,
    sheet: Path | None,
    force: bool,
    device: str | None,
    dtype: str,
    compile_: bool,
) -> dict[str, Any]:
    """Edit IMAGE with MODEL: SDEdit, inpainting, super-resolution or colourisation, as several variants in a folder.

    With --start-at, IMAGE is noised to that timestep and denoised again (SDEdit): coarse structure stays, fine detail
    changes. With --mask, --upscale or --colour, every step imposes the information in IMAGE on the prediction (DDNM),
    so that every variant agrees with it, and the rest is filled in. Both can be combined.

    Variant i depends only on the model, the image, the options, the seed and i. After an interruption, run the same
    command again to resume.

    \b
    Examples:
      ddim edit mnist scribble.png --start-at 350 --out neat --sheet neat.png
      ddim edit mnist digit.png --mask upper-half.png --out whole --sheet whole.png
      ddim edit mnist small.png --upscale 4 --out large
    """
    if sum((mask is not None, upscale is not None, colour)) > 1:
        raise DdimError("--mask, --upscale and --colour", "cannot be combined", "use one of them")
    if start_at is None and mask is None and upscale is None and not colour:
        raise DdimError("edit", "has no constraint", "use --start-at, --mask, --upscale or --colour")
    if sheet is not None:
        output_file(sheet)
    loaded = load_model(model, device, dtype, compile_)
    from ddim.evaluation.sample_folder import generate
    from ddim.model.modality import image_path

    source, operator, y = _constraint(loaded, image, mask, upscale, colour)
    if operator and clip_x0:
        raise DdimError("--clip", "cannot be combined with --mask, --upscale or --colour", "leave it out")
    clip = False if operator else clip_x0  # with a constraint, eps stays as the network predicts it
    plan = _plan(loaded, steps, grid, eta, start_at, clip)
    edit = _edit(plan, source, operator, y, start_at, {"mask": mask is not None, "upscale": upscale, "colour": colour})
    generation = generate(loaded, plan, out, n, 0, seed, Path(model).name, 1, label, guidance, edit, force)
    result = run_sampling(generation, counted(plan.nfe, "network evaluations") + " each", n, "variants", out)
    click.echo(
        f"{counted(n, 'variants')}{result.before}, {plan.name}, {counted(plan.nfe, 'network evaluations')} each: "
        f"{image_path(out, 0)} ..."
    )
    if sheet is not None:
        start = loaded.noise(1, seed).start() * plan.start.noise + source.to(loaded.device) * plan.start.signal
        _save_sheet(sheet, out, n, source, operator.pinv(y) if operator else start)
        click.echo(f"sheet: {sheet}")
    return {"out": out, "n": n, "seed": seed, "plan": plan.name, "nfe": plan.nfe, "sheet": sheet}


def _constraint(
    model: Model, path: Path, mask: Path | None, upscale: int | None, colour: bool
) -> tuple[Tensor, Operator | None, Tensor]:
    """The image, (1, C, H, W) in [-1, 1], the operator of the constraint, and its value for the image."""
    from ddim.cli._inputs import open_with_warnings
    from ddim.data.pixels import to_float
    from ddim.sampling import x0_hooks

    policy = model.policy
    if colour and policy.channels != 3:
        raise DdimError("--colour", "needs a colour model, this one is grey", "use a colour model")
    small = None if upscale is None else _small(model, path, upscale)
    if upscale is not None and small is not None:
        return x0_hooks.MeanPool(upscale).pinv(small), x0_hooks.MeanPool(upscale), small
    full = to_float(open_with_warnings(path, policy)[None])
    operator: Operator | None = None
    if mask is not None:
        operator = x0_hooks.Mask(_mask(model, mask, path))
    elif upscale is not None:
        operator = x0_hooks.MeanPool(upscale)
        warn(f"{path}: is not {_size(model, upscale)} pixels; it is resized to the model's and averaged by {upscale}")
    elif colour:
        operator = x0_hooks.Grey(x0_hooks.LUMA)
    return full, operator, operator.apply(full) if operator else full


def _mask(model: Model, path: Path, image: Path) -> Tensor:
    """The mask, bool, (C, H, W); True is kept."""
    import torch

    from ddim.data.adjustments import Report
    from ddim.data.image import natural_policy, read_image

    natural, expected = natural_policy(path), natural_policy(image)
    size, image_size = (natural.height, natural.width), (expected.height, expected.width)
    if size not in (image_size, model.shape[1:]):
        problem = f"is {natural.width}x{natural.height} pixels, {image.name} is {expected.width}x{expected.height}"
        raise DdimError(path, problem, "resize it to the size of the image")
    changes = {"channels": 1} if size == image_size else {"channels": 1, "box": None}
    adjustments = Report()
    selected = torch.as_tensor(
        read_image(path, model.policy.model_copy(update=changes), adjusted=adjustments)[0][:, :, 0] >= 128
    )
    if selected.all() or not selected.any():
        values = adjustments.deep if adjustments.deep.count else adjustments.plain
        colour = "white" if selected.all() else "black"
        problem = f"is {colour} everywhere (its values are {values.lowest} to {values.largest})"
        raise DdimError(path, problem, "make the kept part white, and the part to fill in black")
    return selected.expand(model.shape)


def _size(model: Model, k: int) -> str:
    return f"{model.shape[2] // k}x{model.shape[1] // k}"


def _small(model: Model, path: Path, k: int) -> Tensor | None:
    """The image, (1, C, H / k, W / k) in [-1, 1], if it has that small size already; else None."""
    from ddim.data.image import MisfitError, open_image
    from ddim.data.pixels import to_float

    _, height, width = model.shape
    if k < 2 or height % k or width % k:
        problem = f"does not divide the model's {width}x{height} pixels" if k >= 2 else "is less than 2"
        raise DdimError(f"--upscale {k}", problem, "use a factor such as 2 or 4")
    changes = {"height": height // k, "width": width // k, "fit": "exact", "box": None}
    try:
        return to_float(open_image(path, model.policy.model_copy(update=changes))[None])
    except MisfitError:
        return None


def _plan(
    model: Model, steps: int | None, grid: str | None, eta: float, start_at: int | None, clip: bool | None
) -> Plan:
    if start_at is not None and not 1 <= start_at <= model.schedule.T:
        raise DdimError(f"--start-at {start_at}", f"is outside 1..{model.schedule.T}", "use a timestep of the schedule")
    from ddim.process.start import default_steps

    times = numbers(grid, "--grid") if grid and grid[0].isdigit() else grid or "equal-angle"
    if steps is None and isinstance(times, str):
        steps = default_steps(min(STEPS, start_at or STEPS), model.schedule, model.config.predicts)
    listed = isinstance(times, list)
    if steps is not None and start_at is not None and steps > start_at:
        raise DdimError(f"--steps {steps}", f"is more than --start-at {start_at}", f"use --steps {start_at} or fewer")
    if listed and start_at is not None and times[-1] != start_at:
        raise DdimError(f"--grid {grid}", f"does not end at --start-at {start_at}", f"end the list with {start_at}")
    plan: Plan = model.plan(steps, times, eta=eta, clip_x0=clip, top=None if listed else start_at, sampler="ddim")
    return plan


def _edit(
    plan: Plan,
    source: Tensor,
    operator: Operator | None,
    y: Tensor,
    start_at: int | None,
    constraint: dict[str, object],
) -> Edit:
    from ddim.evaluation.sample_folder import Edit
    from ddim.sampling import x0_hooks

    digest = hashlib.sha256()
    for tensor in (source, y):
        digest.update(tensor.contiguous().numpy().tobytes())
    if isinstance(operator, x0_hooks.Mask):
        digest.update(operator.mask.contiguous().numpy().tobytes())
    description = {
        **constraint,
        "start_at": start_at,
        "rounds": ROUNDS if operator else None,
        "eps": "kept" if operator else None,
        "known_sha256": digest.hexdigest(),
    }
    hook = x0_hooks.eps_kept(x0_hooks.consistent(operator, y, ROUNDS), plan) if operator else None
    return Edit(description, None if start_at is None else source, hook)


def _save_sheet(path: Path, folder: Path, n: int, *first: Tensor) -> None:
    """Write a sheet of the images in `first`, each (1, C, H, W), and the variants in a folder, ten per row."""
    import numpy as np

    from ddim._io.png import save_png, sheet
    from ddim.data.pixels import to_uint8
    from ddim.evaluation.sample_folder import read_sheet

    images: list[np.ndarray] = [*(to_uint8(part) for part in first), read_sheet(folder, range(n))]
    page = sheet(np.concatenate(images), columns=10, zoom=2 if images[0].shape[1] <= 32 else 1)
    save_png(path, page)
