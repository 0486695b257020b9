"""A resumable training run: checkpoints, metrics, previews and the model, all written atomically.

RUN/run.json                     the run's configuration; training with a different one is an error
RUN/state/00000500.safetensors   everything the next step depends on; the last few are kept
RUN/metrics.jsonl                one line every `log_every` steps; TensorBoard events beside it
RUN/previews/00000500.png        samples of the averaged weights
RUN/model/                       the model folder, with the averaged weights
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ddim
from ddim._io.atomic import claimed, make_folder
from ddim._io.reading import entry
from ddim._io.temporary import remove_parts
from ddim.errors import DdimError, warn
from ddim.model import checkpoint
from ddim.model.config import ModelConfig, Provenance
from ddim.model.load import build_model
from ddim.model.modality import modality_of
from ddim.model.network_config import NetworkConfig
from ddim.model.plausible import statistics_of
from ddim.plan.base import BasePlan
from ddim.process import rng
from ddim.train import states
from ddim.train.clock import Clock
from ddim.train.error_table import interpolate
from ddim.train.logger import IDS, Logger, MetricsLogger, check_logger
from ddim.train.run_config import RUN, NetworkRunConfig, RunConfig, check_data, check_run_dir, write_or_verify
from ddim.train.run_config import length as run_length
from ddim.train.trainer import StepAbandoned, Trainer, not_finite

PREVIEWS = 36
MIN_SHARE = 0.01  # fraction of the budget that must be used before the run's length is estimated
_PARTIAL = (
    RUN,
    states.FOLDER,
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    IDS,
)  # removed if the run fails before its first result
MIN_COVERAGE = 0.1  # fraction of the timesteps with an error estimate that the model's error table needs


@dataclass(frozen=True, slots=True)
class Report:
    """Progress of a run after a step.

    Args:
        step: Steps done.
        steps: Total steps of the run; with a time budget an estimate, None at first.
        loss: Mean loss since the last line of the metrics file.
        images_seen: Images trained on so far.
        event: Description of what was just written, "" for nothing.
        over: Whether this was the last step.
        left: Seconds left of the time budget, None without one.
    """

    step: int
    steps: int | None
    loss: float
    images_seen: int
    event: str = ""
    over: bool = False
    left: float | None = None


def train(
    folder: Path,
    config: RunConfig | NetworkRunConfig,
    images: Any,
    device: torch.device | str,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
    weights: Mapping[str, torch.Tensor] | None = None,
    started: float | None = None,
    abandon: Callable[[], bool] | None = None,
    log: str | Logger | None = None,
    loop_type: type[TrainingLoop] | None = None,
) -> Iterator[Report]:
    """Start a run, or resume it from its last checkpoint.

    Args:
        folder: The run directory.
        config: The run's configuration.
        images: The dataset.
        device: The training device.
        command: The command, for the model's provenance.
        stop: Called after every step; if it returns True, a checkpoint is written and the run stops.
        weights: Initial weights of a new run, if `config.init_from` names a model.
        started: Start time of the budget, from `time.monotonic`; default: now.
        abandon: Called often during a step on a CPU and during a preview; if it returns True, that step or preview is
            abandoned, the last complete step is saved, and the run stops.
        log: Where metrics are logged besides metrics.jsonl, see `ddim.train.logger.logger_of`.
        loop_type: The training loop, which decides what is trained; by default that of this library's networks.

    Yields:
        A report when the run is ready, then one after every step.

    Raises:
        DdimError: If the folder is in use or holds another run, or the loss is not finite.
    """
    if isinstance(config, RunConfig):
        check_data(config, images)
    check_logger(log)
    check_run_dir(folder)
    with claimed(folder, *_PARTIAL) as claim:
        for part in (folder, folder / "previews"):
            remove_parts(part)
        checkpoint.remove_earlier_parts(folder / "model")
        write_or_verify(folder, config)
        clock = Clock(config.train.budget, started, ("save", "preview") if config.train.preview_every else ("save",))
        loop = (loop_type or TrainingLoop)(folder, config, images, torch.device(device), command, weights, clock)
        loop.trainer.abandon, loop.log = abandon, log
        try:
            for report in loop.reports(stop):
                if loop.saved > 0 or loop.logged:
                    claim.keep()
                yield report
        finally:  # a step may fail between its checkpoint and its report
            if loop.saved > 0 or loop.logged:
                claim.keep()


class TrainingLoop:
    """The steps of a run with everything that is written on the way.

    Args:
        folder: The run directory.
        config: The run's configuration.
        images: The dataset.
        device: The training device.
        command: The command, for the model's provenance.
        weights: Initial weights of a new run, or None.
        clock: The clock of the budget.
    """

    log: str | Logger | None = None

    def __init__(
        self,
        folder: Path,
        config: Any,
        images: Any,
        device: torch.device,
        command: str,
        weights: Mapping[str, torch.Tensor] | None,
        clock: Clock,
    ):
        self.folder, self.config, self.images, self.command = folder, config, images, command
        self.device, self.clock = device, clock
        self.trainer = self._new_trainer(weights)
        self.objective = self.trainer.objective
        self.share, self.ended = clock.share, False
        self.first = 0, 0.0  # step and share at the start of this process's training
        self.trainer.spent = lambda: self.share
        self.total, self.count, self.seconds, self.last = 0.0, 0, 0.0, math.nan
        self.waiting: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.saved, self.logged = -1, False
        self.rejected: set[Path] = set()
        self.preview_plan: BasePlan[Any] | None = None

    def _new_trainer(self, weights: Mapping[str, torch.Tensor] | None) -> Trainer:
        """The trainer of the network."""
        recipe, model, images = self.config.train, self.config.model, self.images
        with rng.temporary_seed("cpu", recipe.seed):
            network = model.network.build()
        if weights is not None:
            checkpoint.fill(network, weights, "weights")
        self.modality, classes = modality_of(model), model.network.classes
        self.statistics = None if model.categorical else statistics_of(images, self.modality.read)
        return Trainer(
            network.to(self.device),
            self.modality.loss(recipe.gamma, self.device, recipe.times),
            images.batch,
            len(images),
            recipe,
            images.labels if classes else None,
            classes,
            self.modality.read,
            self.config.init_from.steps if self.config.init_from else 0,
        )

    def reports(self, stop: Callable[[], bool]) -> Iterator[Report]:
        """Train from the last checkpoint until the end, or until `stop` returns True."""
        try:
            yield from self._steps(stop)
        except StepAbandoned:
            self._check_losses()
            if self.trainer.step > self.trainer.start_step:
                self._save(self.trainer.over)
            yield self._report()

    def _steps(self, stop: Callable[[], bool]) -> Iterator[Report]:
        recipe, trainer = self.config.train, self.trainer
        status, exported = self._resume(), self._exported()
        yield self._report(f"{status}, compiling the network first" if recipe.compile and not trainer.over else status)
        if self.share >= 1 and not self.ended:
            problem = f"is used up ({self.clock.used:.0f} s) before the first step"
            note = f", to decay the learning rate from step {trainer.step}, whose model exists" if exported else ""
            raise DdimError(f"budget of {recipe.budget:g} s", problem, f"use a larger budget{note}")
        if status != "started" and self._preview_due(missing=True):  # interrupted between state and preview
            with self.clock.timed("preview"):
                self._preview()
        now, self.first = time.monotonic(), (trainer.step, self.clock.share)
        settings = self.config.train.model_dump(mode="json")
        with MetricsLogger(self.folder, trainer.step, self.log, settings) as self.metrics:
            for update in trainer.updates():
                self.seconds, now = self.seconds + time.monotonic() - now, time.monotonic()
                self.share = self.clock.after_step()
                self.waiting.append((update.step, update.loss, update.grad_norm))
                events = []
                last = trainer.over
                stopping = stop()
                due = update.step % recipe.checkpoint_every == 0 or last or stopping or self.clock.unmeasured("save")
                if update.step % recipe.log_every == 0:
                    self._log(update.step, update.lr)
                elif due or self.device.type == "cpu":
                    self._check_losses()
                if due:
                    with self.clock.timed("save"):
                        self._save(last)
                    events.append("checkpoint")
                if self._preview_due():
                    with self.clock.timed("preview"):
                        events.append(f"preview {self._preview()}")
                now = time.monotonic()
                yield self._report(", ".join(events))
                if stopping:
                    return

    def _report(self, event: str = "") -> Report:
        loss = self.total / self.count if self.count else self.last
        step = self.trainer.step
        return Report(step, self._total_steps(), loss, self._images_seen(), event, self.trainer.over, self.clock.left)

    def _total_steps(self) -> int | None:
        """Total steps of the run, estimated if there is a time budget; None if there is no estimate yet."""
        steps, step, used = self.config.train.steps, self.trainer.step, self.share - self.first[1]
        estimate = step + (step - self.first[0]) * (1 - self.share) / used if used > MIN_SHARE else math.inf
        estimate = min(step if self.share >= 1 else estimate, math.inf if steps is None else steps)
        return None if math.isinf(estimate) else max(round(estimate), self.trainer.step)

    def _images_seen(self) -> int:
        """Images trained on so far, including those behind the initial weights."""
        before: int = self.config.init_from.images_seen if self.config.init_from else 0
        batch: int = self.config.train.batch
        return before + (self.trainer.step - self.trainer.start_step) * batch

    def _check_losses(self) -> None:
        """Check and sum the losses since the last call; on a GPU this synchronises."""
        with self.clock.timed("wait"):
            waiting = [(step, float(loss), float(norm)) for step, loss, norm in self.waiting]
        for step, loss, norm in waiting:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise not_finite(step)
            self.total, self.count, self.norm = self.total + loss, self.count + 1, norm
        self.waiting.clear()

    def _log(self, step: int, lr: float) -> None:
        self._check_losses()
        self.last = self.total / self.count
        values = {"loss": self.last, "grad_norm": self.norm, "lr": lr}
        self.metrics.log(step, values, images_seen=self._images_seen(), seconds=round(self.seconds, 3))
        self.total, self.count, self.logged = 0.0, 0, True

    def _resume(self) -> str:
        folder = make_folder(self.folder / states.FOLDER)
        remove_parts(folder)
        restored: dict[str, Any] = {}

        def load(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
            self.trainer.load_state(tensors)
            self.total, self.seconds = (entry(meta, key, float, folder) for key in ("total", "seconds"))
            self.count = entry(meta, "count", int, folder)
            self.clock.before = entry(meta, "used", float, folder, self.seconds)
            durations = entry(meta, "took", dict, folder, {})
            self.clock.longest = {key: entry(durations, key, float, folder) for key in durations}
            self.ended = meta.get("over") == run_length(self.config.train)
            self.share = 1.0 if self.ended else self.clock.share
            restored.update(meta)

        self.rejected = states.resume(self.folder, load)
        if not restored:
            return "started"
        self.saved = self.trainer.step
        states.prune(self.folder, self.saved, self.config.train.keep, self.rejected)  # a kill may have come before it
        if self._exported() != self.trainer.step:
            self._export()
        before, now = restored.get("software"), self._software()
        if before != now:
            warn(f"{self.folder}: was trained with {before} and is resumed with {now}; bits may differ")
        return f"resumed at step {self.trainer.step}"

    def _save(self, over: bool) -> None:
        step = self.trainer.step
        if step == self.saved:
            return
        meta: dict[str, Any] = {"total": self.total, "count": self.count, "seconds": self.seconds}
        meta |= {"software": self._software(), "used": self.clock.used, "took": self.clock.longest}
        meta |= {"over": run_length(self.config.train)} if over else {}
        self.rejected.discard(states.write(self.folder, step, self.trainer.state(), meta))
        self.saved = step
        states.prune(self.folder, step, self.config.train.keep, self.rejected)
        self._export()

    def _software(self) -> dict[str, Any]:
        """What the exact result of a step depends on besides the state."""
        return {"torch": torch.__version__, "device": self.device.type, "threads": torch.get_num_threads()}

    def _exported(self) -> int | None:
        """The step of the model in `model/`; None if there is no complete one."""
        with contextlib.suppress(DdimError):
            return checkpoint.read(self.folder / "model")[0].provenance.steps
        return None

    def _export(self) -> None:
        config = self._model_config()
        checkpoint.write(self.folder / "model", config, self.trainer.ema.module.state_dict())

    def _model_config(self) -> ModelConfig | NetworkConfig:
        step, recipe = self.trainer.step, self.config.train
        times, errors = self.trainer.errors.means()
        T = self.objective.schedule.T
        error = interpolate(times, errors, T) if len(times) >= MIN_COVERAGE * T else None
        provenance = Provenance(
            data=self.images.name,
            split=self.config.split,
            data_fingerprint=self.config.data_fingerprint,
            images=len(self.images),
            command=self.command,
            version=ddim.__version__,
            steps=step,
            images_seen=self._images_seen(),
            seconds=round(self.seconds, 1),
            training=recipe,
            init_from=self.config.init_from.sha256 if self.config.init_from else "",
            error_from="training" if error else "",
        )
        update = {"provenance": provenance, "error": error, "statistics": self.statistics}
        model: ModelConfig = self.config.model.model_copy(update=update)
        return model

    def _preview(self) -> str:
        classes = self.config.model.network.classes
        labels = [i % classes for i in range(PREVIEWS)] if classes else None
        model = build_model(self.trainer.ema.module, self.config.model, self.device)
        if self.preview_plan is None:
            self.preview_plan = model.plan()
        through = self._abandonable if self.trainer.abandon else None
        seed = self.config.train.seed
        batches = model.sample_blocks(self.preview_plan, range(PREVIEWS), seed, labels, through=through)
        samples = [sample for batch in batches for sample in self.modality.render(batch)]
        path = make_folder(self.folder / "previews") / f"{self.trainer.step:08d}"
        return self.modality.preview(path, samples).name

    def _abandonable(self, denoise: Any) -> Any:
        """A denoiser that raises `StepAbandoned` on request."""

        def checked(*arguments: Any) -> Any:
            if self.trainer.abandon and self.trainer.abandon():
                raise StepAbandoned
            return denoise(*arguments)

        return checked

    def _preview_due(self, missing: bool = False) -> bool:
        step, every = self.trainer.step, self.config.train.preview_every
        due = every > 0 and (step % every == 0 or self.trainer.over or self.clock.unmeasured("preview"))
        return due and not (missing and [*self.folder.glob(f"previews/{step:08d}.*")])
