"""A diffusers scheduler that runs any plan over real-valued data in diffusers' own pipelines.

pipe.scheduler = ddim.PlanScheduler.from_scheduler(pipe.scheduler, sampler="auto")
pipe("a horse", num_inference_steps=10)

Without `sampler`, it repeats the steps of the pipeline's own scheduler. Set `pipe.scheduler` after the pipeline was
created or loaded: `DDIMPipeline` converts the scheduler that it is created with to a `DDIMScheduler`, which prints how
to restore it. Diffusers counts timesteps from 0: its timestep is t - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ddim.errors import DdimError
from ddim.interop.scheduler_settings import SAME, Settings, convert_config, log_snr_of, overridden
from ddim.interop.scheduler_state import RunState
from ddim.model import config as configs
from ddim.names import Predicts
from ddim.plan.plan import Plan
from ddim.process.gaussian import diffuse
from ddim.process.schedule import Schedule
from ddim.process.timesteps import DEFAULT

try:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as _error:
    _problem = f"needs diffusers, which cannot be imported ({str(_error).splitlines()[0]})"
    raise DdimError("PlanScheduler", _problem, "pip install 'ddim[interop]'") from None

Generators = torch.Generator | list[torch.Generator] | None


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A diffusers scheduler for a fixed plan, or for a sampler's name, which builds a plan for each number of steps.

    Steps are counted, not looked up by timestep, because a timestep may occur twice. The states and predictions that
    later rows use are stored here, in at least float32, and in float64 for a plan with a lattice; the caller gets a
    copy in the sample's dtype, see `states`. Samplers with several network evaluations per step have `order` above 1,
    as in diffusers. `notes` lists every setting that `from_scheduler` mapped.

    Args:
        schedule: The noise schedule of the network.
        sampler: One of `ddim.samplers.SAMPLERS`, or "auto" for the sampler and the spacing that
            `ddim.samplers.recommended` names for the number of steps.
        grid: The name of a spacing (see `ddim.timesteps`), or ascending timesteps in 1..T.
        eta: For sampler "ddim": 0 is DDIM, 1 is DDPM. A pipeline must pass the same eta, or 0 (its default), to `step`.
        predicts: What the network predicts: "eps", "x0" or "v".
        clip_x0: Whether each predicted x_0 is clipped to [-1, 1], and eps derived from the clipped x_0.
        encode: Whether plans go from clean data to noise.
        offset: Added to all timesteps of a named spacing; diffusers' steps_offset.
        plan: A fixed plan instead of sampler, grid, offset, eta, clip_x0 and encode.

    Raises:
        DdimError: If the plan does not fit the schedule, or settings contradict each other.

    Warns:
        DdimWarning: If the plan was made for a certain model, which cannot be compared with the pipeline's network.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012
    init_noise_sigma = 1.0

    def __init__(
        self,
        schedule: Schedule,
        sampler: str = "ddim",
        grid: str | Sequence[float] = DEFAULT,
        eta: float = 0.0,
        predicts: Predicts = "eps",
        clip_x0: bool = False,
        encode: bool = False,
        offset: int = 0,
        plan: Plan | None = None,
    ):
        if not isinstance(schedule, Schedule) or not (plan is None or isinstance(plan, Plan)):
            kind = type(schedule if not isinstance(schedule, Schedule) else plan).__name__
            problem = f"got a {kind} instead of a schedule or a plan over real-valued data"
            raise DdimError("PlanScheduler", problem, "see ddim.schedule and ddim.Plan, or use from_scheduler")
        values: dict[str, Any] = {"log_snr": log_snr_of(schedule), "schedule_name": schedule.name, "sampler": sampler}
        values |= {"grid": grid, "eta": eta, "predicts": predicts, "clip_x0": clip_x0, "encode": encode}
        values |= {"offset": offset, "plan": plan}
        self._set_up(configs.build(Settings, values, "PlanScheduler"))

    def _set_up(self, settings: Settings, notes: tuple[str, ...] = ()) -> None:
        self.settings, self.notes, self.schedule = settings, notes, settings.schedule
        self.alphas_cumprod = torch.from_numpy(self.schedule.alpha_bar[1:]).float()
        self.final_alpha_cumprod = torch.tensor(1.0) if settings.set_alpha_to_one else self.alphas_cumprod[0]
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.schedule.T - 1, -1, -1)
        self._run_state: RunState | None = None
        self._initial_states: list[Tensor] | None = None
        self.register_to_config(**settings.public())  # type: ignore[no-untyped-call]
        if settings.fixed is not None:
            self.set_timesteps(len(settings.fixed))

    @classmethod
    def _of(cls, values: Mapping[str, Any], notes: tuple[str, ...] = ()) -> PlanScheduler:
        scheduler = cls.__new__(cls)
        scheduler._set_up(configs.build(Settings, dict(values), "PlanScheduler"), notes)
        return scheduler

    @classmethod
    def from_scheduler(
        cls,
        other: Any,
        sampler: str | None = None,
        grid: str | Sequence[float] | None = None,
        eta: float | None = None,
        clip_x0: bool | None = None,
        encode: bool | None = None,
        plan: Plan | None = None,
    ) -> PlanScheduler:
        """The same sampler as another diffusers scheduler, or another sampler for its noise schedule and network.

        Without further arguments (but eta), the steps are those of the other `DDIMScheduler` or `DDPMScheduler` up to
        float32 rounding: the same timesteps, the levels that it steps to, its clipping, and what it does with eps. With
        any other argument, they are those of a sampler of this package, and x_0 is clipped as the other does, with eps
        derived again from it. `notes` lists the settings.

        Args:
            other: The scheduler, such as `pipe.scheduler`.
            sampler: One of `ddim.samplers.SAMPLERS`, or "auto" for the sampler and the spacing that
                `ddim.samplers.recommended` names for the number of steps. "ddim" if only later arguments are passed.
            grid: The name of a spacing, or ascending timesteps in 1..T; by default the other's timestep spacing.
            eta: Of the other's steps or for sampler "ddim"; by default 0.
            clip_x0: Whether x_0 is clipped to [-1, 1]; by default as the other scheduler.
            encode: Whether plans go from clean data to noise; by default False.
            plan: A fixed plan instead.

        Raises:
            DdimError: If plans do not support a setting (thresholding, flow matching, clipping to another range), or no
                argument is passed for a scheduler whose steps are not among those that can be repeated.

        Warns:
            DdimWarning: If the other's last step does not end at clean data, and the sampler's does.
        """
        if isinstance(other, PlanScheduler):
            problem = "is a PlanScheduler already"
            raise DdimError("from_scheduler", problem, "use PlanScheduler.from_config(scheduler.config, ...)")
        table = getattr(other, "alphas_cumprod", None)
        if table is None or not hasattr(other, "config"):
            problem = "has no table of alpha_bar, so it is another noise process"
            raise DdimError(type(other).__name__, problem, "keep the pipeline's scheduler")
        chosen = {"sampler": sampler, "grid": grid, "eta": eta, "clip_x0": clip_x0, "encode": encode, "plan": plan}
        name = type(other).__name__
        if name not in SAME and not overridden(chosen):
            raise DdimError(name, f"is not one of {', '.join(SAME)}", "pass sampler='auto', or a sampler's name")
        return cls._of(*convert_config(other.config, table.double().cpu().numpy(), name, chosen, SAME.get(name, "")))

    @override
    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Create a scheduler from the configuration of a `PlanScheduler` or of another diffusers scheduler.

        A configuration does not contain its scheduler's class, so the sampler is "ddim" by default: `from_scheduler`
        repeats the steps of the scheduler.

        Args:
            config: The configuration.
            return_unused_kwargs: Whether to return an empty dict as well.
            kwargs: Settings that override the configuration.

        Raises:
            DdimError: If the configuration is damaged, or as `from_scheduler`.
        """
        stored = config.get("_ddim")
        if isinstance(stored, Mapping):
            changed: dict[str, Any] = {"as_spaced": False} if "grid" in kwargs else {}
            changed |= {"emulates": ""} if overridden(kwargs) else {}
            scheduler = cls._of({**stored, **changed, **kwargs})
        else:
            name = str(config.get("_class_name", "the configuration"))
            scheduler = cls._of(*convert_config(config, None, name, kwargs))
        return (scheduler, {}) if return_unused_kwargs else scheduler

    def __repr__(self) -> str:
        return f"PlanScheduler({self.settings}, schedule {self.schedule.name}, T = {self.schedule.T})"

    def __len__(self) -> int:
        return self.schedule.T

    @property
    def order(self) -> int:
        """Network evaluations per step: 2 for "heun", 4 for "rk4"; 1 for a fixed plan, whose steps are its rows."""
        return self.settings.order

    @property
    def begin_index(self) -> int | None:
        """The row set by `set_begin_index`."""
        return self._run_state.begin if self._run_state else None

    @property
    def step_index(self) -> int | None:
        """The next row to run; None before the first step."""
        return self._run_state.index if self._run_state else None

    @property
    def plan(self) -> Plan:
        """The plan of the current run, from its first row on.

        Raises:
            DdimError: If `set_timesteps` was not called.
        """
        return self._current().run.plan

    @property
    def states(self) -> tuple[Tensor, ...]:
        """The last states, newest first, (N, ...) each, in full precision; pass them to `set_states` to continue.

        The first two are the latent of a reversible plan; to decode it, pass them in reverse order.
        """
        return tuple(self._current().run.states)

    def set_states(self, states: Sequence[Tensor]) -> None:
        """Set the initial states of the next run, for a plan that needs two, or exact states on a lattice.

        Args:
            states: Newest first, (N, ...) each: the initial sample, in any dtype, and one older state for each level of
                `plan.before`. They are used for one run, whether set before or after `set_timesteps`.
        """
        self._initial_states = list(states)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Build the plan for a number of steps, and start a new run.

        Args:
            num_inference_steps: S. For a fixed plan, its number of rows.
            device: The device of `timesteps`.
            timesteps: Descending diffusers timesteps (t - 1), instead of `num_inference_steps`.

        Raises:
            DdimError: If a fixed plan has another number of steps; see `ddim.timesteps.tau` and the samplers.
        """
        plan = self.settings.plan_of(num_inference_steps, timesteps)
        times = (run_state := RunState(self.settings, plan, num_inference_steps, timesteps)).times
        whole = all(t == int(t) for t in times)
        self.timesteps = torch.tensor(times, dtype=torch.int64 if whole else torch.float32, device=device)
        self.num_inference_steps = len(self.settings.starts(plan))
        self._run_state = run_state

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at a row, as image-to-image pipelines do.

        A sampler's plan is rebuilt over the remaining levels, so that multistep rows do not need steps that were not
        run. Without this call, the run starts at the timestep passed to the first `step`.

        Args:
            begin_index: The row, 0 for the first.

        Raises:
            DdimError: If there is no such row, it is in the middle of a step, or a fixed plan's rows need earlier ones.
        """
        self._current().begin_at(int(begin_index))

    def _current(self) -> RunState:
        if self._run_state is None:
            raise DdimError("PlanScheduler", "has no timesteps", "call set_timesteps first")
        return self._run_state

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample unchanged."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Run the next row of the plan.

        Args:
            model_output: The network's output at the sample and timestep, (N, C, ...), or (N, 2 C, ...) with a
                variance.
            timestep: The next of `timesteps`. The first step without `set_begin_index` may start at a later one.
            sample: The state, (N, C, ...), as returned by the last step.
            eta: 0, which stands for the scheduler's eta, or that eta. Where the steps are those of a `DDIMScheduler`,
                any eta if the scheduler's is 0.
            use_clipped_model_output: None, or what the plan does: True unless `Plan.eps_kept`. Where the steps are
                those of a `DDIMScheduler`, as for that.
            generator: Generator of the row's noise, if it adds any; None for the global one, as in diffusers.
            variance_noise: The noise itself, standard normal, (N, C, ...), instead of a generator.
            return_dict: Whether to return a `DDIMSchedulerOutput` instead of a tuple.

        Returns:
            `prev_sample` and `pred_original_sample`, in the sample's dtype.

        Raises:
            DdimError: If a step is out of order or after the last, or an argument contradicts the plan.
        """
        self.settings.check_step(eta, use_clipped_model_output, self.plan)
        self._current().follow(eta, use_clipped_model_output)
        run = self._current().at(float(timestep))
        begins = not run.states
        run.enter(sample, self._initial_states if begins else None)
        fresh = variance_noise
        if run.row.draws and fresh is None:
            fresh = randn_tensor(sample.shape, generator, sample.device, model_output.dtype)
        state, prediction = run.leave(model_output, fresh)
        self._initial_states = None if begins else self._initial_states
        output = state.to(sample.dtype), prediction.x0.to(sample.dtype)
        return DDIMSchedulerOutput(*output) if return_dict else output

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to clean data at diffusers timesteps.

        Args:
            original_samples: Clean data, (N, ...).
            noise: Standard normal, the same shape.
            timesteps: (N,) or (1,), t - 1.

        Returns:
            x_t, in the shape of the data.

        Raises:
            DdimError: If a timestep is outside the schedule.
        """
        levels = [self.schedule.level(float(t) + 1) for t in timesteps.reshape(-1).tolist()]
        if len({*levels}) == 1:
            return diffuse(original_samples, noise, levels[0])
        each = zip(original_samples, noise, levels, strict=True)
        return torch.stack([diffuse(*sample) for sample in each])
