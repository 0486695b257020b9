"""Bulk sampling and decoding into a folder of PNG files with one manifest: complete, resumable, never doubled.

Picture i is a function of (model, plan, seed, i), or of (model, plan, latent i): its bytes depend neither on how many
are made at a time nor on where an earlier run was stopped. What is missing, or has other bytes than were written, is
made.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddim
from ddim._io.arguments import GUIDANCE, finite
from ddim._io.atomic import claimed, unexpected_entries
from ddim._io.checksum import unseal, write_json
from ddim._io.finished import SUMS, Finished
from ddim._io.limits import check_samples
from ddim._io.reading import of_kind, parse_json, read_bytes
from ddim._io.temporary import remove_parts
from ddim.errors import DdimError, either, warn
from ddim.model.base import ModelBase
from ddim.model.image import Model
from ddim.model.modality import Modality, image_path
from ddim.model.plausible import refuse_implausible
from ddim.plan.base import BasePlan, Hook, Hooked
from ddim.plan.plan import Plan
from ddim.sampling.guidance import Guidance
from ddim.sampling.microbatch import Label, labels_of

PART = 64  # micro-batches whose missing indices are looked up at a time
_SOFTWARE = {"software": f"ddim {ddim.__version__}"}

MANIFEST = "manifest.json"


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
        hook: What is done to each predicted x_0, see `ddim.x0_hooks`.
    """

    said: Mapping[str, Any]
    origin: Tensor | None = None
    hook: Hook | None = None


