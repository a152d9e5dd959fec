"""Finds the largest number of every tensor of a float32 graph while it runs, for float16 ends at 65,504.

ONNX Runtime computes most of float16 in float32 on a CPU, so that a verification there cannot see what overflows on a
GPU or a phone.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from ..graphs.onnx_graph import OnnxGraph
from .activations import open_graph
from .half import soften_mask

HELD = float(np.finfo(np.float16).max)
LOOKED_AT = 16  # prompts of the verification; `half.MARGIN` is for what others do
_LARGEST = "_largest"


def largest_numbers(path: Path, feeds: Iterable[Mapping[str, npt.NDArray[Any]]]) -> dict[str, float]:
    """Run the float32 graph at `path` and return the largest absolute number of each of its float tensors, by name.

    Of constants, inputs and what is computed, which the graph reduces as it is made: a feed takes the memory of a run.
    """
    graph = OnnxGraph.read(path)
    soften_mask(graph)
    largest = {
        tensor.name: _magnitude(graph.array(tensor))
        for tensor in graph.proto.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }
    inputs = {value.name for value in graph.proto.graph.input if _is_float(value)}
    computed = _computed_floats(path, graph)
    _reduce(graph, computed)
    session = open_graph(path, graph, packed=False)
    asked = [name + _LARGEST for name in computed]
    largest |= dict.fromkeys([*inputs, *computed], 0.0)
    for feed in feeds:
        found = dict(zip(computed, session.run(asked, dict(feed)), strict=True))
        found |= {name: _magnitude(feed[name]) for name in inputs}
        for name, number in found.items():
            largest[name] = max(float(number), largest[name]) if np.isfinite(number) else float("inf")
    return largest


def _magnitude(array: npt.NDArray[Any]) -> float:
    """The largest absolute number, without a copy of what may be a vocabulary's matrix."""
    return float(max(array.max(initial=0), -array.min(initial=0)))


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _computed_floats(path: Path, graph: OnnxGraph) -> list[str]:
    """Names of the float tensors that nodes give; ONNX Runtime knows the types of its own operators too."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    known = {value.name for value in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = open_graph(path, OnnxGraph(proto, graph.weights), as_written=True)
    floats = {output.name for output in session.get_outputs() if output.type == "tensor(float)"}
    return [name for name in names if name in floats]


def _reduce(graph: OnnxGraph, names: Iterable[str]) -> None:
    """Let a graph give the largest magnitude of these tensors, each right after it is made, and nothing else."""
    main, asked = graph.proto.graph, set(names)
    nodes = []
    for node in main.node:
        nodes.append(node)
        for name in asked & set(node.output):
            nodes.append(helper.make_node("Abs", [name], [name + "_magnitude"]))
            nodes.append(helper.make_node("ReduceMax", [name + "_magnitude"], [name + _LARGEST], keepdims=0))
    del main.node[:], main.output[:]
    main.node.extend(nodes)
    main.output.extend(helper.make_tensor_value_info(name + _LARGEST, TensorProto.FLOAT, []) for name in sorted(asked))
