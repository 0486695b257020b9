"""`Model`: a trained network of any modality with its configuration, device and precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ddim._io import arguments
from ddim.data.pixels import to_float
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError
from ddim.model import checkpoint
from ddim.model.config import ModelConfig
from ddim.model.denoisers import NetworkDenoiser
from ddim.model.devices import usable
from ddim.model.hub import HubMixin
from ddim.model.importers.clipping import clipping_of
from ddim.model.modality import Modality, modality_of
from ddim.model.precision import Precision, without_cached
from ddim.model.runner import Runner, Through
from ddim.names import DType
from ddim.nn.base import Network
from ddim.plan.base import BasePlan
from ddim.process.categorical import Alphabet
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise
from ddim.process.schedule import Schedule
from ddim.samplers.registry import CategoricalPlanner, Planner
from ddim.sampling.guidance import Guidance, Guided
from ddim.sampling.loop import run


class Model(Runner, HubMixin):
    """A trained model of any modality: plans, sampling, encoding, tuning, saving and publishing.

    Args:
        network: The network in float32. It is put into evaluation mode, and gradients of its weights are disabled.
        config: The model's configuration.
        device: The device to compute on.
        dtype: The network's compute precision, see `ddim.names.DType`.
        compile: Whether to compile the network with torch.compile.
        micro_batch: The number of samples per network evaluation when sampling. It is fixed, and smaller parts are
            padded, so that a sample's bits do not depend on its neighbours. By default 8 on a CPU (4 in bfloat16), 64
            on a GPU. With "float32-fast" bits do not depend on it: it is a maximum, and nothing is padded.
        cuda_graphs: Whether sampling records whole plans as CUDA graphs and replays them, which saves kernel launch
            time, see `ddim.model.cuda_graphs`. None (the default) records a run at its second use if it has at most
            64 samples at once and 250 network evaluations; True records every run at its first use; False records
            none. Samples are the same.

    Raises:
        DdimError: If dtype or micro_batch is invalid, or the device cannot be used.
    """

    notes: tuple[str, ...] = ()
    """How a model of another library was converted."""

    def __init__(
        self,
        network: Network,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: DType = "auto",
        compile: bool = False,
        micro_batch: int | None = None,
        cuda_graphs: bool | None = None,
    ):
        self.config = config
        self.device: torch.device = usable(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "compile": compile,
            "micro_batch": micro_batch,
            "cuda_graphs": cuda_graphs,
        }
        self.compute = Precision(self.network, self.device, dtype, compile, micro_batch, cuda_graphs)

    def __getstate__(self) -> dict[str, Any]:
        return without_cached(self)

    def __repr__(self) -> str:
        about = f"{self.config.network}, predicts {self.config.predicts}, {self.config.schedule.name}"
        return f"{type(self).__name__}({about}, T={self.schedule.T}, shape={self.shape}, device={str(self.device)!r})"

    def to(self, device: torch.device | str) -> Model:
        """The model on a device: itself if it is there, else a copy.

        Raises:
            DdimError: If the device cannot be used.
        """
        place = usable(device)
        if place == self.device:
            return self
        other = type(self)(copy.deepcopy(self.network), self.config, device=place, **self._options)
        other.notes = self.notes
        return other

    # ---------------------------------------------------------------- facts

    @property
    def micro_batch(self) -> int:  # type: ignore[override]
        """The number of samples in a micro-batch."""
        return self.compute.micro_batch

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the network's activations."""
        return self.compute.dtype

    @cached_property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The noise schedule."""
        return self.config.schedule.build()

    @cached_property
    def kind(self) -> Modality:
        """The modality of the data."""
        return modality_of(self.config)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of one sample, (C, H, W) or (L,)."""
        return tuple(self.config.network.shape)

    @property
    def policy(self) -> ImagePolicy:
        """The preprocessing from image files to the network's input."""
        return cast(ImagePolicy, self.config.data)

    @property
    def alphabet(self) -> Alphabet:
        """The alphabet of x_t and the distribution that noise is drawn from, for a model of discrete data."""
        if self.config.categorical is None:
            raise DdimError("alphabet", "is defined for models of discrete data only", "use a model of text")
        return self.config.categorical.alphabet()

    @property
    def padded(self) -> bool:
        """Whether smaller micro-batches are padded, because the network's bits depend on the batch size."""
        return not self.compute.batch_invariant

    @property
    def conditions(self) -> dict[str, Any]:
        """Settings that the last bits of a result depend on, besides the model, the plan and the states."""
        return {
            "dtype": self.compute.name,
            "micro_batch": "any" if self.compute.batch_invariant else self.micro_batch,
            "threads": "any" if self.compute.batch_invariant else torch.get_num_threads(),
            "device": self.device.type,
            "compile": self.compute.compile,
            "torch": torch.__version__,
            **({"norms": "fused"} if self.compute.fused else {}),
        }

    @property
    def fingerprint(self) -> str:
        """The checksum of the weights file, or of the weights themselves for a model that was never saved."""
        return self.config.sha256 or checkpoint.digest(self.network.state_dict())

    # ---------------------------------------------------------------- the parts of a runner

    @property
    def planner(self) -> Planner | CategoricalPlanner:
        """Creates the plans of this model."""
        if self.config.categorical is not None:
            return CategoricalPlanner(self.schedule, self.alphabet)
        learned = bool(getattr(self.config.network, "learned_variance", False))
        return Planner(self.schedule, self.config.predicts, self.config.error_at, learned, clipping_of(self.config))

    @cached_property
    def _plain(self) -> AnyDenoiser:
        """The network without labels; cached, so that its time embeddings are computed once."""
        return NetworkDenoiser(self.compute.network, self.kind.hub, None, self.compute.body)

    def denoiser(self, labels: Tensor | None = None, guidance: Guidance | None = None) -> AnyDenoiser:
        """The network as a denoiser.

        Args:
            labels: int64, (N,), for batches of N; None for no labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale; None or 1 is the conditional
                model itself.

        Raises:
            DdimError: If labels are passed to a network without labels, or labels or guidance are out of range.
        """
        classes = self.config.network.classes
        if guidance is not None and not callable(guidance):
            guidance = arguments.finite(guidance, "guidance", arguments.GUIDANCE)
        network, body, plain = self.compute.network, self.compute.body, self._plain
        if self.config.needs_label and (labels is None or guidance not in (None, 1)):
            raise DdimError("labels", "this model was always trained with one", "pass labels, and no guidance")
        if labels is None:
            if guidance is not None and not classes:
                raise DdimError("guidance", "this model was trained without labels", "remove it")
            if guidance is not None:
                raise DdimError("guidance", "needs a label", "pass labels too")
            return plain
        if not classes:
            raise DdimError("labels", "this model was trained without labels", "remove them")
        if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise DdimError("labels", f"are outside 0..{classes - 1}", "use labels of the training data")
        labelled = NetworkDenoiser(network, self.kind.hub, labels.to(self.device), body)
        return labelled if guidance is None or guidance == 1 else Guided(labelled, plain, guidance)

    @cached_property
    def denoise(self) -> AnyDenoiser:
        """The unconditional denoiser: `model.denoise(x, level) -> Prediction`."""
        return self.denoiser()

    def denoiser_of(
        self, n: int, labels: Sequence[int] | None, guidance: Guidance | None
    ) -> tuple[Callable[[Tensor], AnyDenoiser], bool]:
        """The denoisers of a run of n samples, see `Runner.denoiser_of`."""
        if labels is None:
            constant = self.denoise if guidance is None else self.denoiser(None, guidance)
            return lambda positions: constant, False
        every = torch.as_tensor(list(labels), dtype=torch.int64)
        return lambda positions: self.denoiser(every[positions], guidance), True

    def noise(self, n: int | Sequence[int], seed: int = 0, start: int = 0) -> Noise:
        """The noise of samples start..start + n - 1, or of the sample indices listed in `n`."""
        indices = tuple(range(start, start + n)) if isinstance(n, int) else tuple(n)
        return self.kind.noise(seed, indices, self.device)

    def noise_of(self, indices: Sequence[int], seed: int, shape: Sequence[int]) -> Noise:
        """The noise of the samples with these indices."""
        return self.noise(tuple(indices), seed)

    def check_plan(self, plan: BasePlan[Any], to_clean: bool = False) -> None:
        """Check that a plan can be run with this model, see `Runner.check_plan`."""
        self.kind.check_plan(plan)
        plan.check_schedule(self.schedule, to_clean).check_model(lambda: self.fingerprint)

    def run_of(self, through: Through | None) -> Callable[..., Tensor]:
        """The function that runs a plan: replays of CUDA graphs where they are used, else `ddim.loop.run`."""
        graphs = self.compute.graphs if through is None else None
        return graphs.run if graphs else run

    def read(self, data: Tensor | np.ndarray) -> Tensor:
        """Convert images, float (N, C, H, W) in [-1, 1] or uint8 (N, H, W, C), to x_0.

        Raises:
            DdimError: If they have another type or shape.
        """
        bytes_ = getattr(data, "dtype", None) in (np.uint8, torch.uint8)
        if bytes_ and (data.ndim != 4 or getattr(data, "is_meta", False)):
            raise DdimError("images", f"are uint8 {tuple(data.shape)}", "give (N, H, W, C), or floats (N, C, H, W)")
        return arguments.floats(to_float(data) if bytes_ else data, "images", self.shape)

    # ---------------------------------------------------------------- discrete data, files

    def text(self, ids: Tensor) -> list[str]:
        """Decode sequences of ids, int64, (N, L), to strings.

        Raises:
            DdimError: If this is not a model of text.
        """
        if len(self.shape) != 1:
            raise DdimError("model", "is one of images, not of text", "see ddim.pixels.dequantize")
        return list(self.kind.render(ids))

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model folder, `model.safetensors` + `config.json`.

        Args:
            folder: The folder to write; an older model in it is replaced.
            dtype: The dtype to store the weights in; unchanged if None.
        """
        checkpoint.write(Path(folder), self.config, self._weights(dtype))
