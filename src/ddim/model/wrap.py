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

from ddim._io.arguments import floats, suggest_names, whole
from ddim.errors import DdimError, warn
from ddim.model.denoisers import MEANS, ExternalDenoiser, Output, Time, teller
from ddim.model.devices import usable
from ddim.model.runner import Runner
from ddim.nn.base import Network
from ddim.plan.base import BasePlan
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.parameterization import AnyDenoiser
from ddim.process.rng import Noise
from ddim.process.schedule import NAMED, Level, Schedule, from_betas
from ddim.samplers.registry import Planner
from ddim.samplers.settings import STEPS, SamplerSettings
from ddim.sampling import loop, microbatch
from ddim.sampling.guidance import Guidance


@suggest_names
def wrap(
    module: Callable[..., Any],
    schedule: Schedule | str | Sequence[float] | np.ndarray | Tensor,
    *,
    predicts: Output,
    shape: Sequence[int] | None = None,
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
        shape: Shape of one sample, such as (C, H, W); it can be passed to `sample` instead.
        time: The time passed to the module: a name from the table above, or a function of the level. By default
            "index", the time that training passes (see `ddim.objective.mse.Objective.loss`), but "sigma" for edm,
            "flow" for velocity and "index+1" for a bundled network.
        data_at: 1 for a velocity x_0 - eps, from a library in which time 1 is the data.
        dtype: The dtype of the module's input; by default that of its first parameter. The module itself is not cast.
        device: The device of the module's input; by default that of its first parameter. The module itself is not
            moved.
        time_dtype: The dtype of the time; by default int64 for an integer index, else float32 (float64 if the input
            is float64).
        micro_batch: The number of samples per module call when sampling; the last call is padded to it. By default it
            follows from the number of values per sample and the device: on a CPU 1024 for points in the plane, 64 for
            64 values, 8 from 512 values on; on a GPU more, see `ddim.sampling.microbatch.size_of`.
        error: E ||eps - eps_theta||^2 / d at a level, for sigma "optimal".
        conditioning: Keyword arguments of every call, see `Wrapped.with_conditioning`.

    Raises:
        DdimError: If an argument is invalid.

    Warns:
        DdimWarning: If the module was in training mode; it is put into evaluation mode.
    """
    _check(predicts, data_at)
    noise_schedule, place = schedule_of(schedule), None if device is None else usable(device)
    default = {"edm": "sigma", "velocity": "flow"}.get(predicts, "index+1" if isinstance(module, Network) else "index")
    time_name = default if time is None else time
    tell = time_name if callable(time_name) else teller(time_name, noise_schedule.T, data_at)
    if isinstance(module, nn.Module):
        dtype, place = _as_module(module, dtype, place)
    size = None if micro_batch is None else microbatch.size_of(micro_batch, place)
    counts, sign, keywords = time_name in ("index", "index+1"), -1.0 if data_at else 1.0, dict(conditioning or {})
    arguments = (module, predicts, tell, dtype, place, time_dtype, counts, sign, keywords)
    sizes = None if shape is None else tuple(whole(size, "shape", 1) for size in shape)
    return Wrapped(*arguments, schedule=noise_schedule, shape=sizes, error=error, micro_batch=size)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Wrapped(ExternalDenoiser, Runner):
    """A wrapped network, the result of `wrap`: a denoiser with plans, sampling, encoding and decoding.

    Args:
        schedule: The noise schedule.
        shape: Shape of one sample; None if it is passed to `sample`.
        error: E ||eps - eps_theta||^2 / d at a level, for sigma "optimal".
        micro_batch: The number of samples per network evaluation; None if it follows from the shape of a sample.
            Either way it is fixed, so that a sample's bits do not depend on other samples.
    """

    schedule: Schedule
    shape: tuple[int, ...] | None = None
    error: Callable[[Level], float] | None = None
    micro_batch: int | None = None

    def __repr__(self) -> str:
        shape = "" if self.shape is None else f", shape={self.shape}"
        return f"Wrapped({type(self.module).__name__}, predicts {self.predicts}, T={self.schedule.T}{shape})"

    def plan_of(self, settings: SamplerSettings, default: int = STEPS) -> Plan:
        """The plan of settings, see `Runner.plan`.

        Raises:
            DdimError: As for `Runner.plan`, or if the network cannot be evaluated at a level without signal.
        """
        plan = self.planner.plan(settings, default)
        for row in plan.rows:
            self.check_signal(row.query)
        return plan

    def trajectory(
        self, plan: Plan, start: Tensor | Noise, noise: Noise | None = None, earlier: Sequence[Tensor] = ()
    ) -> Iterator[loop.Step[Row]]:
        """Run a plan step by step: `ddim.trajectory` with this network."""
        yield from loop.trajectory(self, plan, start, noise, earlier)

    @property
    def planner(self) -> Planner:
        """Creates the plans of this network."""
        return Planner(self.schedule, MEANS[self.predicts], self.error, learned=True)

    def denoiser_of(
        self, n: int, labels: Sequence[int] | None, guidance: Guidance | None
    ) -> tuple[Callable[[Tensor], AnyDenoiser], bool]:
        """The denoisers of a run of n samples, see `Runner.denoiser_of`.

        Raises:
            DdimError: If labels or guidance are passed.
        """
        if labels is not None:
            raise DdimError("labels", "are not used by a wrapped network", "pass them by with_conditioning")
        if guidance is not None:
            raise DdimError("guidance", "needs the network's other conditioning", "pass through=, see ddim.Guided")
        if not self.conditioning:
            return lambda positions: self, False
        return lambda positions: self.at(positions, n), True

    def noise_of(self, indices: Sequence[int], seed: int, shape: Sequence[int]) -> Noise:
        """The noise of the samples with these indices."""
        return Noise(seed, tuple(indices), tuple(shape), self.device or "cpu")

    def check_plan(self, plan: BasePlan[Any], to_clean: bool = False) -> None:
        """Check that a plan can be run with this network, see `Runner.check_plan`."""
        if not isinstance(plan, Plan):
            raise DdimError(f"plan {plan.name}", "is over discrete data", "use a plan of this network")
        plan.check_schedule(self.schedule, to_clean)

    def read(self, data: Tensor | np.ndarray) -> Tensor:
        """Check data: float, (N, ...)."""
        return floats(data, "data to encode", self.shape)


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


def schedule_of(value: Schedule | str | Sequence[float] | np.ndarray | Tensor) -> Schedule:
    """The schedule itself, that of a name, or that of betas (T,).

    Raises:
        DdimError: If it is none of these.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        if value not in NAMED:
            raise DdimError(f"schedule {value!r}", "is unknown", f"choose one of {', '.join(NAMED)}, or pass betas")
        schedule: Schedule = NAMED[value]()
        return schedule
    return from_betas(value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value)
