"""Validated configurations of models and trainings, stored as JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

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


def _policy_tag(data: Any) -> str:
    return "text" if isinstance(data, TextPolicy) or (isinstance(data, dict) and "length" in data) else "images"


Policy = Annotated[
    Annotated[ImagePolicy, Tag("images")] | Annotated[TextPolicy, Tag("text")], Discriminator(_policy_tag)
]
"""The preprocessing of a data set's items to the network's input: of images, or of text, which has a length."""
_TAGS = ("images", "text", "unet", "transformer", "lucidrains")  # tags of the unions; not keys of the JSON file


class ScheduleConfig(BaseModel):
    """A noise schedule by name.

    Args:
        name: "linear", "scaled-linear", "quadratic", "sigmoid", "cosine", or "betas" for a list.
        T: The number of timesteps.
        beta_start: First beta, for schedules that have one.
        beta_end: Last beta, for schedules that have one.
        betas: The list of betas if name is "betas", else None.
        zero_terminal_snr: Whether the schedule is rescaled to alpha_bar_T = 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ScheduleName = "linear"
    T: int = Field(1000, ge=1, le=limits.TIMES)
    beta_start: float | None = Field(None, gt=0, le=1)
    beta_end: float | None = Field(None, gt=0, le=1)
    betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if (self.name == "betas") != (self.betas is not None):
            raise ValueError('a list of betas needs the name "betas", and "betas" needs a list')
        if self.betas is not None and len(self.betas) != self.T:
            raise ValueError(f"T is {self.T}, but there are {len(self.betas)} betas")
        if self.name in ("cosine", "betas") and (self.beta_start is not None or self.beta_end is not None):
            raise ValueError(f"{self.name} takes no beta_start or beta_end")
        try:
            self.build()  # fail when an invalid schedule is read, not when it is first used
        except DdimError as error:
            raise ValueError(error.problem) from None
        return self

    def build(self) -> schedules.Schedule:
        """The schedule."""
        if self.betas is not None:
            schedule = schedules.from_betas(self.betas)
        else:
            bounds = {"beta_start": self.beta_start, "beta_end": self.beta_end}
            arguments: dict[str, Any] = {key: value for key, value in bounds.items() if value is not None}
            schedule = schedules.NAMED[self.name](self.T, **arguments)
        return schedules.zero_terminal_snr(schedule) if self.zero_terminal_snr else schedule


