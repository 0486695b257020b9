"""Bulk sampling and decoding into a folder of PNG files with one manifest: complete, resumable, never doubled.

Picture i is a function of (model, plan, seed, i), or of (model, plan, latent i): its bytes depend neither on how many
are made at a time nor on where an earlier run was stopped. What is missing, or has other bytes than were written, is
made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddim
from ddim.blocks import Label, labels_of
from ddim.denoiser import Guidance, Hook, Hooked
from ddim.engine import Engine
from ddim.errors import DdimError, either
from ddim.files import claimed, remove_parts
from ddim.finished import SUMS, Finished
from ddim.kinds import Kind
from ddim.kinds import picture_path as picture_path
from ddim.manifest import MANIFEST, claim, identity
from ddim.model import Model
from ddim.plan import Plan
from ddim.plausible import refuse_implausible
from ddim.table import Table

LARGEST = 2**63
_SOFTWARE = {"software": f"ddim {ddim.__version__}"}


@dataclass(frozen=True, slots=True)
class Made:
    """Where a bulk sampling stands.

    Args:
        done: Pictures of the request that are in the folder.
        total: Pictures of the request.
        found: Pictures that were there before.
        remade: Pictures that were there, but not as they were written, and are made again.
    """

    done: int
    total: int
    found: int
    remade: int = 0

    @property
    def before(self) -> str:
        """What was there before, in words: " (6 were there, 3 remade)"; "" if nothing was."""
        parts = [f"{self.found} were there"] if self.found else []
        parts += [f"{self.remade} remade"] if self.remade else []
        return f" ({', '.join(parts)})" if parts else ""


@dataclass(frozen=True, eq=False)
class Edit:
    """What samples are made from and held to, beside noise.

    Args:
        said: What the other two are, in words and checksums, for the manifest.
        origin: A picture to start from, partly noised: float, (1, C, H, W), in [-1, 1].
        hook: What is done to each predicted x_0, see `ddim.hooks`.
    """

    said: Mapping[str, Any]
    origin: Tensor | None = None
    hook: Hook | None = None


def generate(
    model: Engine,
    plan: Table[Any],
    folder: Path,
    n: int,
    start: int = 0,
    seed: int = 0,
    name: str = "",
    batch: int = 1,
    label: Label = None,
    guidance: Guidance | None = None,
    edit: Edit | None = None,
    force: bool = False,
) -> Generator[Made, None, None]:
    """Make pictures start..start + n - 1 of a run, those that are not in the folder yet.

    Args:
        model: The model.
        plan: What to run.
        folder: Where to; made if it is not there.
        n: How many.
        start: The first one's index.
        seed: The run's seed.
        name: The model's name, for the metadata.
        batch: Pictures held before they are written, rounded up to micro-batches.
        label: For a model with labels, see `ddim.blocks.Label`.
        guidance: Scale of classifier-free guidance, or a function from level to scale.
        edit: What the pictures start from and are held to.
        force: Whether samples that are not plausible are written too, see `ddim.plausible`.

    Yields:
        Where it stands: once before the first picture, then each time some were written.

    Raises:
        DdimError: If an argument is out of range, the folder holds another run or is in use, or samples are not
            plausible: then nothing was written.
    """
    scale = _checked(plan, n, start, seed, batch, guidance)
    classes, first = model.config.network.classes, labels_of(label, range(1), model.config.network.classes)
    model.denoiser(None if first is None else torch.tensor(first), guidance)
    model.check_plan(plan, to_clean=True)
    asked = {"seed": seed, "label": label, "guidance": scale}
    kind = {"format": "ddim-edited", "edit": edit.said} if edit else {"format": "ddim-samples"}
    what = {**kind, "version": 1, **asked, **identity(model, plan, name)}

    def text(index: int) -> dict[str, str]:
        own = labels_of(label, [index], classes)
        return {"seed": str(seed)} | ({} if own is None else {"label": str(own[0])})

    def make(indices: Sequence[int]) -> Iterator[Tensor]:
        labels = labels_of(label, indices, classes)
        origin, hook = (edit.origin, edit.hook) if edit else (None, None)
        through = partial(Hooked, hook=hook) if hook else None
        return model.sample_blocks(plan, indices, seed, labels, guidance, origin, through)

    yield from _fill(model.kind, folder, what, text, range(start, start + n), batch, make, force)


def _checked(plan: Table[Any], n: int, start: int, seed: int, batch: int, guidance: Guidance | None) -> Any:
    """The scale of guidance of each row, or of all, if the arguments are in range."""
    for argument, value, least in (("n", n, 1), ("start", start, 0), ("batch", batch, 1)):
        if value < least:
            raise DdimError(f"{argument} {value}", f"is less than {least}", f"give {least} or more")
    if not 0 <= seed < 2**64:
        raise DdimError(f"seed {seed}", "is outside 0..2^64-1", "choose another seed")
    if start + n > LARGEST:
        raise DdimError(f"start {start}", f"counts the last sample as {start + n - 1}", "count from a smaller number")
    scale = [guidance(row.query) for row in plan.rows] if callable(guidance) else guidance
    if scale is not None and not np.isfinite(scale).all():
        raise DdimError(f"guidance {scale}", "is not a finite number", "give a number such as 2")
    return scale


def decode(
    model: Model,
    plan: Plan,
    folder: Path,
    latents: Tensor,
    names: Sequence[str],
    name: str = "",
    beside: Sequence[Tensor] = (),
    force: bool = False,
) -> Generator[Made, None, None]:
    """Decode latents into a folder, those whose pictures are not there yet.

    Args:
        model: The model.
        plan: What to run; without noise, to t = 0, or at most 1.
        folder: Where to; made if it is not there.
        latents: The states the plan starts from, float, (N, C, H, W).
        names: Where each latent comes from, (N,), for the metadata.
        name: The model's name, for the metadata.
        beside: The states of `plan.before`, (N, C, H, W) each.
        force: As in `generate`.

    Yields:
        Where it stands: once before the first picture, then each time some were written.

    Raises:
        DdimError: If the plan is not one for this model, or the folder holds something else or is in use.
    """
    model.check_plan(plan)
    for state in (latents, *beside):
        if state.shape[1:] != model.shape:
            raise DdimError(
                "latents", f"are {tuple(state.shape[1:])}, the model's are {model.shape}", "use this model's"
            )
    if plan.end.t > 1 or plan.start.t <= plan.end.t:
        wrong = f"goes from t = {plan.start.t:g} to {plan.end.t:g}"
        raise DdimError("plan", wrong, "to decode it must end at t = 0, or at most 1")
    digest = hashlib.sha256(b"".join(state.contiguous().numpy().tobytes() for state in (latents, *beside))).hexdigest()
    what = {"format": "ddim-decoded", "version": 1, "latents_sha256": digest, **identity(model, plan, name)}
    what["names"] = list(names)

    def make(indices: Sequence[int]) -> Iterator[Tensor]:
        some = list(indices)
        return model.run_blocks(plan, latents[some], [state[some] for state in beside])

    each = range(len(latents))
    yield from _fill(model.kind, folder, what, lambda index: {"latent": names[index]}, each, 1, make, force)


def read_sheet(folder: Path, indices: range) -> np.ndarray:
    """Pictures of a samples folder: uint8, (N, H, W, C)."""
    from PIL import Image

    pictures = [np.asarray(Image.open(picture_path(folder, index))) for index in indices]
    return np.stack([p[:, :, None] if p.ndim == 2 else p for p in pictures])


def _fill(
    kind: Kind,
    folder: Path,
    what: dict[str, Any],
    describe: Callable[[int], dict[str, str]],
    indices: range,
    batch: int,
    make: Callable[[Sequence[int]], Iterator[Tensor]],
    force: bool,
) -> Generator[Made, None, None]:
    text = {"model": what["model"]["name"], "model_sha256": what["model"]["sha256"], "plan": what["plan_name"]}
    text |= {"plan_sha256": _digest(what["plan"])}

    def about(index: int) -> dict[str, str]:
        return {**text, **describe(index), "index": str(index)}

    with claimed(folder, MANIFEST, SUMS) as owned:
        earlier = claim(folder, what, indices.start, len(indices), kind.things)
        remove_parts(folder)
        with Finished(folder, earlier, lambda path: kind.is_whole(path, about(int(path.stem)))) as finished:
            places, remade = finished.missing([kind.path(folder, index) for index in indices])
            missing = [indices[place] for place in places]
            found, done = len(indices) - len(missing), 0
            yield Made(found, len(indices), found, remade)
            blocks = _plausible(make(missing) if missing else iter(()), kind, force)
            for files in _rendered(kind, folder, missing, blocks, batch, lambda index: {**about(index), **_SOFTWARE}):
                finished.write(files)
                owned.keep()
                done += len(files)
                yield Made(found + done, len(indices), found, remade)


def _rendered(
    kind: Kind,
    folder: Path,
    indices: Sequence[int],
    blocks: Iterator[Tensor],
    batch: int,
    about: Callable[[int], dict[str, str]],
) -> Iterator[list[tuple[Path, bytes]]]:
    """The files of samples as blocks come in, `batch` of them or more at a time, fewer at the end."""
    files: list[tuple[Path, bytes]] = []
    left = iter(indices)
    for block in blocks:
        if not torch.isfinite(block).all():
            remedy = either("use another grid", "use dtype='float32'", "use clip_x0=True")
            raise DdimError("samples", "are not finite numbers", remedy)
        for sample in kind.render(block):
            index = next(left)
            files.append((kind.path(folder, index), kind.file_of(sample, about(index))))
        if len(files) >= batch:
            yield files
            files = []
    if files:
        yield files


def _plausible(blocks: Iterator[Tensor], kind: Kind, force: bool) -> Iterator[Tensor]:
    """The blocks of samples, the first of which must look like data, before anything is written."""
    for place, block in enumerate(blocks):
        if place == 0 and bool(torch.isfinite(block).all()):
            refuse_implausible(block, kind.config, force)
        yield block


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
