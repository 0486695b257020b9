"""Modules that are traced for export: a network, a sampler, and a sampler in two parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from typing_extensions import override

from ddim.errors import DdimError
from ddim.model.denoisers import OutputFn
from ddim.nn.base import Network
from ddim.plan.plan import Plan
from ddim.process.schedule import Level
from ddim.sampling.loop import run


class NetworkProgram(nn.Module):
    """A network as a function of x_t (N, ...), t (N,) in 1..T and labels (N,); a predicted variance is dropped."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    @override
    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        output: Tensor = self.network(x, t, labels)
        return output if output.shape[1] == x.shape[1] else output.chunk(2, dim=1)[0]


class SamplerProgram(nn.Module):
    """A sampler, from x_T (N, C, H, W) and labels (N,) to x_0: a plan without noise, run on a network."""

    def __init__(self, network: Network, hub: OutputFn[Any], plan: Plan):
        super().__init__()
        self.network, self.hub, self.plan = network, hub, plan
        self.times = list(dict.fromkeys(row.query.t for row in plan.rows))
        with torch.no_grad():
            self.unlabelled_conditions = [network.condition(torch.tensor([t], dtype=torch.float32)) for t in self.times]

    @override
    def forward(self, x_T: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.through(self.network.body, x_T, self.conditions(labels))

    def conditions(self, labels: Tensor | None) -> list[Tensor]:
        """The network's conditions, which depend on time and labels only, for each of `times`."""
        if labels is None:
            return self.unlabelled_conditions
        return [self.network.condition(torch.full_like(labels, t, dtype=torch.float32), labels) for t in self.times]

    def through(self, body: Any, x_T: Tensor, conditions: list[Tensor]) -> Tensor:
        """Run the plan with `body` in place of the network's body."""
        by_time = dict(zip(self.times, conditions, strict=True))

        def denoise(x: Tensor, level: Level) -> Any:
            return self.hub(body(self.network.enter(x), by_time[level.t]), x, level)

        return run(denoise, self.plan, x_T)


class Body(nn.Module):
    """A network without its time layers."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    @override
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.network.body(x, condition)


class Frame(nn.Module):
    """A sampler without the network's body: takes the body's outputs as inputs.

    Returns x_0, the body's inputs and, with labels, the conditions.
    """

    def __init__(self, sampler: SamplerProgram):
        super().__init__()
        self.sampler = sampler

    @override
    def forward(self, x_T: Tensor, outputs: list[Tensor], labels: Tensor | None = None) -> Any:
        remaining, inputs = iter(outputs), []

        def body(x: Tensor, condition: Tensor) -> Tensor:
            inputs.append(x)
            return next(remaining)

        conditions = self.sampler.conditions(labels)
        end = self.sampler.through(body, x_T, conditions)
        return (end, inputs) if labels is None else (end, inputs, conditions)


def trace(
    module: nn.Module, inputs: tuple[Any, ...], what: str, fixed: int | None = None, strict: bool = False
) -> ExportedProgram:
    """Trace a module as a program for any number of samples.

    Args:
        module: The module.
        inputs: Example inputs: tensors, or lists of tensors, (N, ...), N > 1.
        what: The module's name in an error.
        fixed: The index of an input whose first dimension is not the number of samples.
        strict: Whether to trace its bytecode too; needed for a transformer, which takes the len() of a batch.

    Raises:
        DdimError: If torch cannot trace it.
    """
    size: Any = {0: Dim("batch")}
    shapes = [[size] * len(each) if isinstance(each, list) else size for each in inputs]
    if fixed is not None:
        shapes[fixed] = None
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), inputs, dynamic_shapes=tuple(shapes), strict=strict)
    except Exception as error:  # of many types, none of which a user could act on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"cannot be traced by torch {torch.__version__} ({reason})"
        raise DdimError(what, problem, "use another version of torch") from error
