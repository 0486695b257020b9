"""What a model and a training are made of, as validated configurations that are written to JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ddim._io import limits
from ddim._io.reading import parse_json
from ddim.data.policy import DataStatistics, ImagePolicy
from ddim.data.text import TextPolicy
from ddim.errors import DdimError, shorten
from ddim.names import LossWeight, Predicts, Residency, ScheduleName, TimestepDraw
from ddim.nn.lucidrains import LucidrainsConfig
from ddim.nn.transformer import TransformerConfig
from ddim.nn.unet import UNetConfig
from ddim.process import schedule as schedules
from ddim.process.categorical import Alphabet
from ddim.process.schedule import Level

_Beta = Annotated[float, Field(ge=0, lt=1)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", frozen=True)

_Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _of_text(data: Any) -> str:
    return "text" if isinstance(data, TextPolicy) or (isinstance(data, dict) and "length" in data) else "pictures"


Policy = Annotated[
    Annotated[ImagePolicy, Tag("pictures")] | Annotated[TextPolicy, Tag("text")], Discriminator(_of_text)
]
"""How a data set's items become the network's input: pictures, or text, which has a length."""
_TAGS = ("pictures", "text", "unet", "transformer", "lucidrains")  # of the unions above, which no file names


class ScheduleConfig(BaseModel):
    """A noise schedule by name.

    Args:
        name: "linear", "scaled-linear", "quadratic", "sigmoid", "cosine", or "betas" for a list.
        T: The number of times.
        beta_start: First beta, where the name has one.
        beta_end: Last beta, where the name has one.
        betas: The list, with "betas".
        zero_terminal_snr: Whether it is rescaled to alpha_bar_T = 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ScheduleName = "linear"
    T: int = Field(1000, ge=1, le=limits.TIMES)
    beta_start: float | None = Field(None, gt=0, le=1)
    beta_end: float | None = Field(None, gt=0, le=1)
    betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if (self.name == "betas") != (self.betas is not None):
            raise ValueError('a list of betas goes with the name "betas", and only with it')
        if self.betas is not None and len(self.betas) != self.T:
            raise ValueError(f"T is {self.T}, there are {len(self.betas)} betas")
        if self.name in ("cosine", "betas") and (self.beta_start is not None or self.beta_end is not None):
            raise ValueError(f"{self.name} takes no beta_start or beta_end")
        try:
            self.build()  # whoever reads a schedule that is none is told so then, not whoever uses it
        except DdimError as error:
            raise ValueError(error.wrong) from None
        return self

    def build(self) -> schedules.Schedule:
        """The schedule."""
        if self.betas is not None:
            made = schedules.from_betas(self.betas)
        else:
            bounds = {"beta_start": self.beta_start, "beta_end": self.beta_end}
            given: dict[str, Any] = {key: value for key, value in bounds.items() if value is not None}
            made = schedules.NAMED[self.name](self.T, **given)
        return schedules.zero_terminal_snr(made) if self.zero_terminal_snr else made


class CategoricalConfig(BaseModel):
    """Data of categories instead of real numbers, see `ddim.categorical`.

    Args:
        categories: Kinds of tokens, or grey levels, of the data.
        pi: What noise draws from: "uniform" as in the paper, "mask" (one more category, absorbing diffusion), or one
            probability for each category.
        carry_over: With a mask, whether a token that is not masked is taken for x_0 with certainty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    categories: int = Field(ge=2, le=limits.CATEGORIES)
    pi: Literal["uniform", "mask"] | tuple[_Share, ...] = "uniform"
    carry_over: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> CategoricalConfig:
        if isinstance(self.pi, tuple) and len(self.pi) != self.categories:
            raise ValueError(f"there are {self.categories} categories, pi has {len(self.pi)} numbers")
        self.alphabet()
        return self

    @property
    def excludes(self) -> bool:
        """Whether noise never draws some category: then x_T must tell nothing of x_0, or its divergence is infinite."""
        return self.pi == "mask" if isinstance(self.pi, str) else 0 in self.pi

    @property
    def size(self) -> int:
        """Categories of x_t: the data's, and the mask."""
        return self.categories + (self.pi == "mask")

    def alphabet(self) -> Alphabet:
        """The categories of x_t and their pi."""
        if self.pi == "mask":
            return Alphabet.masked(self.categories, self.carry_over)
        if self.pi == "uniform":
            return Alphabet(Alphabet.uniform(self.categories).pi, carry_over=self.carry_over)
        return Alphabet(torch.tensor(self.pi, dtype=torch.float64), carry_over=self.carry_over)


