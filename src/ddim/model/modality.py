"""Data modalities (images, quantised images, text) and everything that depends on the modality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ddim._io.atomic import write_atomic
from ddim._io.png import png, png_text
from ddim._io.sheets import save_sheet
from ddim.data.pixels import BIN, dequantize, quantize, to_float, to_uint8
from ddim.data.text import TextPolicy
from ddim.errors import DdimError
from ddim.model.config import ModelConfig
from ddim.model.denoisers import OutputFn, image_output, token_output
from ddim.names import TimestepDraw
from ddim.objective import categorical_elbo, elbo
from ddim.objective.base import Loss
from ddim.objective.cross_entropy import CrossEntropy
from ddim.objective.mse import Objective
from ddim.plan.base import BasePlan, as_planned
from ddim.plan.categorical import CategoricalPlan
from ddim.plan.plan import Plan
from ddim.process.categorical import Alphabet
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise, TokenNoise


@dataclass(frozen=True)
class Modality(ABC):
    """The operations that depend on the data modality.

    Args:
        config: The model's configuration.
    """

    config: ModelConfig
    unit: ClassVar[str]
    """The unit of throughput, as in images per second."""
    noun: ClassVar[str]
    """The plural noun for samples in messages."""
    nll_unit: ClassVar[str] = "bits/dim"
    """The unit of a likelihood."""

    @property
    @abstractmethod
    def hub(self) -> OutputFn[Any]:
        """The function from the network's output to a prediction."""

    @abstractmethod
    def loss(self, gamma: Any, device: torch.device, drawn: TimestepDraw = "uniform") -> Loss:
        """The training loss."""

    @abstractmethod
    def read(self, batch: np.ndarray | Tensor) -> Tensor:
        """Convert a batch of the data set to x_0, (B, ...)."""

    @abstractmethod
    def noise(self, seed: int, indices: Sequence[int], device: torch.device) -> Noise:
        """The noise of the samples with these indices."""

    @abstractmethod
    def check_plan(self, plan: BasePlan[Any]) -> None:
        """Raise a DdimError for a plan of another modality."""

    @abstractmethod
    def read_plan(self, text: str, name: str) -> BasePlan[Any]:
        """Read a plan of this modality from JSON text."""

    @abstractmethod
    def prior(self, plan: Any, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || p(x_T)) of each sample: float64, (N,), in nats."""

    @abstractmethod
    def term(self, denoise: AnyDenoiser, plan: Any, k: int, x0: Tensor, fresh: Tensor, last_sigma: float) -> Tensor:
        """The variational bound's term of the plan's row k at one draw of x_t: float64, (N,), in nats."""

    @abstractmethod
    def path(self, folder: Path, index: int) -> Path:
        """The path of the file of sample `index`."""

    @abstractmethod
    def render(self, block: Tensor) -> Sequence[Any]:
        """Convert each sample of a micro-batch (N, ...) to the form that is saved."""

    @abstractmethod
    def file_of(self, sample: Any, text: dict[str, str]) -> bytes:
        """The bytes of a rendered sample's file, with the metadata `text` if the format can store it."""

    @abstractmethod
    def is_whole(self, path: Path, text: dict[str, str]) -> bool:
        """Whether a file is a complete result of `file_of` with this metadata; its checksum is not verified."""

    @abstractmethod
    def preview(self, path: Path, samples: Sequence[Any]) -> Path:
        """Write rendered samples into one preview file; return its path with the suffix added."""


def image_path(folder: Path, index: int) -> Path:
    """The path of the file of image `index`."""
    return folder / f"{index:06d}.png"


class _PngFiles(Modality):
    """Samples that are saved as PNG files."""

    unit = noun = "images"

    @override
    def path(self, folder: Path, index: int) -> Path:
        return image_path(folder, index)

    @override
    def file_of(self, sample: Any, text: dict[str, str]) -> bytes:
        return png(sample, text)

    @override
    def is_whole(self, path: Path, text: dict[str, str]) -> bool:
        return png_text(path).items() >= text.items()

    @override
    def preview(self, path: Path, samples: Sequence[Any]) -> Path:
        file = path.with_suffix(".png")
        save_sheet(file, np.stack(samples), 6)
        return file