class CategoricalConfig(BaseModel):
    """The configuration of discrete data, see `ddim.categorical`.

    Args:
        categories: The number of distinct tokens, or levels of a pixel, in the data.
        pi: The distribution that noise is drawn from: "uniform" as in the paper, "mask" (one additional category,
            absorbing diffusion), or one probability per category.
        carry_over: With a mask, whether a token that is not masked is equal to x_0 with certainty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    categories: int = Field(ge=2, le=limits.CATEGORIES)
    pi: Literal["uniform", "mask"] | tuple[_Share, ...] = "uniform"
    carry_over: bool = False

    @model_validator(mode="after")
    def _check(self) -> CategoricalConfig:
        if isinstance(self.pi, tuple) and len(self.pi) != self.categories:
            raise ValueError(f"there are {self.categories} categories, but pi has {len(self.pi)} numbers")
        self.alphabet()
        return self

    @property
    def excludes(self) -> bool:
        """Whether pi is 0 for some category; alpha_bar_T must then be 0, or KL(q(x_T | x_0) || p(x_T)) is infinite."""
        return self.pi == "mask" if isinstance(self.pi, str) else 0 in self.pi

    @property
    def size(self) -> int:
        """The number of categories of x_t: those of the data, and the mask."""
        return self.categories + (self.pi == "mask")

    def alphabet(self) -> Alphabet:
        """The alphabet: the categories of x_t and their pi."""
        if self.pi == "mask":
            return Alphabet.masked(self.categories, self.carry_over)
        if self.pi == "uniform":
            return Alphabet(Alphabet.uniform(self.categories).pi, carry_over=self.carry_over)
        return Alphabet(torch.tensor(self.pi, dtype=torch.float64), carry_over=self.carry_over)


class TrainConfig(BaseModel):
    """A training recipe. The defaults are those of the paper where it states them.

    Args:
        steps: The number of optimizer steps; None if only `budget` limits the training.
        budget: The duration of the whole run in seconds, or None. The learning rate then decays with time, to 0 at the
            end.
        batch: The number of images per step.
        accumulate: The number of parts of a batch for gradient accumulation, which saves memory.
        lr: The learning rate.
        warmup: The number of steps over which the learning rate increases from 0.
        decay: The learning rate at the end: constant, or decayed to 0 linearly or along a cosine.
        decay_fraction: The last fraction of the steps, or of the budget, over which the learning rate decays.
        weight_decay: Weight decay of AdamW.
        betas: Betas of AdamW.
        clip_grad: The maximum norm of the gradient.
        ema: Decay of the moving averages of the weights and of the error per timestep.
        ema_half_life: Instead of `ema`: half of the average's weight is on this fraction of the steps so far, see
            `ddim.nn.EMA`.
        gamma: The weights gamma_t of the objective, eq. (5), see `ddim.objective.weights`.
        times: Whether timesteps are drawn uniformly, or in proportion to their weight, see
            `ddim.objective.timestep_sampling`.
        antithetic: Whether timesteps are drawn in pairs t, T + 1 - t.
        flip: Whether images are flipped horizontally at random.
        label_drop: The probability of dropping a label, for classifier-free guidance.
        precision: "bfloat16" autocast, "float32", or "auto" (bfloat16 if the processor supports it).
        compile: Whether to compile the network with torch.compile.
        compile_mode: The mode of torch.compile.
        layout: The memory format of the network; "auto" is channels-last on a GPU.
        data_on: Where the decoded data set is stored: "host", "device", or "auto" (on a GPU if it fits in a quarter of
            the free memory).
        seed: The seed of all randomness in the training.
        checkpoint_every: Steps between checkpoints.
        keep: The number of checkpoints to keep.
        preview_every: Steps between preview images, 0 for none.
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
    flip: bool = False
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
    def _check(self) -> TrainConfig:
        if self.steps is None and self.budget is None:
            raise ValueError("neither steps nor a budget is set")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch {self.batch}")
        return self


class Provenance(BaseModel):
    """The provenance of a model: its data and its training.

    Args:
        data: The data set's name.
        split: The split of the data set.
        data_fingerprint: A hash of the data set's contents.
        images: The number of images in the data set.
        command: The command that trained the model.
        version: The version of this library.
        steps: The number of optimizer steps.
        images_seen: The number of images that the network was trained on, counting repetitions.
        seconds: The training time.
        training: The training recipe.
        init_from: The checksum of the model whose weights initialised the training; empty if none.
        error_from: How the table of the error was measured: "training", or "calibrate" and its data; empty if it was
            not.
    """

    model_config = _STRICT
    data: str = ""
    split: str = ""
    data_fingerprint: str = ""
    images: int = Field(0, validation_alias=AliasChoices("images", "pictures"))  # older files
    command: str = ""
    version: str = ""
    steps: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    training: TrainConfig | None = None
    init_from: str = Field("", validation_alias=AliasChoices("init_from", "begun_from"))
    error_from: str = ""


