"""Settings of a `PlanScheduler`, stored in its JSON file or converted from another scheduler's configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ddim import samplers
from ddim.errors import DdimError, DdimWarning, warn
from ddim.interop import emulate
from ddim.model.importers.diffusers import PREDICTION_TYPES, read_scheduler
from ddim.names import Predicts
from ddim.plan.plan import Plan
from ddim.plan.serialization import json_float
from ddim.process.schedule import Schedule, from_betas
from ddim.process.timesteps import DEFAULT, check, tau
from ddim.process.timesteps import NAMED as GRIDS
from ddim.samplers.registry import Planner, recommended
from ddim.samplers.settings import SamplerSettings

STAGES = {"heun": 2, "rk4": 4}
"""Network evaluations per step, for the samplers with more than one."""
SPACINGS = ("leading", "trailing", "linspace")
SAME = {
    "DDIMScheduler": "diffusers",
    "DDIMParallelScheduler": "diffusers",
    "DDPMScheduler": "diffusers-ddpm",
    "DDPMParallelScheduler": "diffusers-ddpm",
}
"""The emulation that repeats each of these schedulers of diffusers step by step, see `ddim.emulate`."""
_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


class Settings(BaseModel):
    """The settings of a `PlanScheduler`, as stored in a scheduler's file; `PlanScheduler` describes the others.

    Args:
        version: Version of this format.
        log_snr: The schedule, at t = 1..T.
        schedule_name: The schedule's name.
        as_spaced: Whether a named spacing has the timesteps of its formula, as in a converted scheduler; otherwise its
            start depends on what the network predicts, see `ddim.process.start`.
        plan: A fixed plan as JSON, or None.
        emulates: One of the values of `SAME` if plans repeat that scheduler's steps, else "". Then grid, offset and
            clip_x0 are its settings, and eta is the one that stands for 0 in `step`.
        set_alpha_to_one: With emulates "diffusers": whether the last step goes to clean data.
        variance_type: With emulates "diffusers-ddpm": the variance of its steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    log_snr: tuple[float | Literal["-inf"], ...]
    schedule_name: str = "custom"
    predicts: Predicts = "eps"
    sampler: str = "ddim"
    grid: str | tuple[float, ...] = DEFAULT
    offset: int = Field(0, ge=0)
    as_spaced: bool = False
    eta: float = 0.0
    clip_x0: bool = False
    encode: bool = False
    plan: str | None = None
    emulates: Literal["", "diffusers", "diffusers-ddpm"] = ""
    set_alpha_to_one: bool = True
    variance_type: emulate.VarianceType = "fixed_small"

    @field_validator("plan", mode="before")
    @classmethod
    def _as_json(cls, plan: Any) -> Any:
        return plan.to_json() if isinstance(plan, Plan) else plan

    @model_validator(mode="after")
    def _validate(self) -> Settings:
        changed = [name for name in _CHOICES if getattr(self, name) != type(self).model_fields[name].default]
        if self.plan is not None and changed:
            raise ValueError(f"a plan is passed together with {', '.join(changed)}, which it determines")
        known = ("sampler", self.sampler, ("auto", *samplers.SAMPLERS)), ("grid", self.grid, GRIDS)
        for name, value, names in known:
            if isinstance(value, str) and value not in names:
                raise ValueError(f"{name} {value!r} is unknown: choose one of {', '.join(names)}")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"sampler {self.sampler} adds no noise, eta is {self.eta:g}")
        try:
            self.schedule  # raises if log_snr is invalid  # noqa: B018
        except DdimError as error:
            raise ValueError(f"log_snr: {error.problem}") from None
        return self

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return Schedule(np.array([float(value) for value in self.log_snr]), self.schedule_name)

    @cached_property
    def fixed(self) -> Plan | None:
        """The fixed plan, checked against the schedule, or None.

        Warns:
            DdimWarning: If the plan was made for a certain model.
        """
        if self.plan is None:
            return None
        plan = Plan.from_json(self.plan).check_schedule(self.schedule)
        if plan.made_for:
            warn(f"plan {plan.name}: was made for model {plan.made_for[:12]}..., not compared with the pipeline's")
        return plan

    def __str__(self) -> str:
        if self.fixed:
            return f"plan {self.fixed.name}, predicts {self.predicts}"
        grid = self.grid if isinstance(self.grid, str) else f"grid of {len(self.grid)} times"
        options = [f"{name}={getattr(self, name)}" for name in _CHOICES[2:] if getattr(self, name)]
        sampler = f"the steps of {self.emulates}" if self.emulates else f"sampler {self.sampler}"
        grid = "its recommended grid" if self.recommends else grid
        return ", ".join([sampler, grid, *options, f"predicts {self.predicts}"])

    @property
    def recommends(self) -> bool:
        """Whether the sampler and the spacing are those recommended for the number of steps."""
        plain = not self.encode and not (self.clip_x0 and self.predicts != "eps")  # as in `Planner.plan`
        return self.sampler == "auto" and self.grid == DEFAULT and plain

    @property
    def order(self) -> int:
        """Network evaluations per step."""
        return STAGES.get(self.sampler, 1)

    def plan_of(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None = None,
        eta: float | None = None,
        clipped: bool | None = None,
    ) -> Plan:
        """The plan for a number of steps, or over descending diffusers timesteps (t - 1).

        Args:
            steps: The number of steps.
            timesteps: The timesteps instead.
            eta: The eta that is passed to `step`, where another scheduler is emulated.
            clipped: The `use_clipped_model_output` that is passed to `step`, likewise.

        Raises:
            DdimError: If a fixed plan has another number of rows, or the plan evaluates the network at t < 1, or an
                eps network where there is no signal; see `ddim.samplers.registry.Planner.plan`.
        """
        if self.emulates:
            plan = self._emulated(steps, timesteps, eta or self.eta, bool(clipped))
        elif self.fixed is None:
            plan = self._build(steps, timesteps)
        else:
            plan = self.fixed
            if timesteps is not None or steps != len(plan):
                problem = f"has {len(plan)} fixed steps, {steps if timesteps is None else 'other times'} requested"
                raise DdimError(f"plan {plan.name}", problem, f"use num_inference_steps={len(plan)}")
        for k, row in enumerate(plan.rows):
            if row.query.t < 1:
                problem = f"evaluates the network at t = {row.query.t:g}, diffusers' timestep {row.query.t - 1:g}"
                raise DdimError(plan.where(k), problem, "use times >= 1")
            if row.query.signal == 0 and self.predicts == "eps":
                problem = "evaluates eps without signal, where it does not determine x0"
                raise DdimError(plan.where(k), problem, "start at a lower timestep, or use a network that predicts v")
        return plan

    def _emulated(self, steps: int | None, timesteps: Sequence[float] | None, eta: float, clipped: bool) -> Plan:
        settings: dict[str, Any] = {"spacing": self.grid, "steps_offset": self.offset, "clip_sample": self.clip_x0}
        if self.emulates == "diffusers":
            if timesteps is not None:
                problem = "takes no timesteps, only their number"
                raise DdimError("DDIMScheduler", problem, "pass sampler='ddim' to PlanScheduler.from_scheduler")
            settings |= {"set_alpha_to_one": self.set_alpha_to_one, "use_clipped_model_output": clipped, "eta": eta}
        else:
            settings["variance_type"] = self.variance_type
            if timesteps is not None:
                times = check(self.schedule, [float(t) + 1 for t in timesteps][::-1])[::-1]
                return emulate.ddpm_at(self.schedule, times, self.clip_x0, self.variance_type, ["custom timesteps"])
        if steps is None:
            raise DdimError("set_timesteps", "has no number of steps", "pass num_inference_steps")
        return emulate.plan(self.emulates, self.schedule, steps, **settings)

    def _build(self, steps: int | None, timesteps: Sequence[float] | None) -> Plan:
        grid = self.grid
        if timesteps is not None:
            grid, steps = tuple(float(t) + 1 for t in timesteps)[::-1], len(timesteps)
        elif steps is None:
            raise DdimError("set_timesteps", "has no number of steps", "pass num_inference_steps")
        elif self.offset or (self.as_spaced and isinstance(grid, str)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DdimWarning)  # the shifted timesteps are checked below
                grid = tuple(t + self.offset for t in tau(self.schedule, grid, steps))
            steps = len(grid)
        return self._plan_on(grid, steps)

    def check_step(self, eta: float, clipped: bool | None, plan: Plan) -> None:
        """Check the arguments that a pipeline passes to `step` against the plan.

        Raises:
            DdimError: If eta is neither 0 nor the settings' eta, or the plan treats eps differently when clipping.
        """
        if self.emulates == "diffusers" and not (eta and self.eta):
            return  # both are arguments of that scheduler's `step`
        if eta and (eta != self.eta or self.fixed):
            reason = "a fixed plan has its own noise" if self.fixed else f"the scheduler's is {self.eta:g}"
            raise DdimError(f"eta {eta:g}", f"is passed to step, {reason}", "set it when the scheduler is created")
        if plan.clip_x0 and clipped is plan.eps_kept:
            behaviour = "leaves eps as predicted" if plan.eps_kept else "derives eps again from the clipped x0"
            problem = f"is passed to step, the plan {behaviour}"
            raise DdimError(f"use_clipped_model_output {clipped}", problem, "remove it")

    def starts(self, plan: Plan) -> list[int]:
        """The indices of the rows that begin a step of a plan."""
        return [k for k, row in enumerate(plan.rows) if self.order == 1 or row.memory == 1]

    def remaining(self, plan: Plan, row: int) -> Plan:
        """The plan of a run that starts at a row, without the states of earlier rows.

        A sampler's plan is rebuilt over the remaining levels. Of a fixed plan, and of one that encodes, the remaining
        rows are used, which must not depend on earlier ones.

        Raises:
            DdimError: If they do, or the row is in the middle of a step.
        """
        if row == 0:
            return plan
        starts = self.starts(plan)
        if row not in starts:
            problem = "is in the middle of a step"
            raise DdimError(plan.where(row), problem, f"start at one of the rows {_first_few(starts)}")
        if self.plan is None and not self.encode and not self.emulates:
            times = tuple(plan.rows[k].now.t for k in reversed(starts) if k >= row)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DdimWarning)  # it starts below T on purpose
                return self._plan_on(times, len(times), self._sampler(len(starts)))
        for available, later in enumerate(plan.rows[row:], start=1):
            if later.memory > available:
                problem = f"uses steps before row {row}, where this run starts"
                hint = "start at row 0, or pass a sampler's name to PlanScheduler, whose plan is rebuilt"
                raise DdimError(plan.where(row + available - 1), problem, hint)
        return replace(plan, rows=plan.rows[row:], before=())

    def _sampler(self, steps: int) -> str:
        """The sampler's name; "auto" with a spacing of its own is the recommended one."""
        return recommended(steps, self.schedule, self.predicts)[0] if self.recommends else self.sampler

    def _plan_on(self, grid: str | tuple[float, ...], steps: int, sampler: str | None = None) -> Plan:
        planner = Planner(self.schedule, self.predicts)
        if self.recommends and grid == DEFAULT:
            sampler, grid = recommended(steps, self.schedule, self.predicts)
        settings = SamplerSettings(
            steps=steps,
            grid=grid,
            eta=self.eta,
            clip_x0=self.clip_x0,
            encode=self.encode,
            sampler=sampler or self.sampler,
        )
        return planner.plan(settings)

    def public(self) -> dict[str, Any]:
        """The settings under diffusers' names, for pipelines and for `from_config` of other schedulers.

        Returns:
            diffusers' names to values; the complete settings are under "_ddim".
        """
        return {
            "num_train_timesteps": self.schedule.T,
            "trained_betas": [float(beta) for beta in self.schedule.betas],
            "prediction_type": PREDICTION_TYPES[self.predicts],
            "clip_sample": self.fixed.clip_x0 if self.fixed else self.clip_x0,
            "set_alpha_to_one": self.set_alpha_to_one,
            **({"variance_type": self.variance_type} if self.emulates == "diffusers-ddpm" else {}),
            **({} if self.emulates else {"plan_scheduler": _CONVERTED}),
            **({"timestep_spacing": self.grid} if self.grid in SPACINGS else {}),
            **({"steps_offset": self.offset} if self.offset else {}),
            "_ddim": self.model_dump(mode="json"),
        }


