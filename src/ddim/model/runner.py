"""`Runner`: plans, sampling, encoding and decoding, written once for every model and every wrapped network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim._io import arguments
from ddim._io.limits import check_samples
from ddim.errors import DdimError, warn
from ddim.plan.base import BasePlan, Hook, Hooked
from ddim.plan.plan import Plan
from ddim.process import timesteps
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise, TorchNoise, TorchSeed
from ddim.process.schedule import Level, Schedule
from ddim.samplers.registry import CategoricalPlanner, Planner
from ddim.samplers.settings import STEPS, SamplerSettings
from ddim.sampling import inversion as inversions
from ddim.sampling import microbatch, tuning
from ddim.sampling.guidance import Guidance
from ddim.sampling.inversion import Encoded, Inversion
from ddim.sampling.latents import Latents
from ddim.sampling.loop import run

TUNING_SEEDS = 2**63  # first seed of tuning, so that its samples differ from those of `sample`

Through = Callable[[AnyDenoiser], AnyDenoiser]
"""A function that wraps a denoiser, such as `partial(ddim.Hooked, hook=...)`."""


class Runner(ABC):
    """A denoiser with its schedule: makes plans, and runs them in micro-batches of one fixed size.

    `ddim.Model` and the result of `ddim.wrap` are runners.
    """

    schedule: Schedule
    """The noise schedule."""
    shape: tuple[int, ...] | None
    """Shape of one sample, without the batch dimension; None if it is not known."""
    device: torch.device | None
    """The device of the network."""
    dtype: torch.dtype | None
    """The dtype that the network computes in; None if it is not known."""
    micro_batch: int | None
    """The number of samples per network evaluation when sampling, fixed so that bits do not depend on other samples;
    None if it follows from the shape of a sample, see `ddim.sampling.microbatch.size_of`."""

    # ---------------------------------------------------------------- what a kind of network defines

    @property
    @abstractmethod
    def planner(self) -> Planner | CategoricalPlanner:
        """Creates the plans of this network."""

    @abstractmethod
    def denoiser_of(
        self, n: int, labels: Sequence[int] | None, guidance: Guidance | None
    ) -> tuple[Callable[[Tensor], AnyDenoiser], bool]:
        """The denoisers of a run of n samples.

        Returns:
            The function from positions in the run, int64, (M,), to their denoiser, and whether denoisers depend on the
            positions.
        """

    @abstractmethod
    def noise_of(self, indices: Sequence[int], seed: int, shape: Sequence[int]) -> Noise:
        """The noise of the samples with these indices."""

    @abstractmethod
    def check_plan(self, plan: BasePlan[Any], to_clean: bool = False) -> None:
        """Check that a plan can be run with this network.

        Args:
            plan: The plan.
            to_clean: Whether the plan must end at clean data, as sampling requires.

        Raises:
            DdimError: If the plan does not fit; the message names the reason.
        """

    @abstractmethod
    def read(self, data: Any) -> Tensor:
        """Convert a user's data to x_0, float, (N, ...)."""

    @property
    def padded(self) -> bool:
        """Whether smaller micro-batches are padded, because the network's bits depend on the batch size."""
        return True

    @property
    def fingerprint(self) -> str:
        """The checksum of the weights, stored with latents and tuned plans; empty if unknown."""
        return ""

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Settings that the last bits of a result depend on, besides the model, the plan and the states."""
        return {}

    def run_of(self, through: Through | None) -> Callable[..., Tensor]:
        """The function that runs a plan, such as `ddim.loop.run`."""
        return run

    # ---------------------------------------------------------------- plans

    @arguments.suggest_names
    def plan(
        self,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        *,
        eta: float | None = None,
        sigma: Sequence[float] | str | None = None,
        clip_x0: bool | None = None,
        encode: bool = False,
        top: int | None = None,
        sampler: str = "auto",
        temperature: float | None = None,
        top_p: float | None = None,
        default: int = STEPS,
    ) -> Any:
        """The plan that `sample` runs with the same settings: a `ddim.Plan`, or a `ddim.CategoricalPlan`.

        Args:
            steps: See `ddim.samplers.SamplerSettings`, also for the other settings.
            grid: The name of a timestep spacing or an increasing list of timesteps.
            eta: Scale of the noise.
            sigma: Standard deviations of the noise, instead of eta.
            clip_x0: Whether x_0 is clipped to [-1, 1].
            encode: Whether the plan encodes, from clean data to the latent.
            top: The noisiest timestep of a named spacing.
            sampler: The sampler's name; "auto" is the recommended one.
            temperature: Discrete data: sharpens the prediction below 1.
            top_p: Discrete data: excludes unlikely values below 1.
            default: The number of steps of a named spacing if steps is None.

        Raises:
            DdimError: If a setting is out of range or not one of this modality.
        """
        settings = SamplerSettings(
            steps=steps,
            grid=grid,
            eta=eta,
            sigma=sigma,
            clip_x0=clip_x0,
            encode=encode,
            top=top,
            sampler=sampler,
            temperature=temperature,
            top_p=top_p,
        )
        return self.plan_of(settings, default)

    def plan_of(self, settings: SamplerSettings, default: int = STEPS) -> Any:
        """The plan of settings; see `plan`."""
        return self.planner.plan(settings, default)

    def levels(
        self,
        grid: str | Sequence[float] | None = None,
        steps: int | None = None,
        *,
        encode: bool = False,
        top: int | None = None,
    ) -> tuple[Level, ...]:
        """The noise levels a sampler visits, from the noisiest to clean data, see `ddim.timesteps.sampling_levels`.

        Args:
            grid: The name of a timestep spacing (see `ddim.timesteps`), "equal-angle" by default, or an increasing list
                of timesteps.
            steps: S, the number of network evaluations. With a named spacing the default is 20, or all timesteps if
                there are fewer.
            encode: Whether the levels increase instead, from clean data to the noisiest.
            top: The noisiest timestep of a named spacing, for a run that starts from a partly noised image.

        Raises:
            DdimError: See `ddim.timesteps.tau`.
        """
        planner = self.planner
        if (grid is None or isinstance(grid, str)) and steps is None:
            steps = planner.default_steps(STEPS)
        return timesteps.sampling_levels(self.schedule, planner.predicts, grid, steps, encode, top)

    @arguments.suggest_names
    def inversion(
        self, method: str = "ddim", steps: int | None = None, *, grid: str | Sequence[float] | None = None
    ) -> Inversion:
        """The encoding and decoding plans of an inversion method, see `ddim.inversion` and docs/inversion.md.

        Args:
            method: "ddim", "ddim-target", "fixed-point", "reversible" or "lossless".
            steps: S, the number of network evaluations of decoding; 50 by default with a named spacing.
            grid: The name of a timestep spacing or an increasing list of timesteps. By default equal-angle; for
                "fixed-point" denser near t = 1, see `ddim.inversion.graded_timesteps`.

        Raises:
            DdimError: If the method is unknown, for the reasons listed for `levels`, or for discrete data.
        """
        return inversions.plan_inversion(self._real_valued("inversion"), method, steps, grid)

    # ---------------------------------------------------------------- sampling

    @arguments.suggest_names
    def sample(
        self,
        n: int,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        noise: TorchSeed | None = None,
        start: int = 0,
        labels: int | Sequence[int] | None = None,
        guidance: Guidance | None = None,
        plan: BasePlan[Any] | None = None,
        origin: Tensor | None = None,
        hook: Hook | None = None,
        through: Through | None = None,
        grid: str | Sequence[float] | None = None,
        eta: float | None = None,
        sigma: Sequence[float] | str | None = None,
        clip_x0: bool | None = None,
        top: int | None = None,
        sampler: str = "auto",
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Sample. Sample i is a function of (network, plan, seed, start + i) and does not depend on n.

        Args:
            n: The number of samples.
            shape: Shape of one sample, for example (C, H, W), of a wrapped network; a model knows its own.
            steps: S, the number of network evaluations; by default 20, or all timesteps if there are fewer.
            seed: The run's seed.
            noise: `ddim.Noise.torch(seed)` for the noise of diffusers' pipelines instead of `seed` and `start`. Sample
                i then depends on n.
            start: The first sample's index.
            labels: One label for all samples or one per sample, for a model with labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale, see `ddim.guidance`.
            plan: The plan to run, instead of steps and the settings below.
            origin: Data to start from, one sample, (1, ...), or one per sample. It is partly noised first; needs `top`.
            hook: A function applied to each predicted x_0, see `ddim.x0_hooks`.
            through: A function that wraps the denoiser, such as `lambda denoise: ddim.Guided(denoise, other, 3.0)`.
            grid: See `plan`, also for the settings that follow. With `hook`, `through` or `origin` the sampler "auto"
                is "ddim".
            eta: Scale of the noise.
            sigma: Standard deviations of the noise, instead of eta.
            clip_x0: Whether x_0 is clipped to [-1, 1].
            top: The noisiest timestep of a named spacing.
            sampler: The sampler's name.
            temperature: Discrete data: sharpens the prediction below 1.
            top_p: Discrete data: excludes unlikely values below 1.

        Returns:
            float32, (n, *shape), nominally in [-1, 1]; int64 for discrete data.

        Raises:
            DdimError: If an argument is out of range, or the plan does not fit this network.
        """
        settings = SamplerSettings(
            steps=steps,
            grid=grid,
            eta=eta,
            sigma=sigma,
            clip_x0=clip_x0,
            top=top,
            sampler=sampler,
            temperature=temperature,
            top_p=top_p,
        )
        microbatch.check_request(n, plan, settings.passed())
        each = microbatch.per_sample_labels(labels, n)
        check_samples(n, arguments.whole(start, "start", 0))
        named = plan is None and (grid is None or isinstance(grid, str))  # a list of timesteps defines its own start
        if named and (origin is None) != (top is None):
            passed, other = ("top", "origin") if origin is None else ("origin", "top")
            raise DdimError(passed, f"is passed without {other}, the data or the timestep to start from", "pass both")
        if hook is not None:
            through = self._hooked(hook, through)
        if sampler == "auto" and (through is not None or origin is not None):
            settings = replace(settings, sampler="ddim")
        plan = plan or self.plan_of(settings)
        drawn = None if noise is None else self.noise_together(noise, n, seed, start, shape)
        indices = range(start, start + n)
        samples = self.sample_blocks(plan, indices, seed, each, guidance, origin, through, shape=shape, noise=drawn)
        parts = [part if part.dtype == torch.int64 else part.float() for part in samples]
        if parts:
            return torch.cat(parts)
        dtype = torch.float32 if isinstance(self.planner, Planner) else torch.int64
        return torch.empty((0, *self._shape(shape)), device=self.device, dtype=dtype)

    def noise_together(
        self, noise: TorchSeed, n: int, seed: int = 0, start: int = 0, shape: Sequence[int] | None = None
    ) -> TorchNoise:
        """The noise of n samples that are drawn together.

        Args:
            noise: The seed of torch's generator.
            n: The number of samples.
            seed: The run's seed, which must be 0.
            start: The first sample's index, which must be 0.
            shape: Shape of one sample, of a wrapped network.

        Raises:
            DdimError: If seed or start is passed, or the data are discrete.
        """
        for name, value in (("seed", seed), ("start", start)):
            if value:
                problem = (
                    "torch's generator draws the whole batch at once" if name == "start" else "it has its own seed"
                )
                raise DdimError(f"noise {noise} and {name} {value}", f"cannot be combined: {problem}", f"omit {name}")
        self._real_valued(f"noise {noise}", "use a seed")
        return noise.of(n, self._shape(shape), self.device or "cpu")

    def _hooked(self, hook: Hook, through: Through | None) -> Through:
        self._real_valued("hook", "leave it out")
        hooked = partial(Hooked, hook=hook)
        return hooked if through is None else lambda denoise: hooked(through(denoise))

    def _real_valued(self, subject: str, hint: str = "use a model of real-valued data") -> Planner:
        """The planner, for what discrete data do not have."""
        planner = self.planner
        if not isinstance(planner, Planner):
            raise DdimError(subject, "is not defined for discrete data", hint)
        return planner

    def _micro_batch(self, shape: Sequence[int]) -> int:
        """The number of samples of this shape per network evaluation."""
        return microbatch.size_of(self.micro_batch, self.device, shape)

    def _shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        """The shape of one sample, from the argument or the network's own."""
        if shape is None and self.shape is None:
            raise DdimError("shape", "is not known for this network", "pass that of one sample, such as (3, 32, 32)")
        if shape is not None and not isinstance(shape, Sequence):
            raise DdimError(f"shape {shape!r}", "is not a shape", "pass a tuple, and the number of steps as steps=20")
        sizes = self.shape if shape is None else tuple(arguments.whole(size, "shape", 1) for size in shape)
        assert sizes is not None
        if self.shape is not None and sizes != tuple(self.shape):
            raise DdimError(f"shape {sizes}", f"is not that of this network, {tuple(self.shape)}", "leave it out")
        return sizes

    def sample_blocks(
        self,
        plan: BasePlan[Any],
        indices: Sequence[int],
        seed: int = 0,
        labels: Sequence[int] | None = None,
        guidance: Guidance | None = None,
        origin: Tensor | None = None,
        through: Through | None = None,
        *,
        shape: Sequence[int] | None = None,
        noise: TorchNoise | None = None,
    ) -> Iterator[Tensor]:
        """Sample the listed indices in micro-batches of one fixed size.

        Args:
            plan: The plan to run.
            indices: The samples' indices.
            seed: The run's seed.
            labels: One label per sample, for a model with labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale.
            origin: Data to start from instead of pure noise, one sample or one per index. It is partly noised first.
            through: A function that wraps the denoiser, for example in a hook on x_0.
            shape: Shape of one sample, of a wrapped network.
            noise: Noise drawn for all samples together, instead of seed; see `noise_together`.

        Yields:
            float32, (up to micro_batch, *shape), or ids, (up to micro_batch, ...), in the order of `indices`.

        Raises:
            DdimError: If the plan does not fit this network, or does not end at clean data.
        """
        self.check_plan(plan, to_clean=True)
        sizes = self._shape(shape)
        if origin is not None:
            origin = arguments.floats(origin, "origin", sizes)
            if len(origin) not in (1, len(indices)):
                problem = f"are {len(origin)} images for {len(indices)} samples"
                raise DdimError("origin", problem, "give one image, or one for each sample")
        at, varies = self._denoisers(len(indices), labels, guidance, through)

        def noise_at(indices: Sequence[int]) -> Noise:
            return self.noise_of(indices, seed, sizes) if noise is None else noise.at(indices)

        yield from microbatch.sample_micro_batches(
            at,
            plan,
            noise_at,
            indices,
            self._micro_batch(sizes),
            varies,
            origin,
            self.padded,
            self.run_of(through),
        )

    def run_blocks(
        self, plan: Plan, states: Tensor, earlier: Sequence[Tensor] = (), through: Through | None = None
    ) -> Iterator[Tensor]:
        """Run a deterministic plan from initial states (N, ...) in micro-batches of one fixed size.

        Args:
            plan: The plan to run.
            states: The initial states.
            earlier: States before the initial one, one for each level of `plan.before`.
            through: A function that wraps the denoiser.

        Yields:
            float32 (float64 where the plan has a lattice), (up to micro_batch, ...).

        Raises:
            DdimError: If the plan does not fit this network, or the states do not have its shape.
        """
        first, *older = self._fit(plan, [states, *earlier])
        at, _ = self._denoisers(len(first), through=through)

        def part(positions: Tensor, state: Tensor, *older: Tensor) -> tuple[Tensor, ...]:
            return (run(at(positions), plan, state, earlier=older),)

        tensors = (torch.arange(len(first)), first, *older)
        size = self._micro_batch(first.shape[1:])
        for (ends,) in microbatch.map_micro_batches(part, tensors, size, self.padded):
            yield ends

    def _denoisers(
        self,
        n: int,
        labels: Sequence[int] | None = None,
        guidance: Guidance | None = None,
        through: Through | None = None,
    ) -> tuple[Callable[[Tensor], AnyDenoiser], bool]:
        """`denoiser_of`, with each denoiser wrapped by `through`."""
        at, varies = self.denoiser_of(n, labels, guidance)
        return (at if through is None else lambda positions: through(at(positions))), varies

    def _fit(self, plan: Plan, states: Sequence[Tensor]) -> list[Tensor]:
        """Check the plan and the shapes of the states; return the states on the device, in the plan's dtype."""
        self.check_plan(plan)
        states = [arguments.floats(state, "states", self.shape) for state in states]
        for state in states:
            if state.shape != states[0].shape:
                problem = f"are {tuple(state.shape)} and {tuple(states[0].shape)}"
                raise DdimError("states", problem, "pass as many of each, of one shape")
        dtype = torch.float64 if plan.lattice else torch.float32
        return [state.to(self.device, dtype) for state in states]

    # ---------------------------------------------------------------- latents

    @arguments.suggest_names
    def encode(
        self,
        data: Tensor | np.ndarray,
        steps: int | None = None,
        *,
        grid: str | Sequence[float] | None = None,
        method: str = "ddim",
    ) -> Latents:
        """Encode data to latents x_T, which `decode` takes as they are; docs/inversion.md compares the methods.

        Args:
            data: float (N, ...) in the network's range, or, for a model of images, uint8 (N, H, W, C).
            steps: S, the number of network evaluations of decoding; 50 by default with a named spacing.
            grid: The name of a timestep spacing or an increasing list of timesteps; the method's default if None.
            method: "ddim" is eq. (13) run backwards; it is first order, so decoding returns the data approximately.
                "ddim-target" is the same with the network evaluated at the next level. Exact methods are
                "fixed-point", with several evaluations per step, and "reversible" and "lossless" (exact to the last
                bit), with one evaluation per step.

        Raises:
            DdimError: If an argument is out of range, or a sample cannot be encoded.
        """
        inverter = self.inversion(method, steps, grid=grid)
        x0 = self.read(data)
        return self.latents(inverter, [*self.encode_blocks(inverter, x0)] or [Encoded(x0, x0, 0)])

    def latents(self, inverter: Inversion, parts: Sequence[Encoded], names: Sequence[str] = ()) -> Latents:
        """Latents with what decoding them needs, from the micro-batches of `encode_blocks`.

        Args:
            inverter: The inversion that encoded.
            parts: The micro-batches, at least one.
            names: The source of each latent, (N,), or none.
        """
        x = torch.cat([part.latents for part in parts])
        states = [part.earlier for part in parts if part.earlier is not None]
        earlier = torch.cat(states) if inverter.two_state else None
        plan, conditions = inverter.resume_plan, dict(self.conditions)
        return Latents(x, plan, earlier, inverter.method, tuple(names), self.fingerprint, conditions)

    def encode_blocks(self, inverter: Inversion, data: Tensor) -> Iterator[Encoded]:
        """Encode data to latents in micro-batches of one fixed size.

        Args:
            inverter: The inversion method and its plans, see `inversion`.
            data: float, (N, ...).

        Yields:
            The latents of up to micro_batch samples.

        Raises:
            DdimError: If the plans do not fit this network, the data do not have its shape, or a sample cannot be
                encoded.
        """
        if inverter.encode_plan is None and self.dtype in (torch.float16, torch.bfloat16):
            name = str(self.dtype).removeprefix("torch.")
            raise DdimError(inverter.method, f"cannot be solved in {name}, which is not smooth", "compute in float32")
        [states] = self._fit(inverter.encode_plan or inverter.decode_plan, [data])
        at, _ = self._denoisers(len(states))

        def encode(part: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            return inversions.encode(at(positions), inverter, part, index=positions)

        numbered = (states, torch.arange(len(states)))
        size = self._micro_batch(states.shape[1:])
        for latents, earlier, nfe in microbatch.map_micro_batches(encode, numbered, size):
            yield Encoded(latents, earlier if inverter.two_state else None, int(nfe[0]))

    @arguments.suggest_names
    def decode(
        self,
        latents: Latents | Tensor,
        steps: int | None = None,
        *,
        grid: str | Sequence[float] | None = None,
        method: str | None = None,
    ) -> Tensor:
        """Decode latents to data, deterministically.

        Args:
            latents: The result of `encode`, which is decoded by the method that encoded it; or x_T alone, (N, ...).
            steps: S, the number of network evaluations, for x_T alone; 50 by default with a named spacing.
            grid: For x_T alone: the name of a timestep spacing or an increasing list of timesteps.
            method: For x_T alone: the inversion method, "ddim" by default.

        Returns:
            float32, (N, ...), nominally in [-1, 1].

        Raises:
            DdimError: If an argument is out of range, or the latents are those of another model.

        Warns:
            DdimWarning: If x_T alone is passed for a method with two states; the result is then approximate.
        """
        if isinstance(latents, Latents):
            if (steps, grid, method) != (None, None, None):
                problem = "hold the plan that decodes them, so steps, grid and method are not needed"
                raise DdimError("latents", problem, "leave them out, or pass latents.x, x_T alone")
            fingerprint = latents.model_sha256 and self.fingerprint
            if fingerprint and fingerprint != latents.model_sha256:
                raise DdimError("latents", "were encoded by another model", "decode with the model that encoded")
            parts = [*self.run_blocks(latents.plan, *latents.states())]
            return torch.cat(parts).float() if parts else latents.x.float()
        inverter = self.inversion(method or "ddim", steps, grid=grid)
        x = arguments.floats(latents, "latents", self.shape)
        if inverter.two_state:
            warn(f"{inverter.method}: x_T is passed without the state before it; the result is approximate")
        parts = [*self.run_blocks(inverter.decode_plan, x)]
        return torch.cat(parts).float() if parts else x.float()

    # ---------------------------------------------------------------- tuning

    @arguments.suggest_names
    def tuning(
        self, nfe: int, *, solver: str = "fitted", calibration_samples: int = 128, seed: int = 0
    ) -> Iterator[tuning.Progress]:
        """Search for the best plan for this network at a number of network evaluations, see `ddim.tuning`.

        Args:
            nfe: The number of network evaluations, 2..30.
            solver: "fitted", or a sampler whose timesteps alone are searched.
            calibration_samples: The number of calibration samples, half of them held out. Their random stream
                differs from that of `sample`.
            seed: The seed of the calibration samples.

        Yields:
            The progress. The last item's `result.plan` is the plan; if tuning improved on the untuned plans, it is
            bound to this model.

        Raises:
            DdimError: If an argument is out of range, or the data are discrete.
        """
        planner = self._real_valued("tuning")
        n = arguments.whole(calibration_samples, "calibration_samples", most=1 << 16)
        shape = self._shape(None)
        size, start = self._micro_batch(shape), self.noise_of(range(n), TUNING_SEEDS + seed, shape).start()
        at, _ = self._denoisers(n)
        denoise: Any = at(torch.arange(n))
        for step in tuning.iter_tuning(denoise, self.schedule, nfe, start, solver, size, planner.predicts):
            if step.result is not None and step.result.tuned_wins:
                plan = replace(step.result.plan, made_for=self.fingerprint)
                step = replace(step, result=replace(step.result, plan=plan))
            yield step