class Origin(BaseModel):
    """The library that a model was converted from, see `ddim.model.importers`.

    Args:
        format: The library's format.
        settings: The settings of the library's sampler, for emulating its steps and for exporting the model.
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
        predicts: "eps", "x0" or "v"; "x0" for discrete data.
        categorical: The configuration of discrete data; None for real-valued images.
        network: The configuration of the network.
        data: The preprocessing of images to the network's input, or of text to tokens.
        provenance: The provenance of the model.
        error: E || eps - eps_theta ||^2 / d at t = 1..T, the error of the predicted noise; or None. After training it
            is the error of the raw weights (not the moving average, with dropout and flips), averaged over recent
            steps; after `ddim calibrate` it is the error of this model. For discrete data it is the cross-entropy of
            x_0 per token, in nats.
        origin: The library that the model was converted from, or None.
        statistics: Statistics of the training images; None if not recorded, and for discrete data.
        sha256: The checksum of `model.safetensors`; empty before it is saved.
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
    def _check(self) -> ModelConfig:
        expected = (
            self.network.shape[-2:] + self.network.shape[:1] if len(self.network.shape) == 3 else self.network.shape
        )
        if tuple(self.data.shape) != expected:
            raise ValueError(f"the data have shape {self.data.shape}, the network expects {expected}")
        categories = self.categorical.size if self.categorical else 0
        if self.network.categories != categories:
            raise ValueError(f"x_t has {categories} categories, the network has {self.network.categories}")
        vocabulary = self.data.categories if isinstance(self.data, TextPolicy) else None
        if vocabulary is not None and self.categorical and self.categorical.categories != vocabulary:
            raise ValueError(f"the vocabulary has {vocabulary} tokens, not {self.categorical.categories}")
        if self.categorical and self.predicts != "x0":
            raise ValueError("a network of discrete data predicts x0")
        top = self.schedule.build().level(self.schedule.T) if self.categorical and self.categorical.excludes else None
        if top and top.alpha_bar > 0:
            raise ValueError("noise without some category needs schedule.zero_terminal_snr = true")
        if self.predicts == "eps" and self.schedule.zero_terminal_snr:
            raise ValueError("a network that predicts eps cannot start at zero terminal SNR; predict v or x0")
        if self.error is not None and len(self.error) != self.schedule.T:
            raise ValueError(f"T is {self.schedule.T}, but the error has {len(self.error)} values")
        return self

    @property
    def needs_label(self) -> bool:
        """Whether the network takes labels and was never trained without them."""
        recipe = self.provenance.training
        return bool(self.network.classes) and recipe is not None and recipe.label_drop == 0

    def error_at(self, level: Level) -> float:
        """The table `error` at a level, interpolated linearly in t; the value at t = 0 is 1.

        At t = 0 the data are clean, and nothing can be predicted about the noise.

        Raises:
            DdimError: If the model has no table.
        """
        if self.error is None:
            problem = "this model has no table of errors per timestep"
            raise DdimError("sigma optimal", problem, "measure one with `ddim calibrate MODEL DATA --out FOLDER`")
        return float(np.interp(level.t, np.arange(self.schedule.T + 1), (1.0, *self.error)))


Config = TypeVar("Config", bound=BaseModel)


def parse(kind: type[Config], text: str | bytes, name: str | Path) -> Config:
    """Parse a configuration from JSON text.

    Raises:
        DdimError: As for `ddim._io.reading.parse_json`, or naming the first invalid key and the reason.
    """
    parse_json(text, name)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise _invalid(error, name) from None


def build(kind: type[Config], values: dict[str, Any], name: str | Path) -> Config:
    """Build a configuration from Python values.

    Raises:
        DdimError: Naming the first invalid key and the reason.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, name) from None


def to_json(config: BaseModel) -> str:
    """A configuration as readable JSON text: indented, with each array of numbers on one line."""
    text = config.model_dump_json(indent=2)
    # Newlines occur only between values: within a string they are escaped as \\n.
    return re.sub(r"\[\n\s*([-+.\deE,\s]+?)\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _invalid(error: ValidationError, name: str | Path) -> DdimError:
    """The first problem of a validation, as an error of one line."""
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), DdimError):
        return cause
    key = ".".join(str(part) for part in first["loc"] if part not in _TAGS)
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    received = f", not {shorten(repr(value))}" if isinstance(value, int | float | str | bool | None) and key else ""
    return DdimError(name, f"{key + ': ' if key else ''}{message}{received}", "correct that value")
