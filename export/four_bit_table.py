"""A table of 4-bit embeddings in operators that every runtime has.

ONNX Runtime's GatherBlockQuantized is one node, but the build that transformers.js loads in a browser cannot run it on
wasm, and .ort files have no 4-bit type. A looked-up row is so little work that plain operators do it as well.

Shapes in names: V rows, D width, K width filled up to whole blocks, H half of it, N blocks.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from .weight_only import BLOCK

_LARGEST = 15
_ROWS = 4096  # at a time: a table's numbers in float32 are many times its size in 4 bits


def table_of_4_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """The one-node model of a Gather with its table in 4 bits, a scale and a zero point for every 32 numbers."""
    node, tensor = model.graph.node[0], model.graph.initializer[0]
    table_VD = numpy_helper.to_array(tensor)
    packed_VH, zeros_VN1, scales_VN1 = _quantize(table_VD)
    blocks, width = scales_VN1.shape[1], table_VD.shape[1]
    prefix, ids = f"{node.name or node.output[0]}_4_bits.", node.input[1]
    constants = {
        "packed": packed_VH,
        "zero_points": zeros_VN1,
        "scales": scales_VN1,
        "sixteen": np.array(16, dtype=table_VD.dtype),
        "in_blocks": np.array([0, 0, blocks, BLOCK]),
        "in_rows": np.array([0, 0, blocks * BLOCK]),
        "start": np.array([0]),
        "end": np.array([width]),
        "last_axis": np.array([2]),
    }
    nodes = []

    def op(kind: str, output: str, *inputs: str, **attributes: Any) -> None:
        given = [each if each == ids else f"{prefix}{each}" for each in inputs]
        nodes.append(helper.make_node(kind, given, [f"{prefix}{output}"], name=f"{prefix}{output}", **attributes))

    op("Gather", "pairs", "packed", ids)
    op("Cast", "numbers", "pairs", to=tensor.data_type)
    op("Div", "sixteenths", "numbers", "sixteen")
    op("Floor", "higher", "sixteenths")
    op("Mul", "higher_bits", "higher", "sixteen")
    op("Sub", "lower", "numbers", "higher_bits")
    op("Concat", "unpacked", "lower", "higher", axis=-1)
    op("Reshape", "blocks", "unpacked", "in_blocks")
    op("Gather", "zeros", "zero_points", ids)
    op("Cast", "subtracted", "zeros", to=tensor.data_type)
    op("Sub", "centred", "blocks", "subtracted")
    op("Gather", "factors", "scales", ids)
    op("Mul", "scaled", "centred", "factors")
    op("Reshape", "rows", "scaled", "in_rows")
    op("Slice", "embeddings", "rows", "start", "end", "last_axis")
    nodes[-1].output[0] = node.output[0]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(
        numpy_helper.from_array(array, f"{prefix}{constant}") for constant, array in constants.items()
    )
    return result


def _quantize(
    table_VD: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.floating]]:
    """Numbers in pairs (column j below, column H + j in the higher bits), zero points, scales."""
    rows, width = table_VD.shape
    blocks = -(-width // BLOCK)
    packed_VH = np.empty((rows, blocks * BLOCK // 2), dtype=np.uint8)
    zeros_VN1 = np.empty((rows, blocks, 1), dtype=np.uint8)
    scales_VN1 = np.empty((rows, blocks, 1), dtype=table_VD.dtype)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        some_VD = table_VD[part].astype(np.float32)
        some_VNB = np.pad(some_VD, ((0, 0), (0, blocks * BLOCK - width))).reshape(len(some_VD), blocks, BLOCK)
        low, high = (np.minimum(some_VNB.min(-1, keepdims=True), 0), np.maximum(some_VNB.max(-1, keepdims=True), 0))
        scales = (high - low) / _LARGEST
        scales[scales == 0] = 1
        zeros = np.rint(-low / scales)
        numbers_VK = np.clip(np.rint(some_VNB / scales) + zeros, 0, _LARGEST).astype(np.uint8).reshape(len(some_VD), -1)
        lower_VH, higher_VH = np.split(numbers_VK, 2, axis=1)
        packed_VH[part] = lower_VH | higher_VH << 4
        zeros_VN1[part], scales_VN1[part] = zeros.astype(np.uint8), scales
    return packed_VH, zeros_VN1, scales_VN1
