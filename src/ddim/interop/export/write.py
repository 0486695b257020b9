"""Export of a network or a sampler to a file, which is compared with the model before it is written."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

import ddim
from ddim._io.atomic import write_atomic
from ddim.errors import DdimError
from ddim.interop.export import onnx_file
from ddim.interop.export.programs import Body, Frame, NetworkProgram, SamplerProgram, trace
from ddim.model.config import to_json
from ddim.model.denoisers import NetworkDenoiser
from ddim.model.model import Model
from ddim.nn.base import Network
from ddim.plan.plan import Plan
from ddim.sampling.loop import run

SUFFIXES = (".onnx", ".pt2")
METADATA_FILE = "ddim.json"
"""The extra file of a .pt2 with its metadata."""
SIZES = (2, 5)
"""The batch sizes at which a file is compared with the model."""
TOLERANCE = 1e-2
"""Largest difference from the model relative to the largest value (at least 1); more is an error, not rounding."""
_NOISE = "x_T of sample i at seed s: numpy Philox, key (s, i), counter 0, standard_normal in float32"


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported file.

    Args:
        path: The path.
        size: The size in bytes.
        metadata: The metadata.
        difference: The largest absolute difference from the model's results; None if no runtime is installed.
    """

    path: Path
    size: int
    metadata: Mapping[str, str]
    difference: float | None


def export(model: Model, path: Path | str, plan: Plan | None = None, name: str = "") -> Exported:
    """Export a network, or a sampler, as a program in float32.

    Args:
        model: The model.
        path: A file *.onnx or *.pt2; an existing file is replaced only by a complete and verified one.
        plan: The sampler's plan, without noise; None to export the network alone.
        name: The model's name, for the metadata.

    Raises:
        DdimError: If the model or plan cannot be exported, a library is missing, or the results differ.
    """
    steps = iter_export(model, path, plan, name)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            exported: Exported = end.value
            return exported


