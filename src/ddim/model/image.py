"""`Model`: a trained model of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ddim._io.arguments import floats, whole
from ddim._io.limits import check_samples
from ddim.data.pixels import to_float
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError, warn
from ddim.model.base import STEPS, ModelBase
from ddim.model.importers.clipping import clipping_of
from ddim.plan.base import Hook, Hooked
from ddim.plan.plan import Plan
from ddim.samplers.registry import Planner
from ddim.sampling import inversion, tuning
from ddim.sampling.guidance import Guidance

TUNING_SEEDS = 2**63  # of seeds of tuning


class Model(ModelBase):
    """A trained model of real-valued pictures: an `ModelBase`, with plans made for it, and what is done with them."""

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
            grid: A grid's name (see `ddim.timesteps`) or a rising list of times; equal-angle if left out.
            eta: See `ddim.samplers.ddim`, as for the rest.
            sigma: Instead of eta, "learned" for the network's own, where it has one, or "optimal" for the variance
                that fits this model's own error.
            clip_x0: Whether x_0 is clipped to [-1, 1]; if left out, as `ddim.model.importers.clipping` says of the
                model, which is warned about, or with sigma "hat". A plan that encodes does not clip by itself.
            encode: A plan that encodes.
            default: The steps of a named grid where none are given, bounded by the times there are.
            top: The noisiest time of a named grid, where a run starts from an image partly noised; if left out,
                `ddim.process.start.start_time`.
            sampler: One of `ddim.samplers.SAMPLERS`; all but "ddim" are without noise. "auto" is what
                `ddim.samplers.recommended` names for so many steps, where nothing but the steps is given; else "ddim".
                It is what `sample` and the commands `sample` and `plan` take unless told otherwise.

        Raises:
            DdimError: See `ddim.timesteps.tau`, `ddim.samplers.ddim` and `ddim.model.config.ModelConfig.error_at`.
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
            hook: What is done to each predicted x_0, see `ddim.x0_hooks`.
            settings: As for `Model.plan`: sampler (if left out "auto", but "ddim" with origin or hook), grid, eta,
                sigma, clip_x0, top.

        Returns:
            float32, (n, C, H, W), nominally in [-1, 1].

        Raises:
            DdimError: If an argument is out of range, or the plan is not one for this model.
        """
        each = self.check_request(n, labels, plan, settings or steps is not None)
        check_samples(n, whole(start, "start", 0))
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
        start = self.noise(whole(pilots, "pilots", most=1 << 16), TUNING_SEEDS + seed).start()
        for step in tuning.iter_tuning(
            self.denoise, self.schedule, calls, start, solver, self.micro_batch, self.config.predicts
        ):
            if step.found is not None and step.found.tuned_wins:
                plan = replace(step.found.plan, made_for=self.fingerprint)
                step = replace(step, found=replace(step.found, plan=plan))
            yield step

    def inversion(
        self, method: str = "ddim", steps: int | None = None, grid: str | Sequence[float] | None = None
    ) -> inversion.Inversion:
        """The plans of a way to latents and back, see `ddim.inversion` and docs/inversion.md.

        Args:
            method: "ddim", "ddim-target", "fixed-point", "reversible" or "lossless".
            steps: S, the number of network calls down; with a named grid 50 if left out.
            grid: A grid's name or a rising list of times; equal-angle if left out, for "fixed-point" times closer near
                t = 1, see `ddim.inversion.graded_timesteps`.

        Raises:
            DdimError: If the method is unknown, or as `Model.levels`.
        """
        return inversion.planned(self._planner, method, steps, grid)

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
        bytes_ = getattr(images, "dtype", None) in (np.uint8, torch.uint8)
        if bytes_ and (images.ndim != 4 or getattr(images, "is_meta", False)):
            raise DdimError("images", f"are uint8 {tuple(images.shape)}", "give (N, H, W, C), or floats (N, C, H, W)")
        pictures = floats(to_float(images) if bytes_ else images, "images", self.shape)
        way = self.inversion(method, steps, grid)
        made = [*self.encode_blocks(way, pictures)]
        latents = torch.cat([self.empty(), *(part.latents for part in made)])
        if not way.two_state:
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
        way = self.inversion(method, steps, grid)
        latents = floats(latents, "latents")
        if latents.ndim not in (4, 5) or latents.shape[-3:] != self.shape:
            wrong = f"are {tuple(latents.shape)}, the model's are {('N', *self.shape)}"
            raise DdimError("latents", wrong, "give what `encode` returned")
        if latents.ndim == 5 and not (way.two_state and len(latents) == 2):
            wrong = f"are {len(latents)} states each, {method} takes {2 if way.two_state else 1}"
            raise DdimError("latents", wrong, "name the method that encoded")
        if latents.ndim == 5:
            blocks = self.run_blocks(way.resume_plan, latents[1], [latents[0]])
        else:
            if way.two_state:
                warn(f"{method}: x_T is given without the state before it; pictures come back approximately")
            blocks = self.run_blocks(way.decode_plan, latents)
        return torch.cat([self.empty(), *(block.float() for block in blocks)])
