"""The object a user holds: a network, its schedule, and what both are good for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddim import checkpoint, samplers
from ddim.config import ModelConfig
from ddim.denoiser import Denoiser, Guided
from ddim.errors import DdimError
from ddim.grid import DEFAULT
from ddim.loop import run
from ddim.network import NetworkDenoiser
from ddim.nn.unet import UNet
from ddim.pixels import to_float
from ddim.plan import Plan
from ddim.schedule import Level, Schedule
from ddim.seeds import Noise
from ddim.training import fast_dtype

DType = Literal["auto", "float32", "bfloat16"]
STEPS = 20


class Model:
    """A trained model.

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

    def denoiser(self, labels: Tensor | None = None, guidance: float | None = None) -> Denoiser:
        """The network as a denoiser.

        Args:
            labels: int64, (N,), for batches of N; None for no labels.
            guidance: Scale of classifier-free guidance; None or 1 is the conditional model itself.

        Raises:
            DdimError: If labels are given to a network without them, or are out of range.
        """
        classes = self.config.network.classes
        plain = NetworkDenoiser(self._fast, self.config.predicts, None, self._body)
        if self.config.needs_label and (labels is None or guidance not in (None, 1)):
            raise DdimError("labels", "this model was never trained without one", "give a label, and no guidance")
        if labels is None:
            if guidance is not None:
                raise DdimError("guidance", "needs a label", "give labels too")
            return plain
        if not classes:
            raise DdimError("labels", "this model was trained without labels", "leave them out")
        if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise DdimError("labels", f"are outside 0..{classes - 1}", "choose labels of the training data")
        labelled = NetworkDenoiser(self._fast, self.config.predicts, labels.to(self.device), self._body)
        return labelled if guidance in (None, 1) else Guided(labelled, plain, float(guidance or 0))

    @cached_property
    def denoise(self) -> Denoiser:
        """The unconditional denoiser: `model.denoise(x, level) -> Prediction`."""
        return self.denoiser()

    def levels(
        self, grid: str | Sequence[float] = DEFAULT, steps: int | None = None, encode: bool = False
    ) -> tuple[Level, ...]:
        """The levels a sampler walks, see `ddim.samplers.walk`: the grid's from the noisiest down, then clean data.

        Args:
            grid: A grid's name (see `ddim.grid`) or a rising list of times.
            steps: S, the number of network calls; with a named grid 20 if left out.
            encode: Rising instead, from clean data to the noisiest.

        Raises:
            DdimError: See `ddim.grid.tau`.
        """
        some = STEPS if isinstance(grid, str) and steps is None else steps
        return samplers.walk(self.schedule, self.config.predicts, grid, some, encode)

    def plan(
        self,
        steps: int | None = None,
        grid: str | Sequence[float] = DEFAULT,
        eta: float = 0.0,
        sigma: Sequence[float] | str | None = None,
        clip_x0: bool | None = None,
        encode: bool = False,
        default: int = STEPS,
    ) -> Plan:
        """A DDIM plan for this model.

        Args:
            steps: S, the number of network calls.
            grid: A grid's name (see `ddim.grid`) or a rising list of times.
            eta: See `ddim.samplers.ddim`, as for the rest.
            sigma: Instead of eta, or "optimal" for the variance that fits this model's own error.
            clip_x0: Whether x_0 is clipped to [-1, 1].
            encode: A plan that encodes.
            default: The steps of a named grid where none are given.

        Raises:
            DdimError: See `ddim.grid.tau`, `ddim.samplers.ddim` and `ddim.config.ModelConfig.error_at`.
        """
        levels = self.levels(grid, default if steps is None and isinstance(grid, str) else steps, encode)
        label = grid if isinstance(grid, str) else "own grid"
        clean_as = self.schedule.level(1) if encode else None
        about = f"{label}, S={len(levels) - 1}"
        return samplers.ddim(levels, eta, sigma, clip_x0, clean_as, about, self.config.error_at)

    def noise(self, n: int | Sequence[int], seed: int = 0, start: int = 0) -> Noise:
        """The randomness of samples start..start + n - 1, or of the samples listed."""
        indices = tuple(range(start, start + n)) if isinstance(n, int) else tuple(n)
        return Noise(seed, indices, self.shape, self.device)

    def sample(
        self,
        n: int,
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
        labels: int | Sequence[int] | None = None,
        guidance: float | None = None,
        plan: Plan | None = None,
        **settings: Any,
    ) -> Tensor:
        """Sample pictures. Picture i is a function of (model, plan, seed, start + i), whatever n is.

        Args:
            n: How many.
            steps: S, the number of network calls; 20 if left out.
            seed: The run's seed.
            start: The first sample's index.
            labels: One label for all or one each, for a model with labels.
            guidance: Scale of classifier-free guidance.
            plan: A plan of one's own, instead of steps and settings.
            settings: As for `Model.plan`: grid, eta, sigma, clip_x0.

        Returns:
            float32, (n, C, H, W), nominally in [-1, 1].

        Raises:
            DdimError: If an argument is out of range, or the plan is not one for this model.
        """
        if n < 0:
            raise DdimError(f"n {n}", "is less than 0", "give 0 or more")
        if plan is not None and (settings or steps is not None):
            raise DdimError("plan", "is given beside steps or settings", "give one or the other")
        plan = plan or self.plan(steps, **settings)
        each = [labels] * n if isinstance(labels, int) else labels
        if each is not None and len(each) != n:
            raise DdimError("labels", f"are {len(each)} for {n} samples", "give one, or one each")
        return torch.cat([self.empty(), *self.sample_blocks(plan, range(start, start + n), seed, each, guidance)])

    def sample_blocks(
        self,
        plan: Plan,
        indices: Sequence[int],
        seed: int = 0,
        labels: Sequence[int] | None = None,
        guidance: float | None = None,
    ) -> Iterator[Tensor]:
        """Sample the listed indices in micro-batches of one fixed size.

        Yields:
            float32, (up to micro_batch, C, H, W), in the order of `indices`.

        Raises:
            DdimError: If the plan is not one for this model, or does not end at clean data.
        """
        plan.check_schedule(self.schedule, to_clean=True)
        size, plain = self.micro_batch, None if labels is not None else self.denoiser(None, guidance)
        for first in range(0, len(indices), size):
            wanted = list(indices[first : first + size])
            padded = wanted + [wanted[-1]] * (size - len(wanted))
            some = list(labels[first : first + size]) if labels is not None else []
            some += some[-1:] * (size - len(some))
            denoise = plain or self.denoiser(torch.tensor(some), guidance)
            yield run(denoise, plan, self.noise(padded, seed))[: len(wanted)]

    def run_blocks(self, plan: Plan, states: Tensor) -> Iterator[Tensor]:
        """Run a noiseless plan from given states (N, C, H, W) in micro-batches of one fixed size.

        Yields:
            float32, (up to micro_batch, C, H, W).

        Raises:
            DdimError: If the plan is not one for this model, or the states are not of its shape.
        """
        plan.check_schedule(self.schedule)
        if states.shape[1:] != self.shape:
            raise DdimError(
                "states", f"are {tuple(states.shape[1:])}, the model's are {self.shape}", "use this model's"
            )
        for part in torch.split(states.to(self.device, torch.float32), self.micro_batch):
            missing = self.micro_batch - len(part) if len(states) else 0
            padded = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            yield run(self.denoise, plan, padded)[: len(part)]

    def empty(self) -> Tensor:
        """No samples: float32, (0, C, H, W)."""
        return torch.empty((0, *self.shape), device=self.device)

    def encode(
        self, images: Tensor | np.ndarray, steps: int | None = None, grid: str | Sequence[float] = DEFAULT
    ) -> Tensor:
        """Pictures to latents x_T: eq. (13) run backwards, first order, so decoding returns them approximately.

        Args:
            images: float (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C).
            steps: S, the number of network calls; with a named grid 50 if left out.
            grid: The grid's name or a rising list of times.

        Returns:
            float32, (N, C, H, W).
        """
        pictures = to_float(images) if images.dtype in (np.uint8, torch.uint8) else torch.as_tensor(images)
        plan = self.plan(steps, grid, encode=True, default=50)
        return torch.cat([self.empty(), *self.run_blocks(plan, pictures)])

    def decode(self, latents: Tensor, steps: int | None = None, grid: str | Sequence[float] = DEFAULT) -> Tensor:
        """Latents x_T to pictures, without noise.

        Args:
            latents: float, (N, C, H, W).
            steps: S, the number of network calls; with a named grid 50 if left out.
            grid: The grid's name or a rising list of times.

        Returns:
            float32, (N, C, H, W), nominally in [-1, 1].
        """
        return torch.cat([self.empty(), *self.run_blocks(self.plan(steps, grid, default=50), latents)])

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model folder, `model.safetensors` + `config.json`.

        Args:
            folder: Where; an older model there is replaced.
            dtype: The dtype to store weights in; their own if None.
        """
        weights = {key: value.to(dtype) if dtype else value for key, value in self.network.state_dict().items()}
        checkpoint.write(Path(folder), self.config, weights)

    @property
    def fingerprint(self) -> str:
        """The checksum of the weights file, or of the weights themselves for a model that was never saved."""
        return self.config.sha256 or checkpoint.digest(self.network.state_dict())


def load(name: str | Path, device: torch.device | str | None = None, **settings: Any) -> Model:
    """A model: bundled, a model folder, or a training run's folder. Nothing in it is ever executed.

    Args:
        name: A bundled model's name or a path.
        device: Where it computes; a GPU if there is one, else the CPU.
        settings: dtype, compile, micro_batch: see `Model`.

    Raises:
        DdimError: If there is no such model, or it is damaged.
    """
    config, weights = checkpoint.read(name)
    with torch.device("meta"):  # no draws from the global generator, no time spent on weights to be replaced
        network = UNet(config.network)
    network.to_empty(device="cpu")
    checkpoint.fill(network, weights, name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(network, config, device, **settings)
