"""The object a user holds: a network, its schedule, and what both are good for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ddim import hub, interop, inversion, tuning
from ddim.config import ModelConfig
from ddim.data.policy import ImagePolicy
from ddim.denoiser import Guidance, Hook, Hooked
from ddim.engine import STEPS, Engine
from ddim.engine import DType as DType
from ddim.errors import DdimError, say
from ddim.interop.clipping import clipping_of
from ddim.nn.network import Network
from ddim.pixels import to_float
from ddim.plan import Plan
from ddim.planning import Planner
from ddim.token_model import TokenModel

PILOTS = 2**63  # of seeds of tuning


class Model(Engine):
    """A trained model of real-valued pictures: an `Engine`, with plans made for it, and what is done with them."""

    SETTINGS = frozenset({"eta", "sigma", "clip_x0", "encode"})

    @property
    def policy(self) -> ImagePolicy:
        """How pictures become the network's grid."""
        return cast(ImagePolicy, self.config.data)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one sample, (C, H, W)."""
        return cast(tuple[int, int, int], self.config.network.shape)

    @property
    def _planner(self) -> Planner:
        learned = bool(getattr(self.config.network, "learned_variance", False))
        return Planner(self.schedule, self.config.predicts, self.config.error_at, learned, clipping_of(self.config))

    def plan(
        self,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        eta: float = 0.0,
        sigma: Sequence[float] | str | None = None,
        clip_x0: bool | None = None,
        encode: bool = False,
        default: int = STEPS,
        top: int | None = None,
        sampler: str = "ddim",
    ) -> Plan:
        """A plan for this model.

        Args:
            steps: S, the number of network calls; of steps, for "heun" and "rk4" (2 and 4 calls each).
            grid: A grid's name (see `ddim.grid`) or a rising list of times; equal-angle if left out.
            eta: See `ddim.samplers.ddim`, as for the rest.
            sigma: Instead of eta, "learned" for the network's own, where it has one, or "optimal" for the variance
                that fits this model's own error.
            clip_x0: Whether x_0 is clipped to [-1, 1]; if left out, as `ddim.interop.clipping` says of the model, which
                is warned about, or with sigma "hat". A plan that encodes does not clip by itself.
            encode: A plan that encodes.
            default: The steps of a named grid where none are given, bounded by the times there are.
            top: The noisiest time of a named grid, where a run starts from an image partly noised; if left out,
                `ddim.start.start_time`.
            sampler: One of `ddim.samplers.NAMED`; all but "ddim" are without noise. "auto" is what
                `ddim.samplers.recommended` names for so many steps, where nothing but the steps is given; else "ddim".
                It is what `sample` and the commands `sample` and `plan` take unless told otherwise.

        Raises:
            DdimError: See `ddim.grid.tau`, `ddim.samplers.ddim` and `ddim.config.ModelConfig.error_at`.
        """
        return self._planner.plan(steps, grid, eta, sigma, clip_x0, encode, default, top, sampler)

    def sample(
        self,
        n: int,
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
        labels: int | Sequence[int] | None = None,
        guidance: Guidance | None = None,
        plan: Plan | None = None,
        origin: Tensor | None = None,
        hook: Hook | None = None,
        **settings: Any,
    ) -> Tensor:
        """Sample pictures. Picture i is a function of (model, plan, seed, start + i), whatever n is.

        Args:
            n: How many.
            steps: S, the number of network calls; 20, or as many times as there are, if left out.
            seed: The run's seed.
            start: The first sample's index.
            labels: One label for all or one each, for a model with labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale, see `ddim.guidance`.
            plan: A plan of one's own, instead of steps and settings.
            origin: Pictures to start from, partly noised, (1, C, H, W) or one each, in [-1, 1]; goes with `top`.
            hook: What is done to each predicted x_0, see `ddim.hooks`.
            settings: As for `Model.plan`: sampler (if left out "auto", but "ddim" with origin or hook), grid, eta,
                sigma, clip_x0, top.

        Returns:
            float32, (n, C, H, W), nominally in [-1, 1].

        Raises:
            DdimError: If an argument is out of range, or the plan is not one for this model.
        """
        each = self.check_request(n, labels, plan, settings or steps is not None)
        grid = settings.get("grid")
        by_name = plan is None and (grid is None or isinstance(grid, str))  # a list of times starts where it ends
        if by_name and (origin is None) != (settings.get("top") is None):
            raise DdimError(
                "origin and top", "are not both given", "a picture to start from goes with a time to start at"
            )
        own = "ddim" if hook or origin is not None else "auto"
        plan = plan or self.plan(steps, **{"sampler": own, **settings})
        through = partial(Hooked, hook=hook) if hook else None
        blocks = self.sample_blocks(plan, range(start, start + n), seed, each, guidance, origin, through)
        return torch.cat([self.empty(), *(block.float() for block in blocks)])

    def tuning(self, calls: int, solver: str = "fitted", pilots: int = 128, seed: int = 0) -> Iterator[tuning.Progress]:
        """Find a plan for this model and a number of network calls, see `ddim.tuning`.

        Args:
            calls: Network calls, 2..30.
            solver: "fitted", or a sampler of which the times alone are searched.
            pilots: Samples to tune on, half of them held out; they come from another stream than `sample`'s.
            seed: Their seed.

        Yields:
            Where it stands; the last one's `found.plan` is the plan, made for this model alone where tuning won.

        Raises:
            DdimError: If an argument is out of range.
        """
        start = self.noise(pilots, PILOTS + seed).start()
        for step in tuning.tuning(
            self.denoise, self.schedule, calls, start, solver, self.micro_batch, self.config.predicts
        ):
            if step.found is not None and step.found.won:
                plan = replace(step.found.plan, made_for=self.fingerprint)
                step = replace(step, found=replace(step.found, plan=plan))
            yield step

    def way(
        self, method: str = "ddim", steps: int | None = None, grid: str | Sequence[float] | None = None
    ) -> inversion.Way:
        """The plans of a way to latents and back, see `ddim.inversion` and docs/inversion.md.

        Args:
            method: "ddim", "ddim-target", "fixed-point", "reversible" or "lossless".
            steps: S, the number of network calls down; with a named grid 50 if left out.
            grid: A grid's name or a rising list of times; equal-angle if left out, for "fixed-point" times closer near
                t = 1, see `ddim.inversion.graded`.

        Raises:
            DdimError: If the method is unknown, or as `Model.levels`.
        """
        return self._planner.way(method, steps, grid)

    def encode(
        self,
        images: Tensor | np.ndarray,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        method: str = "ddim",
    ) -> Tensor:
        """Pictures to latents x_T; docs/inversion.md compares the methods.

        Args:
            images: float (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C).
            steps: S, the number of network calls down; with a named grid 50 if left out.
            grid: The grid's name or a rising list of times; the method's own if left out.
            method: "ddim" is eq. (13) run backwards, first order, so decoding returns the pictures approximately;
                "ddim-target" is the same, the network told the level ahead. Exact are "fixed-point", several calls
                a step, "reversible" and, to the last bit, "lossless", one call a step.

        Returns:
            float32, (N, C, H, W). For "reversible" and "lossless" a latent is two states: (2, N, C, H, W), x_T and the
            state one step before it, float64 for "lossless".

        Raises:
            DdimError: If an argument is out of range, or a picture cannot be encoded.
        """
        pictures = to_float(images) if images.dtype in (np.uint8, torch.uint8) else torch.as_tensor(images)
        way = self.way(method, steps, grid)
        made = [*self.encode_blocks(way, pictures)]
        latents = torch.cat([self.empty(), *(part.latents for part in made)])
        if not way.pair:
            return latents
        return torch.stack([latents, torch.cat([self.empty(), *(p.earlier for p in made if p.earlier is not None)])])

    def decode(
        self,
        latents: Tensor,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        method: str = "ddim",
    ) -> Tensor:
        """Latents to pictures, without noise.

        Args:
            latents: What `encode` returned, or x_T alone, (N, C, H, W).
            steps: S, the number of network calls, as encoded; with a named grid 50 if left out.
            grid: The grid's name or a rising list of times, as encoded.
            method: The method that encoded.

        Returns:
            float32, (N, C, H, W), nominally in [-1, 1].

        Raises:
            DdimError: If an argument is out of range, or latents of two states are given to a method of one.

        Warns:
            DdimWarning: If a method of two states is given x_T alone: then pictures come back approximately.
        """
        way = self.way(method, steps, grid)
        if latents.ndim == 5 and not (way.pair and len(latents) == 2):
            wrong = f"are {len(latents)} states each, {method} takes {2 if way.pair else 1}"
            raise DdimError("latents", wrong, "name the method that encoded")
        if latents.ndim == 5:
            blocks = self.run_blocks(way.onward, latents[1], [latents[0]])
        else:
            if way.pair:
                say(f"{method}: x_T is given without the state before it; pictures come back approximately")
            blocks = self.run_blocks(way.down, latents)
        return torch.cat([self.empty(), *(block.float() for block in blocks)])


def load(
    name: str | Path,
    device: torch.device | str | None = None,
    hints: interop.Hints | None = None,
    **settings: Any,
) -> Model | TokenModel:
    """A model: bundled, a model folder, a run's folder, or one of another code. Nothing in it is ever executed.

    Args:
        name: A bundled model's name, a path (also of a diffusers folder, or of a file of weights, see `ddim.interop`),
            or the name of a model on the hub, "org/name".
        device: Where it computes; a GPU if there is one, else the CPU.
        hints: What a file of weights does not say of itself, such as its pictures' size.
        settings: dtype, compile, micro_batch, cuda_graphs: see `Model`.

    Raises:
        DdimError: If there is no such model, or it is damaged.
    """
    config, network, notes = hub.read(hub.place(name), name, hints)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = of(network, config, device, **settings)
    model.notes = notes
    return model


def of(network: nn.Module, config: ModelConfig, device: torch.device | str, **settings: Any) -> Model | TokenModel:
    """A network and its configuration as a model of its kind; settings: as for `Engine`."""
    assert isinstance(network, Network)
    return (TokenModel if config.categorical else Model)(network, config, device, **settings)
