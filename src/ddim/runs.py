"""A training run's folder: checkpoints, metrics, previews and the model, none of them ever half-written.

RUN/run.json                     what the run is; started again with another recipe, it is refused
RUN/state/00000500.safetensors   everything the next step depends on; the last few are kept
RUN/metrics.jsonl                one line every `log_every` steps; TensorBoard events beside it
RUN/previews/00000500.png        samples of the averaged weights
RUN/model/                       the model folder, of the averaged weights
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ddim
from ddim import checkpoint, seeds
from ddim.calibration import complete
from ddim.config import ModelConfig, Provenance
from ddim.data.imageset import ImageSet
from ddim.data.text import TextSet
from ddim.errors import DdimError, say
from ddim.files import lock, make_folder, remove_parts, write_atomic
from ddim.kinds import kind_of
from ddim.model import of
from ddim.run_config import RunConfig, claim, refuse_foreign
from ddim.table import Table
from ddim.tensors import read_tensors, write_tensors
from ddim.training import Trainer, not_finite

PREVIEWS = 36
KNOWN = 0.1  # of all times the error must be known at, to be told at all of them


@dataclass(frozen=True, slots=True)
class Report:
    """Where a run stands after a step.

    Args:
        step: Steps made.
        steps: Steps of the whole run.
        loss: Mean loss since the last line of the metrics file.
        images_seen: Pictures shown so far.
        event: What was just written, if anything.
    """

    step: int
    steps: int
    loss: float
    images_seen: int
    event: str = ""


def train(
    folder: Path,
    config: RunConfig,
    pictures: ImageSet | TextSet,
    device: torch.device | str,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Start a run, or go on with it where its last checkpoint stands.

    Args:
        folder: The run's folder.
        config: What the run is.
        pictures: Its data.
        device: Where to train.
        command: The command, for the model's provenance.
        stop: Asked after every step; when it says so, a checkpoint is written and the run stops.

    Yields:
        A report after every step, and a first one when the run is ready.

    Raises:
        DdimError: If the folder is in use or holds another run, or the loss is not finite.
    """
    _check(config, pictures)
    refuse_foreign(folder)
    make_folder(folder)
    with lock(folder):
        remove_parts(folder)
        claim(folder, config)
        yield from _Loop(folder, config, pictures, torch.device(device), command).reports(stop)


def _check(config: RunConfig, data: ImageSet | TextSet) -> None:
    """Refuse a recipe that its data do not suit, before a folder is claimed for it."""
    classes = config.model.network.classes
    if classes and data.labels is None:
        raise DdimError(config.data, "has no labels", "train without classes, or use labelled data")
    if classes and data.labels is not None and int(data.labels.max()) >= classes:
        wrong = f"has the label {int(data.labels.max())}, the network {classes} classes"
        raise DdimError(config.data, wrong, "give the network a class for every label")
    if config.train.flip and len(config.model.network.shape) == 1:
        raise DdimError("train.flip", "is about pictures, the data are text", "set it to false")


