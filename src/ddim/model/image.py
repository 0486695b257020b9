"""`Model`: a trained model of real-valued images."""

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

TUNING_SEEDS = 2**63  # first seed of tuning, so that its samples differ from those of `sample`


class Model(ModelBase):
    """A trained model of real-valued images: a `ModelBase` with plans, sampling, tuning, encoding and decoding."""

    SETTINGS = frozenset({"eta", "sigma", "clip_x0", "encode"})

    @property
    def policy(self) -> ImagePolicy:
        """The preprocessing from image files to the network's input."""
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
            steps: S, the number of network evaluations; the number of steps for "heun" and "rk4", which need 2 and 4
                evaluations per step.
            grid: The name of a timestep spacing (see `ddim.timesteps`) or an increasing list of timesteps; equal-angle
                by default.
            eta: See `ddim.samplers.ddim`, also for the other settings.
            sigma: Instead of eta: "learned" for the network's learned variance, if it has one, or "optimal" for the
                variance that fits this model's measured error.
            clip_x0: Whether x_0 is clipped to [-1, 1]. By default this follows the model's source, see
                `ddim.model.importers.clipping`, with a warning, or is on with sigma "hat". A plan that encodes does
                not clip by default.
            encode: Whether the plan encodes, from clean data to the latent.
            default: The number of steps of a named spacing if steps is None, bounded by the number of timesteps.
            top: The noisiest timestep of a named spacing, for a run that starts from a partly noised image; by default
                `ddim.process.start.start_time`.
            sampler: One of `ddim.samplers.SAMPLERS`; all but "ddim" are deterministic. "auto" is the sampler that
                `ddim.samplers.recommended` names for this number of steps if no setting but steps is passed, else
                "ddim". "auto" is the default of `sample` and of the commands `sample` and `plan`.

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
        """Sample images. Image i is a function of (model, plan, seed, start + i) and does not depend on n.

        Args:
            n: The number of images.
            steps: S, the number of network evaluations; by default 20, or all timesteps if there are fewer.
            seed: The run's seed.
            start: The first sample's index.
            labels: One label for all images or one per image, for a model with labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale, see `ddim.guidance`.
            plan: The plan to run, instead of steps and settings.
            origin: Images to start from, (1, C, H, W) or one per sample, in [-1, 1]. They are partly noised first;
                needs `top`.
            hook: A function applied to each predicted x_0, see `ddim.x0_hooks`.
            settings: The arguments of `Model.plan`: sampler ("auto" by default, "ddim" with origin or hook), grid, eta,
                sigma, clip_x0, top.

        Returns:
            float32, (n, C, H, W), nominally in [-1, 1].

        Raises:
            DdimError: If an argument is out of range, or the plan does not fit this model.
        """
        each = self.check_request(n, labels, plan, settings or steps is not None)
        check_samples(n, whole(start, "start", 0))
        grid = settings.get("grid")
        by_name = plan is None and (grid is None or isinstance(grid, str))  # a list of timesteps defines its own start
        if by_name and (origin is None) != (settings.get("top") is None):
            raise DdimError("origin and top", "need each other", "pass an image to start from and a time to start at")
        default_sampler = "ddim" if hook or origin is not None else "auto"
        plan = plan or self.plan(steps, **{"sampler": default_sampler, **settings})
        through = partial(Hooked, hook=hook) if hook else None
        blocks = self.sample_blocks(plan, range(start, start + n), seed, each, guidance, origin, through)
        return torch.cat([self.empty(), *(block.float() for block in blocks)])

    def tuning(
        self, nfe: int, solver: str = "fitted", calibration_samples: int = 128, seed: int = 0
    ) -> Iterator[tuning.Progress]:
        """Search for the best plan for this model at a number of network evaluations, see `ddim.tuning`.

        Args:
            nfe: The number of network evaluations, 2..30.
            solver: "fitted", or a sampler whose timesteps alone are searched.
            calibration_samples: The number of calibration samples, half of them held out. Their random stream
                differs from that of `sample`.
            seed: The seed of the calibration samples.

        Yields:
            The progress. The last item's `found.plan` is the plan; if tuning improved on the untuned plans, it is
            bound to this model.

        Raises:
            DdimError: If an argument is out of range.
        """
        start = self.noise(whole(calibration_samples, "calibration_samples", most=1 << 16), TUNING_SEEDS + seed).start()
        for step in tuning.iter_tuning(
            self.denoise, self.schedule, nfe, start, solver, self.micro_batch, self.config.predicts
        ):
            if step.found is not None and step.found.tuned_wins:
                plan = replace(step.found.plan, made_for=self.fingerprint)
                step = replace(step, found=replace(step.found, plan=plan))
            yield step

    def inversion(
        self, method: str = "ddim", steps: int | None = None, grid: str | Sequence[float] | None = None
    ) -> inversion.Inversion:
        """The encoding and decoding plans of an inversion method, see `ddim.inversion` and docs/inversion.md.

        Args:
            method: "ddim", "ddim-target", "fixed-point", "reversible" or "lossless".
            steps: S, the number of network evaluations of decoding; 50 by default with a named spacing.
            grid: The name of a timestep spacing or an increasing list of timesteps. By default equal-angle; for
                "fixed-point" denser near t = 1, see `ddim.inversion.graded_timesteps`.

        Raises:
            DdimError: If the method is unknown, or for the reasons listed for `Model.levels`.
        """
        return inversion.planned(self._planner, method, steps, grid)

    def encode(
        self,
        images: Tensor | np.ndarray,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        method: str = "ddim",
    ) -> Tensor:
        """Encode images to latents x_T; docs/inversion.md compares the methods.

        Args:
            images: float (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C).
            steps: S, the number of network evaluations of decoding; 50 by default with a named spacing.
            grid: The name of a timestep spacing or an increasing list of timesteps; the method's default if None.
            method: "ddim" is eq. (13) run backwards; it is first order, so decoding returns the images approximately.
                "ddim-target" is the same with the network evaluated at the next level. Exact methods are
                "fixed-point", with several evaluations per step, and "reversible" and "lossless" (exact to the last
                bit), with one evaluation per step.

        Returns:
            float32, (N, C, H, W). For "reversible" and "lossless" a latent is two states: (2, N, C, H, W), x_T and the
            state one step before it, float64 for "lossless".

        Raises:
            DdimError: If an argument is out of range, or an image cannot be encoded.
        """
        bytes_ = getattr(images, "dtype", None) in (np.uint8, torch.uint8)
        if bytes_ and (images.ndim != 4 or getattr(images, "is_meta", False)):
            raise DdimError("images", f"are uint8 {tuple(images.shape)}", "pass (N, H, W, C), or floats (N, C, H, W)")
        x0 = floats(to_float(images) if bytes_ else images, "images", self.shape)
        inverter = self.inversion(method, steps, grid)
        encoded = [*self.encode_blocks(inverter, x0)]
        latents = torch.cat([self.empty(), *(part.latents for part in encoded)])
        if not inverter.two_state:
            return latents
        return torch.stack([latents, torch.cat([self.empty(), *(p.earlier for p in encoded if p.earlier is not None)])])

    def decode(
        self,
        latents: Tensor,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        method: str = "ddim",
    ) -> Tensor:
        """Decode latents to images, deterministically.

        Args:
            latents: The result of `encode`, or x_T alone, (N, C, H, W).
            steps: S, the number of network evaluations, as passed to `encode`; 50 by default with a named spacing.
            grid: The name of a timestep spacing or an increasing list of timesteps, as passed to `encode`.
            method: The method passed to `encode`.

        Returns:
            float32, (N, C, H, W), nominally in [-1, 1].

        Raises:
            DdimError: If an argument is out of range, or latents of two states are passed for a one-state method.

        Warns:
            DdimWarning: If x_T alone is passed for a two-state method; the images are then approximate.
        """
        inverter = self.inversion(method, steps, grid)
        latents = floats(latents, "latents")
        if latents.ndim not in (4, 5) or latents.shape[-3:] != self.shape:
            problem = f"are {tuple(latents.shape)}, the model's are {('N', *self.shape)}"
            raise DdimError("latents", problem, "pass the result of `encode`")
        if latents.ndim == 5 and not (inverter.two_state and len(latents) == 2):
            problem = f"are {len(latents)} states each, {method} takes {2 if inverter.two_state else 1}"
            raise DdimError("latents", problem, "use the method that encoded them")
        if latents.ndim == 5:
            blocks = self.run_blocks(inverter.resume_plan, latents[1], [latents[0]])
        else:
            if inverter.two_state:
                warn(f"{method}: x_T is passed without the state before it; images are decoded approximately")
            blocks = self.run_blocks(inverter.decode_plan, latents)
        return torch.cat([self.empty(), *(block.float() for block in blocks)])
