"""Quantises a graph's constant matrices with ONNX Runtime's tools, one matrix at a time.

The tools hold a model several times over. Given a model of one node, they do so with one matrix.
"""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from ..contract.bundle import INT7, INT8, UINT8, WEIGHTS
from ..contract.integer_products import LARGEST_INT7
from ..graphs.onnx_graph import OnnxGraph

Tool = Callable[[onnx.ModelProto], onnx.ModelProto]
MICROSOFT = "com.microsoft"
BLOCK = 32  # weights that share a scale in 4 bit
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_WEIGHT_INPUT = {"MatMul": 1, "Gather": 0}


def constant_matrices(graph: OnnxGraph, op_type: str) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """Yield every MatMul or Gather (`op_type`) of a constant float matrix, and the matrix."""
    constants = graph.constants()
    for node in graph.proto.graph.node:
        weight = constants.get(node.input[_WEIGHT_INPUT[op_type]]) if node.op_type == op_type else None
        if weight is not None and len(weight.dims) == 2 and weight.data_type in _FLOATS:
            yield node, weight


def quantize(graph: OnnxGraph, op_type: str, tool: Tool, nodes: Collection[str] | None = None) -> None:
    """Let `tool` rewrite every MatMul or Gather (`op_type`) of a constant float matrix, each in a model of its own.

    Given `nodes`, only those of these names. The model's first input has the activation's name.
    """
    constants, rewritten = graph.constants(), []
    chosen = {
        node.output[0]: weight
        for node, weight in constant_matrices(graph, op_type)
        if nodes is None or node.name in nodes
    }
    made = {name for node in graph.proto.graph.node if node.output[0] not in chosen for name in node.output}
    for node in graph.proto.graph.node:
        weight = chosen.get(node.output[0])
        if weight is None:
            rewritten.append(node)
            continue
        part = tool(_alone(graph, node, weight)).graph
        # Products of the same activation quantise it under the same name: once is enough.
        rewritten += [new for new in part.node if not made & set(new.output)]
        made.update(name for new in part.node for name in new.output)
        constants.update((tensor.name, tensor) for tensor in part.initializer)
    used = {name for node in rewritten for name in node.input}
    main = onnx.GraphProto(name=graph.proto.graph.name, input=graph.proto.graph.input, output=graph.proto.graph.output)
    main.node.extend(rewritten)
    main.initializer.extend(tensor for name, tensor in constants.items() if name in used)
    graph.proto.graph.CopyFrom(main)
    if not any(opset.domain == MICROSOFT for opset in graph.proto.opset_import):
        graph.proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _alone(graph: OnnxGraph, node: onnx.NodeProto, weight: onnx.TensorProto) -> onnx.ModelProto:
    """A model of this node and its weight."""
    activation = node.input[1 - _WEIGHT_INPUT[node.op_type]]
    rows, columns = weight.dims
    given = (
        _batches(activation, weight.data_type, rows)
        if node.op_type == "MatMul"
        else _batches(activation, TensorProto.INT64)
    )
    tensor = onnx.numpy_helper.from_array(graph.array(weight), weight.name)
    return model_like(graph.proto, [node], given, _batches(node.output[0], weight.data_type, columns), [tensor])


def _batches(name: str, data_type: int, *width: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, data_type, ["batch", "time", *width])


def model_like(
    model: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    given: onnx.ValueInfoProto,
    result: onnx.ValueInfoProto,
    tensors: Iterable[onnx.TensorProto],
) -> onnx.ModelProto:
    """A model of these nodes and constants for the same runtimes as `model`."""
    return helper.make_model(
        helper.make_graph(list(nodes), "part", [given], [result], list(tensors)),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )


def dynamic(weight_type: QuantType, columns: int = 4096) -> Tool:
    """8 bit: MatMulInteger of uint8 activations, quantised at run time, and weights per output channel.

    int8 weights keep to 7 bits (`reduce_range`), by which sums are exact on every processor: see integer_products.
    Columns are given to ONNX Runtime's tool so many at a time, for it holds them eight times over. Each has a scale of
    its own, and gets the same numbers.
    """
    reduce_range = weight_type == QuantType.QInt8

    def tool(model: onnx.ModelProto) -> onnx.ModelProto:
        constant, given, result = model.graph.initializer[0], model.graph.input[0], model.graph.output[0]
        matrix_KM = onnx.numpy_helper.to_array(constant)
        arrays: dict[str, list[npt.NDArray[Any]]] = {}
        for start in range(0, matrix_KM.shape[1], columns):
            part_KC = matrix_KM[:, start : start + columns]
            tensor = onnx.numpy_helper.from_array(part_KC, constant.name)
            narrow = _batches(result.name, constant.data_type, part_KC.shape[1])
            part = model_like(model, model.graph.node, given, narrow, [tensor])
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "quantized.onnx"
                quantize_dynamic(part, path, per_channel=True, reduce_range=reduce_range, weight_type=weight_type)
                quantized = onnx.load(path).graph
            for made in quantized.initializer:
                arrays.setdefault(made.name, []).append(onnx.numpy_helper.to_array(made))
        tensors = [onnx.numpy_helper.from_array(np.concatenate(parts, axis=-1), name) for name, parts in arrays.items()]
        return model_like(model, quantized.node, given, result, tensors)

    return tool


def integer_weights(graph: OnnxGraph) -> str | None:
    """The riskiest weights among a graph's integer products (one of WEIGHTS), by their numbers; None without such."""
    constants, found = graph.constants(), set()
    for node in graph.proto.graph.node:
        if node.op_type == "MatMulInteger":
            numbers = graph.array(constants[node.input[1]])
            if numbers.dtype == np.uint8:
                found.add(UINT8)
            else:
                small = numbers.min() >= -LARGEST_INT7 and numbers.max() <= LARGEST_INT7
                found.add(INT7 if small else INT8)
    return next((weights for weights in WEIGHTS if weights in found), None)


def blocks_of_4_bits(*, symmetric: bool, accuracy_level: int = 0) -> Tool:
    """4 bit: MatMulNBits, a scale for every 32 weights.

    At `accuracy_level` 4 MatMulNBits rounds activations to 8 bit, at 0 it leaves them (benchmarks.accuracy_level).
    """

    def tool(model: onnx.ModelProto) -> onnx.ModelProto:
        quantizer = MatMulNBitsQuantizer(
            model,
            block_size=BLOCK,
            is_symmetric=symmetric,
            accuracy_level=accuracy_level,
        )
        quantizer.process()
        result: onnx.ModelProto = quantizer.model.model
        return result

    return tool


def round_activations(graph: OnnxGraph) -> None:
    """Set `accuracy_level` 4 in every MatMulNBits: one token is written faster, a prompt is read more slowly."""
    for node in graph.proto.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("accuracy_level", 4)])


def normal_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """4 bit: MatMulBnb4, bitsandbytes' NF4 with a scale for every 64 weights."""
    quantizer = MatMulBnb4Quantizer(model, MatMulBnb4Quantizer.NF4, block_size=64)
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result