class _Loop:
    def __init__(
        self, folder: Path, config: RunConfig, pictures: ImageSet | TextSet, device: torch.device, command: str
    ):
        self.folder, self.config, self.pictures, self.command = folder, config, pictures, command
        recipe, model = config.train, config.model
        with seeds.forked("cpu", recipe.seed):
            self.network = model.network.build().to(device)
        self.device, self.kind = device, kind_of(model)
        self.objective = self.kind.loss(recipe.gamma, device)
        classes = model.network.classes
        self.trainer = Trainer(
            self.network,
            self.objective,
            pictures.batch,
            len(pictures),
            recipe,
            pictures.labels if classes else None,
            classes,
            self.kind.read,
        )
        self.total, self.count, self.seconds, self.last = 0.0, 0, 0.0, math.nan
        self.waiting: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.saved = -1
        self.preview_plan: Table[Any] | None = None

    def reports(self, stop: Callable[[], bool]) -> Iterator[Report]:
        recipe, trainer = self.config.train, self.trainer
        yield self._report(self._resume())
        clock = time.monotonic()
        with contextlib.ExitStack() as closing:
            self.metrics = closing.enter_context(open(self.folder / "metrics.jsonl", "a", encoding="utf-8"))
            self.board = self._board(closing)
            for update in trainer.updates():
                self.seconds, clock = self.seconds + time.monotonic() - clock, time.monotonic()
                self.waiting.append((update.step, update.loss, update.grad_norm))
                events = []
                last = update.step == recipe.steps
                halt = stop()
                due = update.step % recipe.checkpoint_every == 0 or last or halt
                if update.step % recipe.log_every == 0:
                    self._log(update.step, update.lr, update.images_seen)
                elif due or self.device.type == "cpu":
                    self._look()
                if due:
                    self._save()
                    events.append("checkpoint")
                if recipe.preview_every and (update.step % recipe.preview_every == 0 or last):
                    events.append(f"preview {self._preview()}")
                clock = time.monotonic()
                yield self._report(", ".join(events))
                if halt:
                    return

    def _report(self, event: str = "") -> Report:
        loss = self.total / self.count if self.count else self.last
        step = self.trainer.step
        return Report(step, self.config.train.steps, loss, step * self.config.train.batch, event)

    def _look(self) -> None:
        """Look at the losses since the last look; on a GPU this waits for it."""
        for step, loss, norm in self.waiting:
            value = float(loss)
            if not (math.isfinite(value) and math.isfinite(float(norm))):
                raise not_finite(step)
            self.total, self.count, self.norm = self.total + value, self.count + 1, float(norm)
        self.waiting.clear()

    def _log(self, step: int, lr: float, images_seen: int) -> None:
        self._look()
        self.last = self.total / self.count
        values = {"loss": self.last, "grad_norm": self.norm, "lr": lr}
        line = {"step": step, **values, "images_seen": images_seen, "seconds": round(self.seconds, 3)}
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            if self.board:
                self.board.add_scalar(name, value, step)
        self.total, self.count = 0.0, 0

    def _board(self, closing: contextlib.ExitStack) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("tensorboard is not installed: metrics go to metrics.jsonl only")
            return None
        writer: Any = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.trainer.step + 1)
        closing.callback(writer.close)
        return writer

    def _states(self) -> list[Path]:
        return sorted((self.folder / "state").glob("*.safetensors"))

    def _resume(self) -> str:
        make_folder(self.folder / "state")
        remove_parts(self.folder / "state")
        states = self._states()
        if not states:
            self._cut_metrics(0)
            return "started"
        try:
            tensors, meta = read_tensors(states[-1])
            self.trainer.load_state(tensors)
            self.total, self.count, self.seconds = meta["total"], meta["count"], meta["seconds"]
        except (DdimError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = error.wrong if isinstance(error, DdimError) else str(error).splitlines()[0]
            wrong = f"is not a state of this run ({why})"
            raise DdimError(states[-1], wrong, "remove it to go on from the one before") from None
        self.saved = self.trainer.step
        self._cut_metrics(self.trainer.step)
        if self._exported() != self.trainer.step:
            self._export()
        was, now = meta.get("software"), self._software()
        if was != now:
            say(f"{self.folder}: was trained with {was}, goes on with {now}; bits may differ")
        return f"resumed at step {self.trainer.step}"

    def _cut_metrics(self, step: int) -> None:
        """Drop the lines after a step: they will be written again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
            write_atomic(path, "".join(kept).encode())

    def _save(self) -> None:
        step = self.trainer.step
        if step == self.saved:
            return
        meta: dict[str, Any] = {"step": step, "total": self.total, "count": self.count, "seconds": self.seconds}
        meta["software"] = self._software()
        path = self.folder / "state" / f"{step:08d}.safetensors"
        write_tensors(path, self.trainer.state(), meta)
        self.saved = step
        for old in self._states()[: -self.config.train.keep]:
            old.unlink()
        self._export()

    def _software(self) -> dict[str, Any]:
        """What the bits of a step depend on beside the state."""
        return {"torch": torch.__version__, "device": self.device.type, "threads": torch.get_num_threads()}

    def _exported(self) -> int | None:
        """The step of the model in `model/`, None if there is no whole one."""
        with contextlib.suppress(DdimError):
            return checkpoint.read(self.folder / "model")[0].provenance.steps
        return None

    def _export(self) -> None:
        config = self._model_config()
        checkpoint.write(self.folder / "model", config, self.trainer.ema.module.state_dict())

    def _model_config(self) -> ModelConfig:
        step, recipe = self.trainer.step, self.config.train
        times, errors = self.trainer.errors.means()
        T = self.objective.schedule.T
        error = complete(times, errors, T) if len(times) >= KNOWN * T else None
        provenance = Provenance(
            data=self.pictures.name,
            split=self.config.split,
            data_fingerprint=self.config.data_fingerprint,
            pictures=len(self.pictures),
            command=self.command,
            version=ddim.__version__,
            steps=step,
            images_seen=step * recipe.batch,
            seconds=round(self.seconds, 1),
            training=recipe,
            error_from="training" if error else "",
        )
        return self.config.model.model_copy(update={"provenance": provenance, "error": error})

    def _preview(self) -> str:
        classes = self.config.model.network.classes
        labels = [i % classes for i in range(PREVIEWS)] if classes else None
        model = of(self.trainer.ema.module, self.config.model, self.device)
        if self.preview_plan is None:
            self.preview_plan = model.plan(20)
        blocks = model.sample_blocks(self.preview_plan, range(PREVIEWS), self.config.train.seed, labels)
        samples = [sample for block in blocks for sample in self.kind.render(block)]
        path = make_folder(self.folder / "previews") / f"{self.trainer.step:08d}"
        return self.kind.preview(path, samples).name
