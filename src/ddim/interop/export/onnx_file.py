"""ONNX files of a network, or of a sampler whose steps all call one ONNX function, the network, with shared weights."""

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
WEIGHTS_PREFIX = "network."
LIMIT = 2**31 - 1  # bytes of one protobuf


def require_onnx() -> None:
    """Check that the libraries for writing ONNX are installed.

    Raises:
        DdimError: Naming the missing library.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DdimError("ONNX", f"needs {error.name}", "pip install 'ddim[interop]'") from None


def translate(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """Convert a program to an ONNX model, without the exporter's metadata on each node.

    Args:
        program: The program.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
    """
    import torch

    exported: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs)
    )
    model: onnx.ModelProto = exported.model_proto
    graph = model.graph
    del graph.value_info[:]  # it uses the tracer's symbols, and readers infer the shapes
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
    body: onnx.ModelProto, frame: onnx.ModelProto, nfe: Sequence[str], constants: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """Join the two parts of a sampler: each network evaluation becomes a call of one ONNX function.

    Args:
        body: The network without its time layers, from "x" and "condition" to "output". Names of its weights begin with
            `network.`.
        frame: The rest of the sampler. Inputs: "x_T", optionally "labels", and the network's output "output.k" for each
            evaluation k. Outputs: "x_0", the network's input "x.k" for each evaluation, and optionally conditions.
        nfe: The name of the condition of each evaluation.
        constants: The conditions that are not outputs of the frame.
    """
    from onnx import helper, numpy_helper

    weights = [tensor for tensor in body.graph.initializer if tensor.name.startswith(WEIGHTS_PREFIX)]
    others = [tensor for tensor in body.graph.initializer if not tensor.name.startswith(WEIGHTS_PREFIX)]
    names = [tensor.name for tensor in weights]
    inner = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in others]
    network = helper.make_function(
        DOMAIN, FUNCTION, ["x", "condition", *names], ["output"], [*inner, *body.graph.node], body.opset_import
    )
    steps = [
        helper.make_node(FUNCTION, [f"x.{k}", condition, *names], [f"output.{k}"], f"step.{k}", domain=DOMAIN)
        for k, condition in enumerate(nfe)
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


def finish(model: onnx.ModelProto, metadata: Mapping[str, str], version: str) -> bytes:
    """Add metadata to an ONNX model, and serialise it.

    Args:
        model: The model.
        metadata: The metadata.
        version: The version of this library.

    Raises:
        DdimError: If the model is larger than an ONNX file can be.
    """
    from onnx import helper

    model.producer_name, model.producer_version = "ddim", version
    helper.set_model_props(model, dict(metadata))
    if model.ByteSize() > LIMIT:
        raise DdimError("ONNX", f"allows at most 2 GB, this model has {model.ByteSize() / 1e9:.1f}", "export a .pt2")
    return bytes(model.SerializeToString())


def run_onnx(data: bytes, inputs: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray] | None:
    """Run an ONNX file in onnxruntime on each of several inputs; None if onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(None, dict(each))[0]) for each in inputs]


def _sorted(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes in topological order."""
    producers = {name: index for index, node in enumerate(nodes) for name in node.output}
    needs = {index: {producers[name] for name in node.input if name in producers} for index, node in enumerate(nodes)}
    return [nodes[index] for index in graphlib.TopologicalSorter(needs).static_order()]