class Images(_PngFiles):
    """Real-valued images, x_0 in [-1, 1]."""

    @property
    @override
    def hub(self) -> OutputFn[Any]:
        return image_output(self.config.predicts)

    @override
    def loss(self, gamma: Any, device: torch.device, drawn: TimestepDraw = "uniform") -> Loss:
        return Objective(self.config.schedule.build(), self.config.predicts, gamma, device, drawn)

    @override
    def read(self, batch: np.ndarray | Tensor) -> Tensor:
        return to_float(batch)

    @override
    def noise(self, seed: int, indices: Sequence[int], device: torch.device) -> Noise:
        return Noise(seed, tuple(indices), self.config.network.shape, device)

    @override
    def check_plan(self, plan: BasePlan[Any]) -> None:
        if not isinstance(plan, Plan):
            raise DdimError(f"plan {plan.name}", "is for discrete data, not images", "use a plan of Model.plan")
        if any(row.z_high for row in plan.rows) and not getattr(self.config.network, "learned_variance", False):
            problem = "needs the network's learned variance, which this model's has not"
            raise DdimError(f"plan {plan.name}", problem, "use a plan with eta or another sigma")

    @override
    def read_plan(self, text: str, name: str) -> BasePlan[Any]:
        return Plan.from_json(text, name)

    @override
    def prior(self, plan: Any, x0: Tensor) -> Tensor:
        return elbo.prior_term(x0, plan.start)

    @override
    def term(self, denoise: AnyDenoiser, plan: Any, k: int, x0: Tensor, fresh: Tensor, last_sigma: float) -> Tensor:
        return elbo.row_term(as_planned(denoise, plan), plan.rows[k], x0, fresh, last_sigma, BIN)

    @override
    def render(self, block: Tensor) -> Sequence[Any]:
        return list(to_uint8(block))


class _Discrete(Modality):
    """Discrete data."""

    @cached_property
    def alphabet(self) -> Alphabet:
        assert self.config.categorical is not None
        return self.config.categorical.alphabet()

    @property
    @override
    def hub(self) -> OutputFn[Any]:
        return token_output(self.alphabet)

    @override
    def loss(self, gamma: Any, device: torch.device, drawn: TimestepDraw = "uniform") -> Loss:
        return CrossEntropy(self.config.schedule.build(), self.alphabet, gamma, device, drawn)

    @override
    def noise(self, seed: int, indices: Sequence[int], device: torch.device) -> Noise:
        return TokenNoise(seed, tuple(indices), self.config.network.shape, device, self.alphabet.pi)

    @override
    def check_plan(self, plan: BasePlan[Any]) -> None:
        if not isinstance(plan, CategoricalPlan):
            raise DdimError(f"plan {plan.name}", "is for real-valued data", "use a plan of Model.plan")
        if plan.pi != self.alphabet.weights:
            problem = f"has {len(plan.pi)} categories or another pi than the model, which has {self.alphabet.size}"
            raise DdimError(f"plan {plan.name}", problem, "create the plan with this model")

    @override
    def read_plan(self, text: str, name: str) -> BasePlan[Any]:
        return CategoricalPlan.from_json(text, name)

    @override
    def prior(self, plan: Any, x0: Tensor) -> Tensor:
        return categorical_elbo.prior_term(plan, x0)

    @override
    def term(self, denoise: AnyDenoiser, plan: Any, k: int, x0: Tensor, fresh: Tensor, last_sigma: float) -> Tensor:
        return categorical_elbo.row_term(denoise, plan, plan.rows[k], x0, fresh)


class QuantizedImages(_PngFiles, _Discrete):
    """Images with K levels per channel."""

    @override
    def read(self, batch: np.ndarray | Tensor) -> Tensor:
        return quantize(batch, self._levels)

    @override
    def render(self, block: Tensor) -> Sequence[Any]:
        return list(dequantize(block, self._levels))

    @property
    def _levels(self) -> int:
        assert self.config.categorical is not None
        return self.config.categorical.categories


class Text(_Discrete):
    """Sequences of tokens."""

    unit, noun, nll_unit = "sequences", "texts", "bits/token"

    @override
    def read(self, batch: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(batch)

    @override
    def path(self, folder: Path, index: int) -> Path:
        return folder / f"{index:06d}.txt"

    @override
    def render(self, block: Tensor) -> Sequence[Any]:
        return [cast(TextPolicy, self.config.data).decode(ids.cpu().numpy()) for ids in block]

    @override
    def file_of(self, sample: Any, text: dict[str, str]) -> bytes:
        return bytes(sample.encode())

    @override
    def is_whole(self, path: Path, text: dict[str, str]) -> bool:
        return path.stat().st_size > 0

    @override
    def preview(self, path: Path, samples: Sequence[Any]) -> Path:
        file = path.with_suffix(".txt")
        write_atomic(file, ("\n" + "-" * 80 + "\n").join(samples).encode())
        return file


def modality_of(config: ModelConfig) -> Modality:
    """The modality of a model's data."""
    if config.categorical is None:
        return Images(config)
    return Text(config) if isinstance(config.data, TextPolicy) else QuantizedImages(config)
