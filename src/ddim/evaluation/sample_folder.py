"""Resumable bulk sampling and decoding into a folder of files with one manifest.

Sample i is a function of (model, plan, seed, i), or of (model, plan, latent i): its bytes depend neither on the batch
size nor on where an earlier run was interrupted. Only files that are missing or changed since they were written are
generated.
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
from ddim.model.modality import Modality, image_path
from ddim.model.model import Model
from ddim.model.plausible import refuse_implausible
from ddim.plan.base import BasePlan, Hook, Hooked
from ddim.plan.plan import Plan
from ddim.sampling.guidance import Guidance
from ddim.sampling.microbatch import Label, labels_of

PART = 64  # number of micro-batches whose missing indices are looked up at a time
_SOFTWARE = {"software": f"ddim {ddim.__version__}"}

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class SampleProgress:
    """Progress of bulk sampling.

    Args:
        done: Requested samples that are in the folder.
        total: Requested samples.
        existing: Requested samples that were in the folder at the start.
        regenerated: Samples whose files had changed since they were written, and that are generated again.
    """

    done: int
    total: int
    existing: int
    regenerated: int = 0

    @property
    def before(self) -> str:
        """The initial state of the folder as text: " (6 existed, 3 regenerated)"; "" if it held no samples."""
        parts = [f"{self.existing} existed"] if self.existing else []
        parts += [f"{self.regenerated} regenerated"] if self.regenerated else []
        return f" ({', '.join(parts)})" if parts else ""


@dataclass(frozen=True, eq=False)
class Edit:
    """An image edit: the source image and the constraint of the samples.

    Args:
        description: Description of `origin` and `hook` with their checksums, for the manifest.
        origin: Image to start from, partly noised: float, (1, C, H, W), in [-1, 1].
        hook: Function applied to each predicted x_0, see `ddim.x0_hooks`.
    """

    description: Mapping[str, Any]
    origin: Tensor | None = None
    hook: Hook | None = None


def generate(
    model: Model,
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
) -> Generator[SampleProgress, None, None]:
    """Generate samples start..start + n - 1 of a run that are not in the folder yet.

    Args:
        model: The model.
        plan: The sampling plan.
        folder: Output folder; created if missing.
        n: Number of samples.
        start: Index of the first sample.
        seed: The run's seed.
        name: The model's name, for the metadata.
        batch: Number of samples buffered before they are written, rounded up to whole micro-batches.
        label: Class labels for a conditional model, see `ddim.sampling.microbatch.Label`.
        guidance: Scale of classifier-free guidance, or a function from level to scale.
        edit: Source image and constraint of an image edit.
        force: Whether to write samples that are not plausible, see `ddim.model.plausible`.

    Yields:
        Progress: once before the first sample, then after each write.

    Raises:
        DdimError: If an argument is out of range, the folder holds another run or is in use, or the samples are not
            plausible; in that case none is written.
    """
    scale = _check_arguments(plan, n, start, seed, batch, guidance)
    classes, first = model.config.network.classes, labels_of(label, range(1), model.config.network.classes)
    model.denoiser(None if first is None else torch.tensor(first), guidance)
    model.check_plan(plan, to_clean=True)
    settings = {"seed": seed, "label": label, "guidance": scale}
    kind = {"format": "ddim-edited", "edit": edit.description} if edit else {"format": "ddim-samples"}
    what = {**kind, "version": 1, **settings, **identity(model, plan, name)}

    def text(index: int) -> dict[str, str]:
        sample_labels = labels_of(label, [index], classes)
        return {"seed": str(seed)} | ({} if sample_labels is None else {"label": str(sample_labels[0])})

    def make(indices: Sequence[int]) -> Iterator[Tensor]:
        labels = labels_of(label, indices, classes)
        origin, hook = (edit.origin, edit.hook) if edit else (None, None)
        through = partial(Hooked, hook=hook) if hook else None
        return model.sample_blocks(plan, indices, seed, labels, guidance, origin, through)

    yield from _fill(model, folder, what, text, range(start, start + n), batch, make, force)


def _check_arguments(plan: BasePlan[Any], n: int, start: int, seed: int, batch: int, guidance: Guidance | None) -> Any:
    """Check the ranges of the arguments; returns the guidance scale, a list of one per row if it is a function."""
    for argument, value, least in (("n", n, 1), ("start", start, 0), ("batch", batch, 1)):
        if value < least:
            raise DdimError(f"{argument} {value}", f"is less than {least}", f"use {least} or more")
    check_samples(n, start)
    if not 0 <= seed < 2**64:
        raise DdimError(f"seed {seed}", "is outside 0..2^64-1", "choose another seed")
    scale = [guidance(row.query) for row in plan.rows] if callable(guidance) else guidance
    for number in scale if isinstance(scale, list) else [scale]:
        if number is not None:
            finite(number, "guidance", None if isinstance(scale, list) else GUIDANCE)
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
) -> Generator[SampleProgress, None, None]:
    """Decode the latents whose images are not in the folder yet.

    Args:
        model: The model.
        plan: A plan without noise that ends at t = 0, or at most 1.
        folder: Output folder; created if missing.
        latents: Initial states of the plan, float, (N, C, H, W).
        names: Origin of each latent, (N,), for the metadata.
        name: The model's name, for the metadata.
        beside: The states of `plan.before`, (N, C, H, W) each.
        force: Whether to write images that are not plausible, see `ddim.model.plausible`.

    Yields:
        Progress: once before the first image, then after each write.

    Raises:
        DdimError: If the plan does not fit the model, or the folder holds something else or is in use.
    """
    model.check_plan(plan)
    for state in (latents, *beside):
        if state.shape[1:] != model.shape:
            raise DdimError("latents", f"are {tuple(state.shape[1:])}, not {model.shape}", "use latents of this model")
    if plan.end.t > 1 or plan.start.t <= plan.end.t:
        problem = f"goes from t = {plan.start.t:g} to {plan.end.t:g}"
        raise DdimError("plan", problem, "use a plan that ends at t = 0, or at most 1")
    digest = hashlib.sha256(b"".join(state.contiguous().numpy().tobytes() for state in (latents, *beside))).hexdigest()
    what = {"format": "ddim-decoded", "version": 1, "latents_sha256": digest, **identity(model, plan, name)}
    what["names"] = list(names)

    def make(indices: Sequence[int]) -> Iterator[Tensor]:
        selected = list(indices)
        return model.run_blocks(plan, latents[selected], [state[selected] for state in beside])

    each = range(len(latents))
    yield from _fill(model, folder, what, lambda index: {"latent": names[index]}, each, 1, make, force)


def read_sheet(folder: Path, indices: range) -> np.ndarray:
    """Read images of a samples folder: uint8, (N, H, W, C)."""
    from PIL import Image

    images = [np.asarray(Image.open(image_path(folder, index))) for index in indices]
    return np.stack([p[:, :, None] if p.ndim == 2 else p for p in images])


def _present(kind: Modality, folder: Path, indices: range) -> list[int]:
    """The indices whose files exist, sorted.

    Lists the folder once, since testing each index would be slow for a large range with few files.
    """
    present = []
    with os.scandir(folder) as entries:
        for entry in entries:
            stem = entry.name.partition(".")[0]
            if stem.isdecimal() and int(stem) in indices and kind.path(folder, int(stem)).name == entry.name:
                present.append(int(stem))
    return sorted(present)


def _fill(
    model: Model,
    folder: Path,
    what: dict[str, Any],
    describe: Callable[[int], dict[str, str]],
    indices: range,
    batch: int,
    make: Callable[[Sequence[int]], Iterator[Tensor]],
    force: bool,
) -> Generator[SampleProgress, None, None]:
    kind = model.kind
    text = {"model": what["model"]["name"], "model_sha256": what["model"]["sha256"], "plan": what["plan_name"]}
    text |= {"plan_sha256": _digest(what["plan"])}

    def about(index: int) -> dict[str, str]:
        return {**text, **describe(index), "index": str(index)}

    with claimed(folder, MANIFEST, SUMS) as owned:
        earlier = write_or_verify(folder, what, indices.start, len(indices), kind.noun)
        remove_parts(folder)
        with Finished(folder, earlier, lambda path: kind.is_whole(path, about(int(path.stem)))) as finished:
            present = _present(kind, folder, indices)
            missing_places, regenerated = finished.missing([kind.path(folder, index) for index in present])
            valid = {*present} - {present[place] for place in missing_places}
            existing, done = len(valid), 0
            yield SampleProgress(existing, len(indices), existing, regenerated)
            waiting: deque[int] = deque()
            missing = (index for index in indices if index not in valid)
            blocks = _plausible(_in_parts(make, missing, PART * model.micro_batch, waiting), kind, force)
            for files in _rendered(kind, folder, waiting, blocks, batch, lambda index: {**about(index), **_SOFTWARE}):
                finished.write(files)
                owned.keep()
                done += len(files)
                yield SampleProgress(existing + done, len(indices), existing, regenerated)


def _rendered(
    kind: Modality,
    folder: Path,
    waiting: deque[int],
    blocks: Iterator[Tensor],
    batch: int,
    about: Callable[[int], dict[str, str]],
) -> Iterator[list[tuple[Path, bytes]]]:
    """The files of the samples in groups of `batch` or more, fewer in the last group."""
    files: list[tuple[Path, bytes]] = []
    for block in blocks:
        if not torch.isfinite(block).all():
            hint = either("use another grid", "use dtype='float32'", "use clip_x0=True")
            raise DdimError("samples", "have values that are not finite", hint)
        for sample in kind.render(block):
            index = waiting.popleft()
            files.append((kind.path(folder, index), kind.file_of(sample, about(index))))
        if len(files) >= batch:
            yield files
            files = []
    if files:
        yield files


def _plausible(blocks: Iterator[Tensor], kind: Modality, force: bool) -> Iterator[Tensor]:
    """Pass the micro-batches through, and check that the first one is plausible before anything is written."""
    for place, block in enumerate(blocks):
        if place == 0 and bool(torch.isfinite(block).all()):
            refuse_implausible(block, kind.config, force)
        yield block


def _in_parts(
    make: Callable[[Sequence[int]], Iterator[Tensor]], missing: Iterator[int], size: int, waiting: deque[int]
) -> Iterator[Tensor]:
    """Generate the missing samples, `size` indices at a time; their indices are appended to `waiting`.

    `size` is a multiple of the micro-batch, so that only the very last micro-batch is padded.
    """
    while part := list(itertools.islice(missing, size)):
        waiting.extend(part)
        yield from make(part)


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]


def write_or_verify(folder: Path, what: dict[str, Any], start: int, n: int, noun: str = "images") -> bool:
    """Write a folder's manifest, or verify that the existing one is of the same run and add the new range to it.

    Args:
        folder: The folder, locked.
        what: Everything that determines the samples. A different "software" entry only warns; a different model name is
            ignored.
        start: Index of the first requested sample.
        n: Number of requested samples.
        noun: Plural noun for the folder's content in messages.

    Returns:
        Whether the manifest was written by an earlier version of this library, without a checksum.

    Raises:
        DdimError: If the folder holds samples of another run, or something else.
    """
    path = folder / MANIFEST
    ranges, data = [[start, start + n]], b""
    if path.exists():
        again = "choose another folder"
        data = read_bytes(path)
        text = unseal(data, path)
        old = of_kind(parse_json(text, path, again), dict, path, again)
        if not _are_ranges(old_ranges := old.pop("ranges", None)):
            raise DdimError(path, f"is not a manifest of {noun}: ranges are not lists of two indices", again)
        ranges = _merge([*old_ranges, *ranges])
        for key, value in what.items():
            was = old.get(key)
            if was == value:
                continue
            if key == "software":
                warn(f"{folder}: was started with {was} and is resumed with {value}; bytes may differ")
                continue
            if key == "model" and isinstance(was, dict) and {**was, "name": ""} == {**value, "name": ""}:
                continue
            problem = f"holds {noun} of another run: {_difference(key, was, value, old.get('plan_name'), what)}"
            raise DdimError(folder, problem, "choose another folder, or the same settings")
    elif unexpected_entries(folder):
        raise DdimError(folder, f"is not empty and has no {MANIFEST}", "choose an empty or new folder")
    earlier = bool(data) and text is data
    if not data or earlier or {**old, "ranges": old_ranges} != json.loads(json.dumps({**what, "ranges": ranges})):
        write_json(path, {**what, "ranges": ranges})
    return earlier


def _difference(key: str, old: Any, new: Any, old_name: Any, what: Mapping[str, Any]) -> str:
    """How an entry of the manifest differs, as text."""
    if key == "data_sha256":
        return "the images or latents it was made from are others"
    if key != "plan":
        return f"{key} is {old!r}, not {new!r}"
    steps = [len(plan.get("rows", ())) if isinstance(plan, dict) else 0 for plan in (old, new)]
    if steps[0] != steps[1]:
        return f"{steps[0]} steps, not {steps[1]}"
    name = what.get("plan_name")
    return f"plan {old_name}, not {name}" if old_name != name else f"another plan of the name {name}"


def identity(model: Model, plan: BasePlan[Any], name: str) -> dict[str, Any]:
    """The manifest entries for a model, a plan and the software: what the samples depend on besides the seed."""
    versions = {"ddim": ddim.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {
        "model": {"name": name, "sha256": model.fingerprint, "predicts": model.config.predicts},
        "plan": json.loads(plan.to_json()),
        "plan_name": plan.name,
        "network_calls": plan.nfe,
        "shape": list(model.shape),
        **{key: model.conditions[key] for key in ("dtype", "device", "compile", "micro_batch")},
        "software": {**versions, "threads": model.conditions["threads"]},
    }


def _are_ranges(value: Any) -> bool:
    """Whether a value is a list of index ranges [first, end]."""
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