class TrainConfig(BaseModel):
    """A training recipe. The defaults are the paper's where it has one.

    Args:
        steps: Optimiser steps; None where `budget` alone says how long.
        budget: Seconds that the whole run may take, or None. The learning rate then falls with time, to 0 at its end.
        batch: Pictures per step.
        accumulate: Parts a batch is cut into, to save memory.
        lr: Learning rate.
        warmup: Steps over which the learning rate rises from 0.
        decay: What the learning rate does at the end: stays, or falls to 0 linearly or along a cosine.
        decay_fraction: The last part of the steps, or of the budget, over which it falls.
        weight_decay: AdamW's.
        betas: Adam's.
        clip_grad: Largest norm of the gradient.
        ema: Decay of the moving average of the weights, and of that of the error per time.
        ema_half_life: Instead, the share of the steps made that counts for half of the average, see `ddim.nn.EMA`.
        gamma: The weights gamma_t of the objective, eq. (5), see `ddim.objective.weights`.
        times: Whether times are drawn uniformly, or in proportion to their weight, see
            `ddim.objective.timestep_sampling`.
        antithetic: Whether times are drawn in pairs t, T + 1 - t.
        flip: Whether pictures are flipped left-right at random.
        label_drop: How often a label is dropped, for classifier-free guidance.
        precision: "bfloat16" autocast, "float32", or "auto" (bfloat16 where the processor has it).
        compile: Whether the network goes through torch.compile.
        compile_mode: Its mode.
        layout: How the network's memory is laid out; "auto" is channels-last on a GPU.
        data_on: Where the data are held, undecoded no more: on the host, on the device, or "auto": on a GPU where they
            fit into a quarter of its free memory.
        seed: Of everything random in the training.
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept.
        preview_every: Steps between preview grids, 0 for none.
        log_every: Steps between lines of the metrics file.
    """

    model_config = _STRICT
    steps: int | None = Field(800_000, ge=1, le=limits.COUNT)
    budget: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch: int = Field(128, ge=1, le=limits.BATCH)
    accumulate: int = Field(1, ge=1, le=limits.BATCH)
    lr: float = Field(2e-4, gt=0, allow_inf_nan=False)
    warmup: int = Field(5000, ge=0, le=limits.COUNT)
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_fraction: float = Field(0.3, gt=0, le=1)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    clip_grad: float = Field(1.0, gt=0, allow_inf_nan=False)
    ema: float = Field(0.9999, ge=0, lt=1)
    ema_half_life: float | None = Field(None, gt=0, lt=1)
    gamma: LossWeight = "simple"
    times: TimestepDraw = "uniform"
    antithetic: bool = True
    flip: bool = True
    label_drop: float = Field(0.1, ge=0, le=1)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    layout: Literal["auto", "contiguous", "channels-last"] = "auto"
    data_on: Residency = "auto"
    seed: int = Field(0, ge=0, lt=2**64)
    checkpoint_every: int = Field(1000, ge=1, le=limits.COUNT)
    keep: int = Field(3, ge=1, le=limits.COUNT)
    preview_every: int = Field(1000, ge=0, le=limits.COUNT)
    log_every: int = Field(50, ge=1, le=limits.COUNT)

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.steps is None and self.budget is None:
            raise ValueError("neither steps nor a budget says how long to train")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch {self.batch}")
        return self


class Provenance(BaseModel):
    """Where a model comes from.

    Args:
        data: The data set's name.
        split: Its part.
        data_fingerprint: A hash of what it held.
        pictures: How many pictures it held.
        command: The command that trained it.
        version: The version of this library.
        steps: Optimiser steps.
        images_seen: Pictures shown to the network.
        seconds: Training time.
        training: The recipe.
        begun_from: The checksum of the model whose weights it began with; empty if none.
        error_from: How the table of the error was measured: "training", or "calibrate" with its data; empty if not.
    """

    model_config = _STRICT
    data: str = ""
    split: str = ""
    data_fingerprint: str = ""
    pictures: int = 0
    command: str = ""
    version: str = ""
    steps: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    training: TrainConfig | None = None
    begun_from: str = ""
    error_from: str = ""


class Origin(BaseModel):
    """Which other code's model it was, see `ddim.model.importers`.

    Args:
        format: That code.
        settings: What that code's sampler was set to, for those who want its very steps, and for the way back.
    """

    model_config = _STRICT
    format: Literal["diffusers", "official", "openai", "lucidrains"]
    settings: dict[str, str | bool | int | float | None] = {}