def generate(
    model: ModelBase,
    plan: BasePlan[Any],
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
        label: For a model with labels, see `ddim.sampling.microbatch.Label`.
        guidance: Scale of classifier-free guidance, or a function from level to scale.
        edit: What the pictures start from and are held to.
        force: Whether samples that are not plausible are written too, see `ddim.model.plausible`.

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

    yield from _fill(model, folder, what, text, range(start, start + n), batch, make, force)


def _checked(plan: BasePlan[Any], n: int, start: int, seed: int, batch: int, guidance: Guidance | None) -> Any:
    """The scale of guidance of each row, or of all, if the arguments are in range."""
    for argument, value, least in (("n", n, 1), ("start", start, 0), ("batch", batch, 1)):
        if value < least:
            raise DdimError(f"{argument} {value}", f"is less than {least}", f"give {least} or more")
    check_samples(n, start)
    if not 0 <= seed < 2**64:
        raise DdimError(f"seed {seed}", "is outside 0..2^64-1", "choose another seed")
    scale = [guidance(row.query) for row in plan.rows] if callable(guidance) else guidance
    for one in scale if isinstance(scale, list) else [scale]:
        if one is not None:
            finite(one, "guidance", None if isinstance(scale, list) else GUIDANCE)
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
    yield from _fill(model, folder, what, lambda index: {"latent": names[index]}, each, 1, make, force)


def read_sheet(folder: Path, indices: range) -> np.ndarray:
    """Pictures of a samples folder: uint8, (N, H, W, C)."""
    from PIL import Image

    pictures = [np.asarray(Image.open(image_path(folder, index))) for index in indices]
    return np.stack([p[:, :, None] if p.ndim == 2 else p for p in pictures])


def _present(kind: Modality, folder: Path, indices: range) -> list[int]:
    """The indices whose files a folder holds, from one listing of it: of a billion indices few may be there."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            stem = entry.name.partition(".")[0]
            if stem.isdecimal() and int(stem) in indices and kind.path(folder, int(stem)).name == entry.name:
                found.append(int(stem))
    return sorted(found)


def _fill(
    model: ModelBase,
    folder: Path,
    what: dict[str, Any],
    describe: Callable[[int], dict[str, str]],
    indices: range,
    batch: int,
    make: Callable[[Sequence[int]], Iterator[Tensor]],
    force: bool,
) -> Generator[Made, None, None]:
    kind = model.kind
    text = {"model": what["model"]["name"], "model_sha256": what["model"]["sha256"], "plan": what["plan_name"]}
    text |= {"plan_sha256": _digest(what["plan"])}

    def about(index: int) -> dict[str, str]:
        return {**text, **describe(index), "index": str(index)}

    with claimed(folder, MANIFEST, SUMS) as owned:
        earlier = write_or_verify(folder, what, indices.start, len(indices), kind.noun)
        remove_parts(folder)
        with Finished(folder, earlier, lambda path: kind.is_whole(path, about(int(path.stem)))) as finished:
            there = _present(kind, folder, indices)
            places, remade = finished.missing([kind.path(folder, index) for index in there])
            sound = {*there} - {there[place] for place in places}
            found, done = len(sound), 0
            yield Made(found, len(indices), found, remade)
            waiting: deque[int] = deque()
            missing = (index for index in indices if index not in sound)
            blocks = _plausible(_in_parts(make, missing, PART * model.micro_batch, waiting), kind, force)
            for files in _rendered(kind, folder, waiting, blocks, batch, lambda index: {**about(index), **_SOFTWARE}):
                finished.write(files)
                owned.keep()
                done += len(files)
                yield Made(found + done, len(indices), found, remade)


def _rendered(
    kind: Modality,
    folder: Path,
    waiting: deque[int],
    blocks: Iterator[Tensor],
    batch: int,
    about: Callable[[int], dict[str, str]],
) -> Iterator[list[tuple[Path, bytes]]]:
    """The files of samples as blocks come in, `batch` of them or more at a time, fewer at the end."""
    files: list[tuple[Path, bytes]] = []
    for block in blocks:
        if not torch.isfinite(block).all():
            remedy = either("use another grid", "use dtype='float32'", "use clip_x0=True")
            raise DdimError("samples", "are not finite numbers", remedy)
        for sample in kind.render(block):
            index = waiting.popleft()
            files.append((kind.path(folder, index), kind.file_of(sample, about(index))))
        if len(files) >= batch:
            yield files
            files = []
    if files:
        yield files


def _plausible(blocks: Iterator[Tensor], kind: Modality, force: bool) -> Iterator[Tensor]:
    """The blocks of samples, the first of which must look like data, before anything is written."""
    for place, block in enumerate(blocks):
        if place == 0 and bool(torch.isfinite(block).all()):
            refuse_implausible(block, kind.config, force)
        yield block


def _in_parts(
    make: Callable[[Sequence[int]], Iterator[Tensor]], missing: Iterator[int], size: int, waiting: deque[int]
) -> Iterator[Tensor]:
    """The blocks of what is missing, looked up a part at a time; whose they are is put into `waiting`.

    A part is of whole micro-batches, so that only the last of all is filled up.
    """
    while part := list(itertools.islice(missing, size)):
        waiting.extend(part)
        yield from make(part)


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]


def write_or_verify(folder: Path, what: dict[str, Any], start: int, n: int, kind: str = "pictures") -> bool:
    """Write a folder's manifest, or see that the one there is of the same run, and add the new range.

    Args:
        folder: The folder, locked.
        what: What the pictures depend on; "software" may differ, which is said, and the model's name too.
        start: The first index that is to be there.
        n: How many.
        kind: What the folder holds, for messages.

    Returns:
        Whether the folder was claimed by a version of this library that wrote no checksums.

    Raises:
        DdimError: If the folder holds pictures of another run, or something else.
    """
    path = folder / MANIFEST
    ranges, data = [[start, start + n]], b""
    if path.exists():
        again = "choose another folder"
        data = read_bytes(path)
        text = unseal(data, path)
        old = of_kind(parse_json(text, path, again), dict, path, again)
        if not _are_ranges(found := old.pop("ranges", None)):
            raise DdimError(path, f"is not a manifest of {kind}: ranges are not lists of two indices", again)
        ranges = _merge([*found, *ranges])
        for key, value in what.items():
            was = old.get(key)
            if was == value:
                continue
            if key == "software":
                warn(f"{folder}: was begun with {was}, goes on with {value}; bytes may differ")
                continue
            if key == "model" and isinstance(was, dict) and {**was, "name": ""} == {**value, "name": ""}:
                continue
            shown = ("another", "this") if key in ("plan", "data_sha256") else (repr(was), repr(value))
            wrong = f"holds {kind} of another run: {key} is {shown[0]}, not {shown[1]}"
            raise DdimError(folder, wrong, "choose another folder, or the same settings")
    elif unexpected_entries(folder):
        raise DdimError(folder, f"is not empty and holds no {MANIFEST}", "choose an empty or new folder")
    earlier = bool(data) and text is data
    if not data or earlier or {**old, "ranges": found} != json.loads(json.dumps({**what, "ranges": ranges})):
        write_json(path, {**what, "ranges": ranges})
    return earlier


def identity(model: ModelBase, plan: BasePlan[Any], name: str) -> dict[str, Any]:
    """What a model and a plan make depends on, for a manifest."""
    versions = {"ddim": ddim.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {
        "model": {"name": name, "sha256": model.fingerprint, "predicts": model.config.predicts},
        "plan": json.loads(plan.to_json()),
        "plan_name": plan.name,
        "network_calls": plan.calls,
        "shape": list(model.shape),
        **{key: model.conditions[key] for key in ("dtype", "device", "compile", "micro_batch")},
        "software": {**versions, "threads": model.conditions["threads"]},
    }


def _are_ranges(value: Any) -> bool:
    """Whether a value of a file is a list of ranges [first, end]."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and [type(end) for end in pair] == [int, int] and 0 <= pair[0] <= pair[1]
        for pair in value
    )


def _merge(ranges: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([first, end])
    return merged
