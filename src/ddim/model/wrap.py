"""Wrap any denoising network, to use it with plans, samplers and inversion methods.

The value of the time that the network is passed, by name:

| name    | number          | name    | number                                                                  |
|---------|-----------------|---------|-------------------------------------------------------------------------|
| index   | t - 1, 0..T - 1 | log-snr | log(alpha_bar / (1 - alpha_bar))                                        |
| index+1 | t, 1..T         | sigma   | noise / signal                                                          |
| fraction| t / T           | flow    | s = noise / (signal + noise); 1 - s if time 1 is the data               |

or any function of the level, such as `lambda level: math.log(level.ratio) / 4` for EDM's c_noise.

With eta = 0 a DDIM step is an Euler step in sigma, and in s: the first-order samplers of EDM and rectified flow. A
schedule is constructed from the times that such a network was trained with: `Schedule(-2 * numpy.log(sigmas))` from
increasing sigmas, `Schedule(2 * numpy.log((1 - s) / s))` from increasing s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddim._io.arguments import floats, whole
from ddim._io.limits import check_samples
from ddim.errors import DdimError, warn
from ddim.model.denoisers import MEANS, ExternalDenoiser, Output, Time, teller
from ddim.model.devices import usable
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise
from ddim.process.schedule import NAMED, Level, Schedule, from_betas
from ddim.samplers.registry import Planner
from ddim.sampling import inversion, loop, microbatch

STEPS = 20


def wrap(
    module: Callable[..., Any],
    schedule: Schedule | str | Sequence[float] | np.ndarray | Tensor,
    predicts: Output,
    time: Time | Callable[[Level], float] | None = None,
    data_at: Literal[0, 1] = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    time_dtype: torch.dtype | None = None,
    micro_batch: int | None = None,
    error: Callable[[Level], float] | None = None,
    conditioning: Mapping[str, Any] | None = None,
) -> Wrapped:
    """Wrap a network as a denoiser with plans, sampling and latents.

    Args:
        module: Called as module(input, time (N,), **conditioning), see `ddim.model.denoisers`. It returns a tensor, a
            tuple whose first entry is a tensor, or an object with `.sample`. The tensor has the shape of x, or twice
            its channels with a learned variance, which only sigma "learned" uses.
        schedule: The noise schedule, its name, or betas (T,).
        predicts: "eps", "x0" or "v"; "edm" for a denoiser of y = x / signal, "velocity" for eps - x_0 of flow matching.
        time: The time passed to the module: a name from the table above, or a function of the level. By default
            "index", but "sigma" for edm and "flow" for velocity.
        data_at: 1 for a velocity x_0 - eps, from a library in which time 1 is the data.
        dtype: The dtype of the module's input; by default that of its first parameter. The module itself is not cast.
        device: The device of the module's input; by default that of its first parameter. The module itself is not
            moved.
        time_dtype: The dtype of the time; by default int64 for an integer index, else float32 (float64 if the input
            is float64).
        micro_batch: The number of samples per module call when sampling; by default 8 on a CPU, 64 on a GPU.
        error: E ||eps - eps_theta||^2 / d at a level, for sigma "optimal".
        conditioning: Keyword arguments of every call, see `Wrapped.with_conditioning`.

    Raises:
        DdimError: If an argument is invalid.

    Warns:
        DdimWarning: If the module was in training mode; it is put into evaluation mode.
    """
    _check(predicts, data_at)
    noise_schedule, place = _schedule(schedule), None if device is None else usable(device)
    time_name = {"edm": "sigma", "velocity": "flow"}.get(predicts, "index") if time is None else time
    tell = time_name if callable(time_name) else teller(time_name, noise_schedule.T, data_at)
    if isinstance(module, nn.Module):
        dtype, place = _as_module(module, dtype, place)
    size = microbatch.size_of(micro_batch, place)
    counts, sign, keywords = time_name in ("index", "index+1"), -1.0 if data_at else 1.0, dict(conditioning or {})
    arguments = (module, predicts, tell, dtype, place, time_dtype, counts, sign, keywords)
    return Wrapped(*arguments, schedule=noise_schedule, error=error, micro_batch=size)


@dataclass(frozen=True, eq=False, kw_only=True)
class Wrapped(ExternalDenoiser):
    """A wrapped network, the result of `wrap`: a denoiser with plans, sampling, encoding and decoding.

    Args:
        schedule: The noise schedule.
        error: E ||eps - eps_theta||^2 / d at a level, for sigma "optimal".
        micro_batch: The number of samples per network evaluation; fixed, so that a sample's bits do not depend on
            other samples.
    """

    schedule: Schedule
    error: Callable[[Level], float] | None = None
    micro_batch: int = 8

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
        """A plan for this network; the arguments are those of `ddim.Model.plan`.

        Raises:
            DdimError: As for `ddim.Model.plan`, or if the network cannot be evaluated at a level without signal.
        """
        plan = self._planner.plan(steps, grid, eta, sigma, clip_x0, encode, default, top, sampler)
        for row in plan.rows:
            self.check_signal(row.query)
        return plan

    def inversion(
        self, method: str = "ddim", steps: int | None = None, grid: str | Sequence[float] | None = None
    ) -> inversion.Inversion:
        """The plans of an inversion method; the arguments are those of `ddim.Model.inversion`.

        Raises:
            DdimError: As for `ddim.Model.inversion`.
        """
        return inversion.planned(self._planner, method, steps, grid)

    def trajectory(
        self, plan: Plan, start: Tensor | Noise, noise: Noise | None = None, earlier: Sequence[Tensor] = ()
    ) -> Iterator[loop.Step[Row]]:
        """Run a plan step by step: `ddim.trajectory` with this network."""
        yield from loop.trajectory(self, plan, start, noise, earlier)

    def sample(
        self,
        n: int,
        shape: Sequence[int],
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
        plan: Plan | None = None,
        through: Callable[[AnyDenoiser], AnyDenoiser] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Sample data. Sample i is a function of (network, plan, seed, start + i) and does not depend on n.

        Args:
            n: The number of samples; each conditioning tensor has n entries, or one.
            shape: Shape of one sample, for example (C, H, W).
            steps: S, the number of network evaluations; 20 by default.
            seed: The run's seed.
            start: The first sample's index.
            plan: The plan to run, instead of steps and settings.
            through: A function that wraps the denoiser, such as `partial(ddim.Hooked, hook=...)`, or
                `lambda own: ddim.Guided(own, other, 3.0)`.
            settings: The arguments of `Wrapped.plan`: sampler ("auto" by default, "ddim" with through), grid, eta,
                sigma, clip_x0.

        Returns:
            float32, (n, *shape).

        Raises:
            DdimError: If an argument is out of range, or the plan does not fit this schedule.
        """
        microbatch.check_request(n, plan, settings or steps is not None)
        check_samples(n, whole(start, "start", 0))
        if settings.get("top") is not None:
            raise DdimError("top", "needs an image to start from", "remove it, or run `trajectory` from yours")
        plan = plan or self.plan(steps, **{"sampler": "ddim" if through else "auto", **settings})
        plan.check_schedule(self.schedule, to_clean=True)

        def denoiser(places: Tensor | None) -> AnyDenoiser:
            denoise = self if places is None else self.at(places, n)
            return through(denoise) if through else denoise

        def noise(indices: Sequence[int]) -> Noise:
            return Noise(seed, tuple(indices), tuple(shape), self.device or "cpu")

        places = range(n) if self.conditioning else None
        micro_batches = microbatch.sample_blocks(
            denoiser, plan, noise, range(start, start + n), self.micro_batch, places
        )
        return torch.cat([torch.empty((0, *shape), device=self.device), *(block.float() for block in micro_batches)])

    def encode(
        self,
        x0: Tensor,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        method: str = "ddim",
    ) -> Tensor:
        """Encode data to latents x_T, see `ddim.Model.encode`.

        Args:
            x0: float, (N, ...).
            steps: S, the number of network evaluations of decoding; 50 by default with a named spacing.
            grid: The name of a timestep spacing or an increasing list of timesteps; the method's default if None.
            method: One of `ddim.names.METHODS`.

        Returns:
            float32, (N, ...); two states, (2, N, ...), for "reversible" and "lossless", float64 for "lossless".

        Raises:
            DdimError: If an argument is out of range, or a sample cannot be encoded.
        """
        x0 = floats(x0, "data to encode")
        inverter = self.inversion(method, steps, grid)
        if inverter.encode_plan is None and self.dtype in (torch.float16, torch.bfloat16):
            raise DdimError(method, f"cannot be solved in {self.dtype}, which is not smooth", "compute in float32")
        if not (total := len(x0)):
            return x0.new_empty((2, *x0.shape) if inverter.two_state else x0.shape)

        def encode_part(part: Tensor, places: Tensor) -> tuple[Tensor, ...]:
            return inversion.encode(self.at(places, total), inverter, part, index=places)[:2]

        states = (
            x0.to(self.device, torch.float64 if inverter.decode_plan.lattice else torch.float32),
            torch.arange(total),
        )
        encoded = [*microbatch.in_blocks(encode_part, states, self.micro_batch)]
        latents, earlier = (torch.cat([part[which] for part in encoded]) for which in (0, 1))
        return torch.stack([latents, earlier]) if inverter.two_state else latents

    def decode(
        self,
        latents: Tensor,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        method: str = "ddim",
    ) -> Tensor:
        """Decode latents to data, deterministically, see `ddim.Model.decode`.

        Args:
            latents: The result of `encode`.
            steps: S, the number of network evaluations, as passed to `encode`; 50 by default with a named spacing.
            grid: The name of a timestep spacing or an increasing list of timesteps, as passed to `encode`.
            method: The method passed to `encode`.

        Returns:
            float32, (N, ...).

        Raises:
            DdimError: If an argument is out of range, or latents of one state are passed for a two-state method.
        """
        inverter, latents = self.inversion(method, steps, grid), floats(latents, "latents")
        if inverter.two_state and len(latents) != 2:
            raise DdimError("latents", f"of {method} are two states each, (2, N, ...)", "pass the result of `encode`")
        older, first = latents if inverter.two_state else (None, latents)
        if not len(first):
            return first.float()
        current = first.to(self.device, torch.float64 if inverter.decode_plan.lattice else torch.float32)
        previous = () if older is None else (older.to(current),)

        def decode_part(places: Tensor, state: Tensor, *earlier: Tensor) -> tuple[Tensor, ...]:
            return (loop.run(self.at(places, len(current)), inverter.resume_plan, state, earlier=earlier).float(),)

        decoded = microbatch.in_blocks(decode_part, (torch.arange(len(current)), current, *previous), self.micro_batch)
        return torch.cat([part for (part,) in decoded])

    @property
    def _planner(self) -> Planner:
        return Planner(self.schedule, MEANS[self.predicts], self.error, learned=True)


def _check(predicts: str, data_at: int) -> None:
    if predicts not in MEANS:
        raise DdimError(f"predicts {predicts!r}", "is unknown", f"choose one of {', '.join(MEANS)}")
    if data_at not in (0, 1) or (data_at == 1 and predicts != "velocity"):
        raise DdimError(f"data_at {data_at}", f"does not apply to {predicts}", "use 0 or 1, with predicts velocity")


def _as_module(
    module: nn.Module, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[torch.dtype | None, torch.device | None]:
    """Put the module into evaluation mode; take a missing dtype or device from its first parameter."""
    if module.training:
        module.eval()
        warn("wrap: the module was in training mode and is set to evaluation mode")
    first = next(module.parameters(), None)
    if first is None:
        return dtype, device
    return dtype or (first.dtype if first.is_floating_point() else None), device or first.device


def _schedule(value: Schedule | str | Sequence[float] | np.ndarray | Tensor) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        if value not in NAMED:
            raise DdimError(f"schedule {value!r}", "is unknown", f"choose one of {', '.join(NAMED)}, or pass betas")
        schedule: Schedule = NAMED[value]()
        return schedule
    return from_betas(value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value)
