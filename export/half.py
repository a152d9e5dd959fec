"""Turns a float32 graph into float16 with ONNX Runtime's converter, and keeps in float32 what float16 cannot hold."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from .onnx_graph import OnnxGraph

# Sums of squares under a root overflow, and angles lose whole positions: each chain is float32 from the first
# operator to the last.
_CHAINS = {"Reciprocal": "Pow", "Cos": "Cast", "Sin": "Cast"}
_LARGEST = np.float32(np.finfo(np.float16).max)


def halve(graph: OnnxGraph, float32: list[str]) -> None:
    """Make weights, activations and caches float16; the inputs and outputs named in `float32` stay as they are."""
    stubs = {tensor.name: tensor for tensor in graph.proto.graph.initializer if tensor.name in graph.weights}
    converted = convert_float_to_float16(
        _with_inputs_for(graph.proto, stubs),
        keep_io_types=float32,
        node_block_list=list(_kept_in_float32(graph.proto.graph)),
    )
    _join_chains(converted.graph)
    types = {value.name: value.type.tensor_type.elem_type for value in converted.graph.input}
    inputs = [value for value in converted.graph.input if value.name not in stubs]
    del converted.graph.input[:], converted.graph.value_info[:]
    converted.graph.input.extend(inputs)
    for name, stub in stubs.items():
        if types[name] != stub.data_type:
            stub.data_type = types[name]
            graph.weights[name] = _lazily_halved(graph.weights[name])
        converted.graph.initializer.append(stub)
    graph.proto = converted


def _with_inputs_for(proto: onnx.ModelProto, stubs: dict[str, onnx.TensorProto]) -> onnx.ModelProto:
    """The graph with inputs in place of these weights: the converter wants the type of each, and would read it."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name not in stubs)
    for name, tensor in stubs.items():
        bare.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return bare


def _lazily_halved(weight: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        wide = weight.numpy()
        narrow: npt.NDArray[np.float16] = np.empty(wide.shape, dtype=np.float16)
        np.clip(wide, -_LARGEST, _LARGEST, out=narrow, casting="unsafe")  # the converter's own function copies it often
        return ir.Tensor(narrow, name=weight.name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT16, shape=ir.Shape(weight.shape.numpy()), name=weight.name)


def _kept_in_float32(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of the nodes between the ends of _CHAINS, and of those that take a reciprocal."""
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in _CHAINS:
            yield from _back_to(node, _CHAINS[node.op_type], producers)
        if any(name in producers and producers[name].op_type == "Reciprocal" for name in node.input):
            yield node.name


def _back_to(node: onnx.NodeProto, first: str, producers: dict[str, onnx.NodeProto]) -> Iterator[str]:
    yield node.name
    if node.op_type != first:
        for name in node.input:
            if name in producers:
                yield from _back_to(producers[name], first, producers)


def _join_chains(graph: onnx.GraphProto) -> None:
    """Take out casts to float16 and back between two float32 nodes: the converter puts them everywhere."""
    # The converter's own casts, told by their names, begin and end at float32.
    narrowed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.name.startswith("graph_input_cast") or node.name.endswith("_cast_to_fp16_node")
    }
    joined = {
        node.output[0]: narrowed[node.input[0]]
        for node in graph.node
        if node.name.endswith("_cast_to_fp32_node") and node.input[0] in narrowed
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = joined.get(name, name)
