"""Denoising Diffusion Implicit Models: train once, sample in 10-50 network calls, encode, decode, interpolate.

import ddim

model = ddim.load("mnist")
images = model.sample(64, steps=20, seed=0)  # (64, 1, 28, 28), float, nominally in [-1, 1]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddim import (
        bound,
        categorical,
        check,
        data,
        denoiser,
        emulate,
        evaluation,
        exact,
        gaussian,
        grid,
        guidance,
        hooks,
        inference,
        interop,
        latents,
        likelihood,
        loop,
        objective,
        ode,
        plan,
        samplers,
        schedule,
        seeds,
        tuning,
    )
    from ddim.denoiser import Clipped, Guided, Hooked, Prediction
    from ddim.errors import DdimError, DdimWarning
    from ddim.interop.plan_scheduler import PlanScheduler
    from ddim.latents import blend, slerp
    from ddim.loop import Step, trajectory
    from ddim.model import Model, load
    from ddim.plan import Plan, Row
    from ddim.schedule import Level, Schedule
    from ddim.seeds import Noise
    from ddim.wrapping import Wrapped, wrap

__all__ = [
    "Clipped",
    "DdimError",
    "DdimWarning",
    "Guided",
    "Hooked",
    "Level",
    "Model",
    "Noise",
    "Plan",
    "PlanScheduler",
    "Prediction",
    "Row",
    "Schedule",
    "Step",
    "Wrapped",
    "blend",
    "bound",
    "categorical",
    "check",
    "data",
    "denoiser",
    "emulate",
    "evaluation",
    "exact",
    "gaussian",
    "grid",
    "guidance",
    "hooks",
    "inference",
    "interop",
    "latents",
    "likelihood",
    "load",
    "loop",
    "objective",
    "ode",
    "plan",
    "samplers",
    "schedule",
    "seeds",
    "slerp",
    "trajectory",
    "tuning",
    "wrap",
]

# Loaded when first used, so that `import ddim` and `ddim --help` do not wait for torch.
_HOME = {
    "Clipped": "denoiser",
    "Guided": "denoiser",
    "Hooked": "denoiser",
    "Prediction": "denoiser",
    "DdimError": "errors",
    "DdimWarning": "errors",
    "blend": "latents",
    "slerp": "latents",
    "Model": "model",
    "load": "model",
    "Plan": "plan",
    "Row": "plan",
    "Level": "schedule",
    "Schedule": "schedule",
    "Noise": "seeds",
    "PlanScheduler": "interop.plan_scheduler",
    "Wrapped": "wrapping",
    "wrap": "wrapping",
    "Step": "loop",
    "trajectory": "loop",
    "bound": "",
    "categorical": "",
    "check": "",
    "data": "",
    "denoiser": "",
    "emulate": "",
    "evaluation": "",
    "exact": "",
    "gaussian": "",
    "grid": "",
    "guidance": "",
    "hooks": "",
    "inference": "",
    "interop": "",
    "latents": "",
    "likelihood": "",
    "loop": "",
    "objective": "",
    "ode": "",
    "plan": "",
    "samplers": "",
    "schedule": "",
    "seeds": "",
    "tuning": "",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ddim' has no attribute {name!r}")
    module = importlib.import_module(f"ddim.{_HOME[name] or name}")
    value = getattr(module, name) if _HOME[name] else module
    globals()[name] = value
    return value
