"""A network set up to compute: where, in what precision, on how many samples at once, and as what denoiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddim import blocks, checkpoint, inversion
from ddim.config import ModelConfig
from ddim.denoiser import Denoiser, Guidance, Guided
from ddim.errors import DdimError
from ddim.network import NetworkDenoiser
from ddim.nn.unet import UNet
from ddim.plan import Plan
from ddim.schedule import Schedule
from ddim.seeds import Noise
from ddim.training import fast_dtype

DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Some pictures' latents.

    Args:
        latents: (N, C, H, W), float32; float64 where the plan has a lattice.
        earlier: Where a latent is two states, the one step before; of the same kind.
        calls: How many network calls it took.
    """

    latents: Tensor
    earlier: Tensor | None
    calls: int


class Engine:
    """A trained network that computes; `ddim.Model` is one.

    Args:
        network: The network in float32; it is put into evaluation mode, and its weights need no gradient any more.
        config: What it is.
        device: Where it computes.
        dtype: What the network computes in: "auto" is bfloat16 where the device is fast at it.
        compile: Whether the network goes through torch.compile.
        micro_batch: How many samples the network sees at once when sampling. It is fixed, smaller parts being
            padded, so that a sample's bits do not depend on its neighbours. By default 8 on a CPU, 64 on a GPU.

    Raises:
        DdimError: If dtype or micro_batch is not one.
    """

    def __init__(
        self,
        network: UNet,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        dtype: DType = "auto",
        compile: bool = False,
        micro_batch: int | None = None,
    ):
        self.network = network.to(device).eval().requires_grad_(False)
        self.config, self.device, self.compile = config, torch.device(device), compile
        if dtype not in ("auto", "float32", "bfloat16"):
            raise DdimError(f"dtype {dtype!r}", "is unknown", "choose auto, float32 or bfloat16")
        self.dtype = fast_dtype(self.device) if dtype == "auto" else getattr(torch, dtype)
        default = 8 if self.device.type == "cpu" else 64
        self.micro_batch = default if micro_batch is None else micro_batch
        if self.micro_batch < 1:
            raise DdimError(f"micro-batch {micro_batch}", "is not a whole number >= 1", "give 1 or more")

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.config.schedule.build()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one sample, (C, H, W)."""
        return (self.config.network.in_channels, self.config.network.height, self.config.network.width)

    @cached_property
    def _fast(self) -> UNet:
        return copy.deepcopy(self.network).cast_body(self.dtype)

    @cached_property
    def _body(self) -> Callable[..., Tensor]:
        return torch.compile(self._fast.body) if self.compile else self._fast.body

    def denoiser(self, labels: Tensor | None = None, guidance: Guidance | None = None) -> Denoiser:
        """The network as a denoiser.

        Args:
            labels: int64, (N,), for batches of N; None for no labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale; None or 1 is the conditional
                model itself.

        Raises:
            DdimError: If labels are given to a network without them, or are out of range.
        """
        classes = self.config.network.classes
        plain = NetworkDenoiser(self._fast, self.config.predicts, None, self._body)
        if self.config.needs_label and (labels is None or guidance not in (None, 1)):
            raise DdimError("labels", "this model was never trained without one", "give a label, and no guidance")
        if labels is None:
            if guidance is not None and not classes:
                raise DdimError("guidance", "this model was trained without labels", "leave it out")
            if guidance is not None:
                raise DdimError("guidance", "needs a label", "give labels too")
            return plain
        if not classes:
            raise DdimError("labels", "this model was trained without labels", "leave them out")
        if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise DdimError("labels", f"are outside 0..{classes - 1}", "choose labels of the training data")
        labelled = NetworkDenoiser(self._fast, self.config.predicts, labels.to(self.device), self._body)
        return labelled if guidance is None or guidance == 1 else Guided(labelled, plain, guidance)

    @cached_property
    def denoise(self) -> Denoiser:
        """The unconditional denoiser: `model.denoise(x, level) -> Prediction`."""
        return self.denoiser()

    def noise(self, n: int | Sequence[int], seed: int = 0, start: int = 0) -> Noise:
        """The randomness of samples start..start + n - 1, or of the samples listed."""
        indices = tuple(range(start, start + n)) if isinstance(n, int) else tuple(n)
        return Noise(seed, indices, self.shape, self.device)

    def sample_blocks(
        self,
        plan: Plan,
        indices: Sequence[int],
        seed: int = 0,
        labels: Sequence[int] | None = None,
        guidance: Guidance | None = None,
        origin: Tensor | None = None,
        through: Callable[[Denoiser], Denoiser] | None = None,
    ) -> Iterator[Tensor]:
        """Sample the listed indices in micro-batches of one fixed size.

        Args:
            plan: What to run.
            indices: The samples' indices.
            seed: The run's seed.
            labels: One for each, for a model with labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale.
            origin: Pictures in [-1, 1] to start from, partly noised, (1, C, H, W) or one each; not pure noise.
            through: What the denoiser is wrapped in, such as a hook on x_0.

        Yields:
            float32, (up to micro_batch, C, H, W), in the order of `indices`.

        Raises:
            DdimError: If the plan is not one for this model, or does not end at clean data.
        """
        plan.check_schedule(self.schedule, to_clean=True).check_model(lambda: self.fingerprint)
        if origin is not None and (origin.shape[1:] != self.shape or len(origin) not in (1, len(indices))):
            wrong = f"is {tuple(origin.shape)}, the model's pictures are {self.shape}"
            raise DdimError("origin", wrong, "give one picture, or one for each sample")
        if origin is not None and not origin.is_floating_point():
            raise DdimError("origin", f"is {origin.dtype}", "give floats in [-1, 1], see ddim.pixels.to_float")

        def denoiser(some: Tensor | None) -> Denoiser:
            made = self.denoiser(some, guidance)
            return through(made) if through else made

        def noise(some: Sequence[int]) -> Noise:
            return self.noise(some, seed)

        yield from blocks.sample_blocks(denoiser, plan, noise, indices, self.micro_batch, labels, origin)

    def run_blocks(
        self,
        plan: Plan,
        states: Tensor,
        earlier: Sequence[Tensor] = (),
        through: Callable[[Denoiser], Denoiser] | None = None,
    ) -> Iterator[Tensor]:
        """Run a noiseless plan from given states (N, C, H, W) in micro-batches of one fixed size.

        Args:
            plan: What to run.
            states: The first states.
            earlier: States older than the first, one for each level of `plan.before`.
            through: What the denoiser is wrapped in.

        Yields:
            float32 (float64 where the plan has a lattice), (up to micro_batch, C, H, W).

        Raises:
            DdimError: If the plan is not one for this model, or the states are not of its shape.
        """
        first, *older = self._fit(plan, [states, *earlier])
        denoise = through(self.denoise) if through else self.denoise
        yield from blocks.run_blocks(denoise, plan, first, self.micro_batch, older)

    def encode_blocks(self, way: inversion.Way, pictures: Tensor) -> Iterator[Encoded]:
        """Turn pictures into latents, in micro-batches of one fixed size.

        Args:
            way: The method and its plans, see `Model.way`.
            pictures: float, (N, C, H, W), in [-1, 1].

        Yields:
            The latents of up to micro_batch pictures.

        Raises:
            DdimError: If the plans are not for this model, the pictures not of its shape, or one cannot be encoded.
        """
        if way.up is None and self.dtype != torch.float32:
            name = str(self.dtype).removeprefix("torch.")
            raise DdimError(way.method, f"cannot be solved in {name}, which is not smooth", "compute in float32")
        [states] = self._fit(way.up or way.down, [pictures])
        numbered = (states, torch.arange(len(states)))
        encode = partial(inversion.encode, self.denoise, way)
        for latents, earlier, calls in blocks.in_blocks(encode, numbered, self.micro_batch):
            yield Encoded(latents, earlier if way.pair else None, int(calls[0]) if len(calls) else 0)

    def _fit(self, plan: Plan, states: Sequence[Tensor]) -> list[Tensor]:
        """States on the device, in the plan's dtype, if they and the plan are this model's."""
        plan.check_schedule(self.schedule).check_model(lambda: self.fingerprint)
        for given in states:
            if given.shape[1:] != self.shape or len(given) != len(states[0]):
                wrong = f"are {tuple(given.shape)}, the model's are {(len(states[0]), *self.shape)}"
                raise DdimError("states", wrong, "use this model's")
        dtype = torch.float64 if plan.lattice else torch.float32
        return [given.to(self.device, dtype) for given in states]

    def empty(self) -> Tensor:
        """No samples: float32, (0, C, H, W)."""
        return torch.empty((0, *self.shape), device=self.device)

    @property
    def conditions(self) -> dict[str, Any]:
        """What the last bits of a result depend on beside the model, the plan and the states."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "micro_batch": self.micro_batch,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "compile": self.compile,
            "torch": torch.__version__,
        }

    @property
    def fingerprint(self) -> str:
        """The checksum of the weights file, or of the weights themselves for a model that was never saved."""
        return self.config.sha256 or checkpoint.digest(self.network.state_dict())