def iter_export(
    model: Model, path: Path | str, plan: Plan | None = None, name: str = ""
) -> Generator[str, None, Exported]:
    """As `export`, with progress.

    Yields:
        A description of the next step.

    Returns:
        The exported file.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DdimError(path, "has no supported suffix", f"use {' or '.join('*' + each for each in SUFFIXES)}")
    if path.suffix == ".onnx":
        onnx_file.require_onnx()
    if plan is not None:
        _check_plan(model, plan)
    metadata = describe(model, plan, name)
    network = copy.deepcopy(model.network).cpu()
    program: NetworkProgram | SamplerProgram = NetworkProgram(network)
    if plan is not None:
        program = SamplerProgram(network, model.kind.hub, plan)
    yield f"tracing the {metadata['what']}"
    with _quiet():
        inputs, strict = examples(model, 2, plan), model.config.categorical is not None
        if path.suffix == ".onnx" and isinstance(program, SamplerProgram):
            data = _sampler_onnx(program, inputs, metadata)
        else:
            traced = trace(program, (*inputs.values(),), metadata["what"], strict=strict)
            data = _pt2(traced, metadata) if path.suffix == ".pt2" else _network_onnx(traced, list(inputs), metadata)
    yield "comparing it with the model"
    difference = _difference(model, network, plan, path, data)
    write_atomic(path, data)
    return Exported(path, len(data), metadata, difference)


def describe(model: Model, plan: Plan | None, name: str = "") -> dict[str, str]:
    """The metadata of a file, with which it can be used without this library."""
    config, shape = model.config, ", ".join(str(side) for side in model.shape)
    what, classes = "network" if plan is None else "sampler", config.network.classes
    predicts = "logits" if config.categorical else config.predicts
    x = f"{'int64' if config.categorical else 'float32'} (N, {shape})"
    labels = f"; labels int64 (N,), 0..{classes - 1}, or {classes} for none" if classes else ""
    metadata = {
        "format": "ddim-export",
        "version": "1",
        "what": what,
        "model": name,
        "model_sha256": model.fingerprint,
        "predicts": predicts,
        "shape": json.dumps(list(model.shape)),
        "value_range": f"ids 0..{config.categorical.size - 1}" if config.categorical else "[-1, 1]",
        "classes": str(classes),
        "needs_label": json.dumps(config.needs_label),
        "config": to_json(config.model_copy(update={"error": None})),
        "software": f"ddim {ddim.__version__}, torch {torch.__version__}",
    }
    if plan is not None:
        io_ = {"input": f"x_T {x}, standard normal{labels}", "output": f"x_0 {x}", "noise": _NOISE}
        return metadata | io_ | {"plan": plan.to_json(), "plan_name": plan.name}
    levels = [model.schedule.level(t) for t in range(1, model.schedule.T + 1)]
    out = f"float32 (N, {shape}, {config.categorical.size})" if config.categorical else x
    io_ = {"input": f"x {x}; t float32 (N,), 1..{model.schedule.T}{labels}", "output": f"{predicts} {out}"}
    return metadata | io_ | {"alpha_bar": json.dumps([level.alpha_bar for level in levels])}


def examples(model: Model, n: int, plan: Plan | None) -> dict[str, Tensor]:
    """Example inputs of a program by name, for n samples: noise of a fixed seed, different timesteps and labels."""
    x, classes = model.noise(n).start().cpu(), model.config.network.classes
    inputs = {"x": x, "t": torch.linspace(1, model.schedule.T, n)} if plan is None else {"x_T": x}
    rows = classes + (not model.config.needs_label)  # index `classes` stands for no label
    return inputs | ({"labels": (rows - 1 - torch.arange(n)) % rows} if classes else {})


def _check_plan(model: Model, plan: Plan) -> None:
    what, hint = f"plan {plan.name}", "export a plan without noise, such as ddim with eta 0"
    if not isinstance(plan, Plan) or model.config.categorical:
        raise DdimError("sampler", "draws in every step over discrete data", "export the network")
    model.check_plan(plan, to_clean=True)
    if plan.stochastic:
        raise DdimError(what, "adds noise, which a program cannot draw", hint)
    if plan.lattice:
        raise DdimError(what, "keeps its states on a lattice in float64", hint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output, warnings and log of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _pt2(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in node.meta.keys() - {"val"}:  # the rest includes paths of this machine
                del node.meta[key]
    program.example_inputs = None  # they would be stored as a pickle
    out = io.BytesIO()
    torch.export.save(program, out, extra_files={METADATA_FILE: json.dumps(metadata)})
    return out.getvalue()


def _network_onnx(program: ExportedProgram, inputs: list[str], metadata: Mapping[str, str]) -> bytes:
    model = onnx_file.translate(program, inputs, [metadata["predicts"]])
    return onnx_file.finish(model, metadata, ddim.__version__)


def _sampler_onnx(program: SamplerProgram, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A sampler as ONNX; the network is traced once, whatever the number of steps."""
    x_T, labels = inputs["x_T"], inputs.get("labels")
    names = {t: f"condition.{place}" for place, t in enumerate(program.times)}
    nfe = [names[row.query.t] for row in program.plan.rows]
    with torch.no_grad():
        conditions = program.conditions(labels)
        body, example = Body(program.network), (program.network.enter(x_T), conditions[0])
        outputs = [body(*example) for _ in nfe]
    traced = trace(body, example, "network", fixed=1 if labels is None else None)
    network = onnx_file.translate(traced, ["x", "condition"], ["output"])
    body_inputs, body_outputs = [f"x.{k}" for k in range(len(nfe))], [f"output.{k}" for k in range(len(nfe))]
    if labels is None:
        frame = onnx_file.translate(
            trace(Frame(program), (x_T, outputs), "sampler"), ["x_T", *body_outputs], ["x_0", *body_inputs]
        )
        constants = {name: condition.numpy() for name, condition in zip(names.values(), conditions, strict=True)}
    else:
        traced = trace(Frame(program), (x_T, outputs, labels), "sampler")
        frame = onnx_file.translate(traced, ["x_T", *body_outputs, "labels"], ["x_0", *body_inputs, *names.values()])
        constants = {}
    return onnx_file.finish(onnx_file.join(network, frame, nfe, constants), metadata, ddim.__version__)


def _difference(model: Model, network: Network, plan: Plan | None, path: Path, data: bytes) -> float | None:
    """Largest absolute difference between a file's results and the model's; None if there is no runtime.

    Raises:
        DdimError: If it is larger than `TOLERANCE` allows.
    """
    inputs = [examples(model, n, plan) for n in SIZES]
    with _quiet(), torch.no_grad():
        if path.suffix == ".onnx":
            results = onnx_file.run_onnx(data, [{name: x.numpy() for name, x in each.items()} for each in inputs])
            if results is None:
                return None
        else:
            loaded = torch.export.load(io.BytesIO(data)).module()
            results = [loaded(*each.values()).numpy() for each in inputs]
        expected = [_expected(model, network, plan, each).numpy() for each in inputs]
    worst = max(float(np.abs(a - b).max()) for a, b in zip(results, expected, strict=True))
    scale = max(1.0, *(float(np.abs(each).max()) for each in expected))
    if not worst <= TOLERANCE * scale:
        raise DdimError(path, f"differs from the model by {worst:.2g} and was not written", "use another torch")
    return worst


def _expected(model: Model, network: Network, plan: Plan | None, inputs: Mapping[str, Tensor]) -> Tensor:
    if plan is None:
        output: Tensor = NetworkProgram(network)(*inputs.values())
        return output
    return run(NetworkDenoiser(network, model.kind.hub, inputs.get("labels")), plan, inputs["x_T"])
