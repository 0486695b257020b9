"""Denoising Diffusion Implicit Models: train once, sample in 10-50 network evaluations, encode, decode, interpolate.

import ddim

model = ddim.load("mnist")
images = model.sample(64, steps=20, seed=0)  # (64, 1, 28, 28), float, nominally in [-1, 1]
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddim import check as check
    from ddim import data as data
    from ddim import evaluation as evaluation
    from ddim import exact as exact
    from ddim import interop as interop
    from ddim import model as model
    from ddim import nn as nn
    from ddim import objective as objective
    from ddim import plan as plan
    from ddim import process as process
    from ddim import samplers as samplers
    from ddim import sampling as sampling
    from ddim import train as train
    from ddim.data import pixels as pixels
    from ddim.data.pixels import to_pil as to_pil
    from ddim.data.pixels import to_uint8 as to_uint8
    from ddim.errors import DdimError as DdimError
    from ddim.errors import DdimWarning as DdimWarning
    from ddim.evaluation import likelihood as likelihood
    from ddim.interop import emulate as emulate
    from ddim.interop import export as export
    from ddim.interop.diffusers_scheduler import PlanScheduler as PlanScheduler
    from ddim.model import precision as precision
    from ddim.model.importers.types import CheckpointHints as CheckpointHints
    from ddim.model.load import load as load
    from ddim.model.model import Model as Model
    from ddim.model.wrap import Wrapped as Wrapped
    from ddim.model.wrap import wrap as wrap
    from ddim.objective import elbo as elbo
    from ddim.plan.base import Hooked as Hooked
    from ddim.plan.categorical import CategoricalPlan as CategoricalPlan
    from ddim.plan.plan import Plan as Plan
    from ddim.plan.row import Row as Row
    from ddim.process import categorical as categorical
    from ddim.process import gaussian as gaussian
    from ddim.process import joint as joint
    from ddim.process import ode as ode
    from ddim.process import parameterization as parameterization
    from ddim.process import rng as rng
    from ddim.process import schedule as schedule
    from ddim.process import timesteps as timesteps
    from ddim.process.parameterization import Prediction as Prediction
    from ddim.process.rng import Noise as Noise
    from ddim.process.schedule import Level as Level
    from ddim.process.schedule import Schedule as Schedule
    from ddim.sampling import guidance as guidance
    from ddim.sampling import inversion as inversion
    from ddim.sampling import latents as latents
    from ddim.sampling import loop as loop
    from ddim.sampling import parallel as parallel
    from ddim.sampling import tuning as tuning
    from ddim.sampling import x0_hooks as x0_hooks
    from ddim.sampling.guidance import Guided as Guided
    from ddim.sampling.latents import blend as blend
    from ddim.sampling.latents import slerp as slerp
    from ddim.sampling.loop import Step as Step
    from ddim.sampling.loop import trajectory as trajectory
    from ddim.sampling.x0_hooks import Clipped as Clipped
    from ddim.train.from_python import fit as fit

# Loaded on first use, so that `import ddim` and `ddim --help` do not load torch.
_SYMBOLS = {
    "CategoricalPlan": "plan.categorical",
    "CheckpointHints": "model.importers.types",
    "Clipped": "sampling.x0_hooks",
    "DdimError": "errors",
    "DdimWarning": "errors",
    "Guided": "sampling.guidance",
    "Hooked": "plan.base",
    "Level": "process.schedule",
    "Model": "model.model",
    "Noise": "process.rng",
    "Plan": "plan.plan",
    "PlanScheduler": "interop.diffusers_scheduler",
    "Prediction": "process.parameterization",
    "Row": "plan.row",
    "Schedule": "process.schedule",
    "Step": "sampling.loop",
    "Wrapped": "model.wrap",
    "blend": "sampling.latents",
    "fit": "train.from_python",
    "load": "model.load",
    "slerp": "sampling.latents",
    "to_pil": "data.pixels",
    "to_uint8": "data.pixels",
    "trajectory": "sampling.loop",
    "wrap": "model.wrap",
}
_MODULES = {
    "categorical": "process.categorical",
    "check": "check",
    "data": "data",
    "elbo": "objective.elbo",
    "emulate": "interop.emulate",
    "evaluation": "evaluation",
    "exact": "exact",
    "export": "interop.export",
    "gaussian": "process.gaussian",
    "guidance": "sampling.guidance",
    "interop": "interop",
    "inversion": "sampling.inversion",
    "joint": "process.joint",
    "latents": "sampling.latents",
    "likelihood": "evaluation.likelihood",
    "loop": "sampling.loop",
    "model": "model",
    "nn": "nn",
    "objective": "objective",
    "ode": "process.ode",
    "parallel": "sampling.parallel",
    "parameterization": "process.parameterization",
    "pixels": "data.pixels",
    "plan": "plan",
    "precision": "model.precision",
    "process": "process",
    "rng": "process.rng",
    "samplers": "samplers",
    "sampling": "sampling",
    "schedule": "process.schedule",
    "timesteps": "process.timesteps",
    "train": "train",
    "tuning": "sampling.tuning",
    "x0_hooks": "sampling.x0_hooks",
}
# Names of modules in earlier versions, and what has them now: `ddim.pixels` and `import ddim.pixels` go on to work.
_RENAMED = {
    "bound": "objective.elbo",
    "denoiser": "process.parameterization",
    "grid": "process.timesteps",
    "hooks": "sampling.x0_hooks",
    "inference": "process.joint",
    "seeds": "process.rng",
}
__all__ = [*_SYMBOLS, *_MODULES, "__version__"]


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets imports of the short names above, such as `ddim.pixels`, find the modules where the tree has them."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        home = (_MODULES | _RENAMED).get(name, name) if package == "ddim" else name
        return None if home == name else ModuleSpec(fullname, self, origin=f"ddim.{home}")

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # the import system has put the alias's there


sys.meta_path.append(_Alias())


def __getattr__(name: str) -> Any:
    if name in _SYMBOLS:
        value = getattr(importlib.import_module(f"ddim.{_SYMBOLS[name]}"), name)
    elif home := (_MODULES | _RENAMED).get(name):
        value = importlib.import_module(f"ddim.{home}")
    else:
        raise AttributeError(f"module 'ddim' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