_CONVERTED = "it was a ddim.PlanScheduler; pipe.scheduler = ddim.PlanScheduler.from_config(pipe.scheduler.config)"
"""Not an argument of diffusers' schedulers: they print it when a pipeline converts the scheduler to one of them."""
_CHOICES = ("sampler", "grid", "offset", "eta", "clip_x0", "encode")


def log_snr_of(schedule: Schedule) -> tuple[Any, ...]:
    """The value of `Settings.log_snr` for a schedule."""
    return tuple(json_float(float(value)) for value in schedule.log_snr)


def convert_config(
    config: Mapping[str, Any],
    table: np.ndarray | None,
    what: str,
    chosen: Mapping[str, Any],
    emulates: str = "",
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Convert another scheduler's configuration to values of `Settings`.

    Args:
        config: The configuration.
        table: The scheduler's `alphas_cumprod`, (T,), or None if only the configuration is available.
        what: The scheduler's name in messages.
        chosen: Values of `Settings` that override the configuration; None for no override.
        emulates: The emulation that repeats this scheduler, used if nothing but eta overrides it.

    Returns:
        The values, including the overrides, and a note on every setting that was mapped.

    Raises:
        DdimError: If plans do not support a setting.

    Warns:
        DdimWarning: If the scheduler's last step does not end at clean data.
    """
    by_sampler = chosen.get("plan") is None
    same = bool(emulates) and not overridden(chosen)
    if config.get("thresholding"):
        raise DdimError(what, "has thresholding, which plans do not support", "set it to False")
    if config.get("use_flow_sigmas") or not {"beta_schedule", "trained_betas"} & config.keys():
        raise DdimError(what, "has no betas, so it is another noise process", "keep the pipeline's scheduler")
    schedule, predicts, notes = _schedule_of(config, table, what, same)
    values: dict[str, Any] = {"log_snr": log_snr_of(schedule), "schedule_name": schedule.name, "predicts": predicts}
    if by_sampler and chosen.get("clip_x0") is None and config.get("clip_sample"):
        if config.get("clip_sample_range", 1.0) != 1:
            problem = f"clips to {config['clip_sample_range']:g}, plans to 1"
            raise DdimError(f"{what}: clip_sample_range", problem, "pass clip_x0=True or clip_x0=False")
        values["clip_x0"] = True
        notes.append("clip_sample: x0 clipped to [-1, 1]" + ("" if same else ", eps derived again from it"))
    elif config.get("clip_sample"):
        notes.append("clip_sample: not used, as requested")
    if by_sampler and chosen.get("grid") is None and chosen.get("sampler") != "auto":
        values |= _grid(config, what, notes)
    if same:
        key = {"diffusers": "set_alpha_to_one", "diffusers-ddpm": "variance_type"}[emulates]
        values |= {"emulates": emulates, key: config.get(key, Settings.model_fields[key].default)}
        if key == "variance_type" and values[key] not in get_args(emulate.VarianceType):
            hint = "pass a sampler's name, or sampler='auto'"
            raise DdimError(f"{what}: variance_type", f"{values[key]} is not supported", hint)
        notes += [f"{key}: {values[key]}", f"sampler: the steps of {what}"]
        return values | {"eta": chosen.get("eta") or 0.0}, tuple(notes)
    if not config.get("set_alpha_to_one", True) or config.get("final_sigmas_type", "zero") != "zero":
        notes.append("last step: to clean data, not to t = 1")
        warn(f"{what}: its last step ends at t = 1; plans end at clean data, t = 0")
    notes.append(f"sampler: {chosen.get('sampler') or 'ddim'}" if by_sampler else "sampler: the fixed plan")
    return values | {key: value for key, value in chosen.items() if value is not None}, tuple(notes)


def overridden(chosen: Mapping[str, Any]) -> bool:
    """Whether settings other than eta are passed, so that the steps are not those of the other scheduler."""
    return any(value is not None for name, value in chosen.items() if name != "eta")


def _schedule_of(
    config: Mapping[str, Any], table: np.ndarray | None, what: str, same: bool
) -> tuple[Schedule, str, list[str]]:
    """The schedule, prediction type and notes of a configuration.

    The schedule is computed in float64 from its formula if that agrees with the float32 table, else from the table;
    from the table in any case if `same`, because the steps then agree to float32's rounding.
    """
    betas = config.get("trained_betas")
    values = {**config, "trained_betas": None if betas is None else [float(beta) for beta in betas]}
    described, predicts, notes = read_scheduler(values, Path(what))
    schedule = described.build()
    if table is None:
        return schedule, predicts, notes
    alike = table.shape == (schedule.T,) and np.allclose(schedule.alpha_bar[1:], table, rtol=2e-3, atol=1e-6)
    if alike and not same:
        return schedule, predicts, notes
    before = np.concatenate([[1.0], table[:-1]])
    if not alike:
        notes[0] = f"schedule: its table alphas_cumprod, T = {len(table)}, which is not that of its configuration"
    return from_betas(1 - table / before, schedule.name if alike else "alphas_cumprod"), predicts, notes


def _grid(config: Mapping[str, Any], what: str, notes: list[str]) -> dict[str, Any]:
    """The values of `Settings` for a configuration's timestep spacing."""
    for name in _SIGMAS:
        if config.get(name):
            raise DdimError(f"{what}: {name}", "is an unsupported grid", "pass a grid such as 'log-snr'")
    spacing = config.get("timestep_spacing")
    if spacing not in SPACINGS:
        notes.append(f"grid: {DEFAULT}, as it has none")
        return {}
    offset = config.get("steps_offset", 0) if spacing == "leading" else 0
    notes.append(f"timestep_spacing: grid {spacing}" + (f", each time {offset} later" if offset else ""))
    return {"grid": spacing, "offset": offset, "as_spaced": True}


def _first_few(rows: Sequence[int]) -> str:
    return ", ".join(str(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
