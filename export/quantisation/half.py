"""Turns a float32 graph into float16 with ONNX Runtime's converter, and keeps in float32 what float16 cannot hold."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from ..graphs.onnx_graph import OnnxGraph

# Sums of squares under a root overflow, and angles lose whole positions: each chain is float32 from the first
# operator to the last.
_CHAINS = {"Reciprocal": "Pow", "Cos": "Cast", "Sin": "Cast"}
_LARGEST = np.float32(np.finfo(np.float16).max)
# How much further than the numbers that were seen others may reach: pictures and prompts are many, and a few were run.
MARGIN = 4
# In the place of the smallest number of float32, which stands for "never" in a sum before a softmax. Of this one's
# exponential nothing is left either, and the sum stays within float16.
_NEVER = np.float32(-8192)


def halve(graph: OnnxGraph, float32: list[str]) -> None:
    """Make weights, activations and caches float16; the inputs and outputs named in `float32` stay as they are.

    So does what takes or gives a number of `graph.largest` that float16 does not hold.
    """
    soften_mask(graph)
    main = graph.proto.graph
    stubs = {tensor.name: tensor for tensor in main.initializer if tensor.name in graph.weights}
    kept = {*always_float32(main), *(node.name for node in overflowing(graph))}
    takers = {name: {node.name for node in main.node if name in node.input} for name in stubs}
    converted = convert_float_to_float16(
        _with_inputs_for(graph, stubs),
        keep_io_types=[*float32, *(name for name in stubs if takers[name] <= kept)],
        node_block_list=sorted(kept),
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


def soften_mask(graph: OnnxGraph) -> None:
    """Replace the smallest number of float32 where it is a constant: it masks, and float16 has none so small."""
    for tensor in graph.proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in graph.weights:
            values = onnx.numpy_helper.to_array(tensor)
            if (lowest := values == np.finfo(np.float32).min).any():
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.where(lowest, _NEVER, values), tensor.name))


def overflowing(graph: OnnxGraph) -> list[onnx.NodeProto]:
    """The nodes that take or give a tensor of `graph.largest` beyond float16, computed ones with MARGIN."""
    constants = graph.constants()
    wide = {
        name
        for name, number in graph.largest.items()
        if not number * (1 if name in constants else MARGIN) <= float(_LARGEST)
    }
    return [node for node in graph.proto.graph.node if wide & {*node.input, *node.output}]


def _with_inputs_for(graph: OnnxGraph, stubs: dict[str, onnx.TensorProto]) -> onnx.ModelProto:
    """The graph with inputs in place of these weights: the converter wants the type of each, and would read it.

    It finds the types of tensors behind ONNX Runtime's own operators nowhere but here.
    """
    proto = graph.proto
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name not in stubs)
    for name, tensor in stubs.items():
        bare.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    given = {value.name for value in (*bare.graph.input, *bare.graph.output, *bare.graph.initializer)}
    bare.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in graph.largest
        if name not in given
    )
    return bare


def _lazily_halved(weight: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        wide = weight.numpy()
        narrow: npt.NDArray[np.float16] = np.empty(wide.shape, dtype=np.float16)
        np.clip(wide, -_LARGEST, _LARGEST, out=narrow, casting="unsafe")  # the converter's own function copies it often
        return ir.Tensor(narrow, name=weight.name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT16, shape=ir.Shape(weight.shape.numpy()), name=weight.name)


def always_float32(graph: onnx.GraphProto) -> Iterator[str]:
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
        if node.name.startswith("graph_output_cast"):
            node.input[0] = narrowed.get(node.input[0], node.input[0])
        for place, name in enumerate(node.input):
            node.input[place] = joined.get(name, name)
