"""`ModelBase`: a network with its device, precision, micro-batch size, schedule and denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim._io import arguments
from ddim.errors import DdimError
from ddim.model import checkpoint
from ddim.model.config import ModelConfig
from ddim.model.denoisers import NetworkDenoiser
from ddim.model.devices import usable
from ddim.model.hub import HubMixin
from ddim.model.modality import Modality, modality_of
from ddim.model.precision import Precision, without_cached
from ddim.names import DType
from ddim.nn.base import Network
from ddim.plan.base import BasePlan
from ddim.plan.plan import Plan
from ddim.process import timesteps
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise
from ddim.process.schedule import Level, Schedule
from ddim.process.start import default_steps
from ddim.process.timesteps import DEFAULT
from ddim.sampling import inversion, microbatch
from ddim.sampling.guidance import Guidance, Guided
from ddim.sampling.loop import run

STEPS = 20


class ModelBase(HubMixin):
    """A trained network of any modality, ready to compute; the base of `ddim.Model` and `ddim.TokenModel`.

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
        device: torch.device | str = "cpu",
        dtype: DType = "auto",
        compile: bool = False,
        micro_batch: int | None = None,
        cuda_graphs: bool | None = None,
    ):
        self.config, self.device = config, usable(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.compute = Precision(self.network, self.device, dtype, compile, micro_batch, cuda_graphs)

    def __getstate__(self) -> dict[str, Any]:
        return without_cached(self)

    def __repr__(self) -> str:
        about = f"{self.config.network}, predicts {self.config.predicts}, {self.config.schedule.name}"
        return f"{type(self).__name__}({about}, T={self.schedule.T}, shape={self.shape}, device={str(self.device)!r})"

    @property
    def micro_batch(self) -> int:
        """The number of samples in a micro-batch."""
        return self.compute.micro_batch

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's activations."""
        return self.compute.dtype

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.config.schedule.build()

    @cached_property
    def kind(self) -> Modality:
        """The modality of the data."""
        return modality_of(self.config)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) or (L,)."""
        return self.config.network.shape

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

    def noise(self, n: int | Sequence[int], seed: int = 0, start: int = 0) -> Noise:
        """The noise of samples start..start + n - 1, or of the sample indices listed in `n`."""
        indices = tuple(range(start, start + n)) if isinstance(n, int) else tuple(n)
        return self.kind.noise(seed, indices, self.device)

    def levels(
        self,
        grid: str | Sequence[float] = DEFAULT,
        steps: int | None = None,
        encode: bool = False,
        top: int | None = None,
    ) -> tuple[Level, ...]:
        """The noise levels a sampler visits, from the noisiest to clean data, see `ddim.timesteps.sampling_levels`.

        Args:
            grid: The name of a timestep spacing (see `ddim.timesteps`) or an increasing list of timesteps.
            steps: S, the number of network evaluations. With a named spacing the default is 20, or all timesteps if
                there are fewer.
            encode: Whether the levels increase instead, from clean data to the noisiest.
            top: The noisiest timestep of a named spacing, for a run that starts from a partly noised image.

        Raises:
            DdimError: See `ddim.timesteps.tau`.
        """
        named = isinstance(grid, str) and steps is None
        count = default_steps(STEPS, self.schedule, self.config.predicts) if named else steps
        return timesteps.sampling_levels(self.schedule, self.config.predicts, grid, count, encode, top)

    def check_plan(self, plan: BasePlan[Any], to_clean: bool = False) -> None:
        """Check that a plan can be run with this model.

        Args:
            plan: The plan.
            to_clean: Whether the plan must end at clean data, as sampling requires.

        Raises:
            DdimError: If the plan does not fit; the message names the reason.
        """
        self.kind.check_plan(plan)
        plan.check_schedule(self.schedule, to_clean).check_model(lambda: self.fingerprint)

    @staticmethod
    def check_request(n: int, labels: int | Sequence[int] | None, plan: Any, others: Any) -> Sequence[int] | None:
        """Check the number of samples, labels and plan of a request; return one label per sample, or None."""
        microbatch.check_request(n, plan, others)
        return microbatch.one_each(labels, n)

    def sample_blocks(
        self,
        plan: BasePlan[Any],
        indices: Sequence[int],
        seed: int = 0,
        labels: Sequence[int] | None = None,
        guidance: Guidance | None = None,
        origin: Tensor | None = None,
        through: Callable[[AnyDenoiser], AnyDenoiser] | None = None,
    ) -> Iterator[Tensor]:
        """Sample the listed indices in micro-batches of one fixed size.

        Args:
            plan: The plan to run.
            indices: The samples' indices.
            seed: The run's seed.
            labels: One label per sample, for a model with labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale.
            origin: Images in [-1, 1] to start from instead of pure noise, (1, C, H, W) or one per sample. They are
                partly noised first.
            through: A function that wraps the denoiser, for example in a hook on x_0.

        Yields:
            float32, (up to micro_batch, C, H, W), or ids, (up to micro_batch, ...), in the order of `indices`.

        Raises:
            DdimError: If the plan does not fit this model, or does not end at clean data.
        """
        self.check_plan(plan, to_clean=True)
        if origin is not None:
            origin = arguments.floats(origin, "origin", self.shape)
            if len(origin) not in (1, len(indices)):
                problem = f"are {len(origin)} images for {len(indices)} samples"
                raise DdimError("origin", problem, "pass one image, or one for each sample")

        def denoiser(labels: Tensor | None) -> AnyDenoiser:
            denoise = self.denoiser(labels, guidance)
            return through(denoise) if through else denoise

        def noise(indices: Sequence[int]) -> Noise:
            return self.noise(indices, seed)

        graphs = self.compute.graphs if through is None else None
        how = (self.micro_batch, labels, origin, not self.compute.batch_invariant, graphs.run if graphs else run)
        yield from microbatch.sample_blocks(denoiser, plan, noise, indices, *how)

    def run_blocks(
        self,
        plan: Plan,
        states: Tensor,
        earlier: Sequence[Tensor] = (),
        through: Callable[[AnyDenoiser], AnyDenoiser] | None = None,
    ) -> Iterator[Tensor]:
        """Run a deterministic plan from initial states (N, C, H, W) in micro-batches of one fixed size.

        Args:
            plan: The plan to run.
            states: The initial states.
            earlier: States before the initial one, one for each level of `plan.before`.
            through: A function that wraps the denoiser.

        Yields:
            float32 (float64 where the plan has a lattice), (up to micro_batch, C, H, W).

        Raises:
            DdimError: If the plan does not fit this model, or the states do not have its shape.
        """
        first, *older = self._fit(plan, [states, *earlier])
        denoise = through(self.denoise) if through else self.denoise
        yield from microbatch.run_blocks(
            denoise, plan, first, self.micro_batch, older, not self.compute.batch_invariant
        )

    def encode_blocks(self, inverter: inversion.Inversion, images: Tensor) -> Iterator[inversion.Encoded]:
        """Encode images to latents in micro-batches of one fixed size.

        Args:
            inverter: The inversion method and its plans, see `Model.inversion`.
            images: float, (N, C, H, W), in [-1, 1].

        Yields:
            The latents of up to micro_batch images.

        Raises:
            DdimError: If the plans do not fit this model, the images do not have its shape, or one cannot be encoded.
        """
        if inverter.encode_plan is None and self.dtype != torch.float32:
            name = str(self.dtype).removeprefix("torch.")
            raise DdimError(inverter.method, f"cannot be solved in {name}, which is not smooth", "compute in float32")
        [states] = self._fit(inverter.encode_plan or inverter.decode_plan, [images])
        numbered = (states, torch.arange(len(states)))
        encode = partial(inversion.encode, self.denoise, inverter)
        for latents, earlier, nfe in microbatch.in_blocks(encode, numbered, self.micro_batch):
            yield inversion.Encoded(latents, earlier if inverter.two_state else None, int(nfe[0]) if len(nfe) else 0)

    def _fit(self, plan: Plan, states: Sequence[Tensor]) -> list[Tensor]:
        """Check the plan and the shapes of the states; return the states on the device, in the plan's dtype."""
        self.check_plan(plan)
        states = [arguments.floats(state, "states", self.shape) for state in states]
        for state in states:
            if len(state) != len(states[0]):
                raise DdimError("states", f"have {len(state)} and {len(states[0])} samples", "pass equally many")
        dtype = torch.float64 if plan.lattice else torch.float32
        return [state.to(self.device, dtype) for state in states]

    def empty(self) -> Tensor:
        """An empty batch of samples: float32, (0, C, H, W)."""
        return torch.empty((0, *self.shape), device=self.device)

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

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model folder, `model.safetensors` + `config.json`.

        Args:
            folder: The folder to write; an older model in it is replaced.
            dtype: The dtype to store the weights in; unchanged if None.
        """
        checkpoint.write(Path(folder), self.config, self._weights(dtype))
