"""The object a user holds: a network, its schedule, and what both are good for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim import checkpoint, samplers
from ddim.engine import DType as DType
from ddim.engine import Engine
from ddim.errors import DdimError
from ddim.grid import DEFAULT
from ddim.nn.unet import UNet
from ddim.pixels import to_float
from ddim.plan import Plan
from ddim.schedule import Level

STEPS = 20


class Model(Engine):
    """A trained model: an `Engine`, with plans made for it, and what is done with them."""

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