class ModelConfig(BaseModel):
    """A model folder's `config.json`.

    Args:
        format: Always "ddim-model".
        version: The format's version.
        schedule: The noise schedule.
        predicts: "eps", "x0" or "v"; "x0" for categories.
        categorical: The categories of the data; None for real-valued pictures.
        network: The network's shape.
        data: How pictures become the network's grid, or text its tokens.
        provenance: Where it comes from.
        error: E || eps - eps_theta ||^2 / d at t = 1..T, what is left of the noise after the network's guess; or None.
            From a training it is that of the network as it was trained (not averaged, with dropout and flips), over
            the steps that the moving average remembers; from `ddim calibrate` that of this model. Of categories it is
            the cross-entropy of x_0 per token, in nats.
        origin: The other code it comes from, where it does.
        statistics: Of the images it was trained on; None where they are not recorded, and for discrete data.
        sha256: Of `model.safetensors`; empty before it is saved.
    """

    model_config = _STRICT
    format: Literal["ddim-model"] = "ddim-model"
    version: Literal[1] = 1
    schedule: ScheduleConfig = ScheduleConfig()
    predicts: Predicts = "eps"
    categorical: CategoricalConfig | None = None
    network: UNetConfig | TransformerConfig | LucidrainsConfig = Field(discriminator="kind")
    data: Policy
    provenance: Provenance = Provenance()
    error: tuple[_Error, ...] | None = None
    origin: Origin | None = None
    statistics: DataStatistics | None = None
    sha256: str = ""

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        taken = self.network.shape[-2:] + self.network.shape[:1] if len(self.network.shape) == 3 else self.network.shape
        if tuple(self.data.shape) != taken:
            raise ValueError(f"the data policy gives {self.data.shape}, the network takes {taken}")
        known = self.categorical.size if self.categorical else 0
        if self.network.categories != known:
            raise ValueError(f"x_t has {known} categories, the network {self.network.categories}")
        words = self.data.categories if isinstance(self.data, TextPolicy) else None
        if words is not None and self.categorical and self.categorical.categories != words:
            raise ValueError(f"the vocabulary has {words} tokens, not {self.categorical.categories}")
        if self.categorical and self.predicts != "x0":
            raise ValueError("a network over categories predicts x0")
        top = self.schedule.build().level(self.schedule.T) if self.categorical and self.categorical.excludes else None
        if top and top.alpha_bar > 0:
            raise ValueError("noise that does not draw every category needs schedule.zero_terminal_snr = true")
        if self.predicts == "eps" and self.schedule.zero_terminal_snr:
            raise ValueError("a network that predicts eps cannot start at zero terminal SNR; predict v or x0")
        if self.error is not None and len(self.error) != self.schedule.T:
            raise ValueError(f"T is {self.schedule.T}, the error is given at {len(self.error)} times")
        return self

    @property
    def needs_label(self) -> bool:
        """Whether the network takes labels and was never trained without one."""
        recipe = self.provenance.training
        return bool(self.network.classes) and recipe is not None and recipe.label_drop == 0

    def error_at(self, level: Level) -> float:
        """The table `error` at a level, linear in t between its times, and to 1 at t = 0: clean data tell of no noise.

        Raises:
            DdimError: If there is no table.
        """
        if self.error is None:
            wrong = "this model has no table of its error per time"
            raise DdimError("sigma optimal", wrong, "measure one with `ddim calibrate MODEL DATA --out FOLDER`")
        return float(np.interp(level.t, np.arange(self.schedule.T + 1), (1.0, *self.error)))


Config = TypeVar("Config", bound=BaseModel)


def parse(kind: type[Config], text: str | bytes, name: str | Path) -> Config:
    """A configuration from JSON text.

    Raises:
        DdimError: As `ddim._io.reading.parse_json`, or naming the first key that is wrong and why.
    """
    parse_json(text, name)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise _invalid(error, name) from None


def build(kind: type[Config], values: dict[str, Any], name: str | Path) -> Config:
    """A configuration from Python values.

    Raises:
        DdimError: Naming the first key that is wrong and why.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, name) from None


def to_json(config: BaseModel) -> str:
    """A configuration as JSON text to be read by people too: indented, but an array of numbers on one line."""
    text = config.model_dump_json(indent=2)
    # A line's end stands between values only: within a string it would be written as \\n.
    return re.sub(r"\[\n\s*([-+.\deE,\s]+?)\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _invalid(error: ValidationError, name: str | Path) -> DdimError:
    """The first complaint of a validation, as one line."""
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), DdimError):
        return cause
    where = ".".join(str(part) for part in first["loc"] if part not in _TAGS)
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    got = f", not {shorten(repr(value))}" if isinstance(value, int | float | str | bool | None) and where else ""
    return DdimError(name, f"{where + ': ' if where else ''}{message}{got}", "mend that value")
