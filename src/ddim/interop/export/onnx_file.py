"""ONNX files: a network alone, or a sampler whose every step calls one function, the network, with shared weights."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ddim.errors import DdimError

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

BATCH = "N"
DOMAIN, FUNCTION = "ddim", "Network"
OF_WEIGHTS = "network."
LIMIT = 2**31 - 1  # bytes of one protobuf


def need_onnx() -> None:
    """See that what writes ONNX is installed.

    Raises:
        DdimError: Naming what is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DdimError("ONNX", f"needs {error.name}", "pip install 'ddim[interop]'") from None


def translate(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """A program as an ONNX model, without what the translation notes on each node.

    Args:
        program: The program.
        inputs: Names for its inputs, in their order.
        outputs: Names for its outputs.
    """
    import torch

    made: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs)
    )
    model: onnx.ModelProto = made.model_proto
    graph = model.graph
    del graph.value_info[:]  # its symbols are the tracer's own, and a reader infers them
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = BATCH
    graph.name = DOMAIN
    return model


def join(
    body: onnx.ModelProto, frame: onnx.ModelProto, calls: Sequence[str], constants: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """A sampler from its two parts: each call of the network becomes a call of one function.

    Args:
        body: The network without its time layers, from "x" and "condition" to "output". Its weights are called
            `network.` and on.
        frame: The rest of the sampler. It takes "x_T", perhaps "labels", and for each call k what the network would
            say, "output.k"; it gives "x_0", what the network is shown, "x.k", and perhaps some of the conditions.
        calls: What the condition of each call is called.
        constants: The conditions that the frame does not give.
    """
    from onnx import helper, numpy_helper

    weights = [tensor for tensor in body.graph.initializer if tensor.name.startswith(OF_WEIGHTS)]
    own = [tensor for tensor in body.graph.initializer if not tensor.name.startswith(OF_WEIGHTS)]
    names = [tensor.name for tensor in weights]
    inner = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in own]
    network = helper.make_function(
        DOMAIN, FUNCTION, ["x", "condition", *names], ["output"], [*inner, *body.graph.node], body.opset_import
    )
    steps = [
        helper.make_node(FUNCTION, [f"x.{k}", condition, *names], [f"output.{k}"], f"step.{k}", domain=DOMAIN)
        for k, condition in enumerate(calls)
    ]
    graph = helper.make_graph(
        _sorted([*frame.graph.node, *steps]),
        DOMAIN,
        [value for value in frame.graph.input if not value.name.startswith("output.")],
        [value for value in frame.graph.output if value.name == "x_0"],
        [
            *weights,
            *frame.graph.initializer,
            *(numpy_helper.from_array(array, name) for name, array in constants.items()),
        ],
    )
    versions = [*frame.opset_import, helper.make_opsetid(DOMAIN, 1)]
    model: onnx.ModelProto = helper.make_model(graph, functions=[network], opset_imports=versions)
    model.ir_version = frame.ir_version
    return model


def finish(model: onnx.ModelProto, facts: Mapping[str, str], version: str) -> bytes:
    """The file's bytes.

    Args:
        model: The model.
        facts: What the file says of itself.
        version: Of this library.

    Raises:
        DdimError: If it is larger than an ONNX file can be.
    """
    from onnx import helper

    model.producer_name, model.producer_version = "ddim", version
    helper.set_model_props(model, dict(facts))
    if model.ByteSize() > LIMIT:
        raise DdimError("ONNX", f"holds at most 2 GB, this model has {model.ByteSize() / 1e9:.1f}", "write a .pt2")
    return bytes(model.SerializeToString())


def run_onnx(data: bytes, inputs: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray] | None:
    """What onnxruntime makes of a file, for each of several inputs; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(None, dict(each))[0]) for each in inputs]


def _sorted(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes in an order in which each stands after those whose outputs it takes."""
    makers = {name: place for place, node in enumerate(nodes) for name in node.output}
    needs = {place: {makers[name] for name in node.input if name in makers} for place, node in enumerate(nodes)}
    return [nodes[place] for place in graphlib.TopologicalSorter(needs).static_order()]
