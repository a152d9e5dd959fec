"""Tables of embeddings in 8 and 4 bits, in operators that every runtime has.

ONNX Runtime's own tools have one scale for a whole table in 8 bits, so that the row with the largest number sets the
step of all others, and they hold eight copies of it. In 4 bits they make one node of it, GatherBlockQuantized, which
the build that transformers.js loads in a browser cannot run on wasm, and .ort files have no 4-bit type. A looked-up row
is so little work that plain operators do it as well.

Shapes in names: V rows, D width, K width filled up to whole blocks, H half of it, N blocks.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType

from .weight_only import BLOCK, Tool, model_like

_LARGEST_OF_8_BITS = 127
_LARGEST_OF_4_BITS = 15
_ROWS = 4096  # at a time: a table's numbers in float32 are many times its size in 4 bits
Floats = npt.NDArray[np.floating]
Numbers = npt.NDArray[np.uint8]


def table_of_8_bits(weight_type: QuantType) -> Tool:
    """The one-node model of a Gather with its table in 8 bits and a scale for every row."""
    offset = 128 if weight_type == QuantType.QUInt8 else 0

    def tool(model: onnx.ModelProto) -> onnx.ModelProto:
        rewriting = _Rewriting(model, "8_bits")
        numbers_VD, scales_V = _quantize_rows(rewriting.table_VD, offset)
        rewriting.constants = {"table": numbers_VD, "scales": scales_V, "last_axis": np.array([-1])}
        rewriting.op("Gather", "rows", "table", rewriting.ids)
        rewriting.op("Cast", "numbers", "rows", to=rewriting.float_type)
        centred = "numbers"
        if offset:
            rewriting.constants["zero_point"] = np.array(offset, dtype=rewriting.table_VD.dtype)
            rewriting.op("Sub", "centred", "numbers", "zero_point")
            centred = "centred"
        rewriting.op("Gather", "scale", "scales", rewriting.ids)
        rewriting.op("Unsqueeze", "factors", "scale", "last_axis")
        rewriting.op("Mul", "embeddings", centred, "factors")
        return rewriting.model()

    return tool


def table_of_4_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """The one-node model of a Gather with its table in 4 bits, a scale and a zero point for every 32 numbers."""
    rewriting = _Rewriting(model, "4_bits")
    table_VD = rewriting.table_VD
    packed_VH, zeros_VN1, scales_VN1 = _quantize_blocks(table_VD)
    blocks, width = scales_VN1.shape[1], table_VD.shape[1]
    op, ids, float_type = rewriting.op, rewriting.ids, rewriting.float_type
    rewriting.constants = {
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
    op("Gather", "pairs", "packed", ids)
    op("Cast", "numbers", "pairs", to=float_type)
    op("Div", "sixteenths", "numbers", "sixteen")
    op("Floor", "higher", "sixteenths")
    op("Mul", "higher_bits", "higher", "sixteen")
    op("Sub", "lower", "numbers", "higher_bits")
    op("Concat", "unpacked", "lower", "higher", axis=-1)
    op("Reshape", "blocks", "unpacked", "in_blocks")
    op("Gather", "zeros", "zero_points", ids)
    op("Cast", "subtracted", "zeros", to=float_type)
    op("Sub", "centred", "blocks", "subtracted")
    op("Gather", "factors", "scales", ids)
    op("Mul", "scaled", "centred", "factors")
    op("Reshape", "rows", "scaled", "in_rows")
    op("Slice", "embeddings", "rows", "start", "end", "last_axis")
    return rewriting.model()


class _Rewriting:
    """Nodes and constants that take the place of a one-node model's Gather, named after it."""

    def __init__(self, model: onnx.ModelProto, form: str) -> None:
        self._given, self._node = model, model.graph.node[0]
        self._prefix = f"{self._node.name or self._node.output[0]}_{form}."
        self._nodes: list[onnx.NodeProto] = []
        self.ids = self._node.input[1]
        self.float_type = model.graph.initializer[0].data_type
        self.table_VD = numpy_helper.to_array(model.graph.initializer[0])
        self.constants: dict[str, npt.NDArray[Any]] = {}

    def op(self, kind: str, output: str, *inputs: str, **attributes: Any) -> None:
        """Append a node; `ids` keeps its name, and all other tensors get the prefix."""
        given = [each if each == self.ids else f"{self._prefix}{each}" for each in inputs]
        name = f"{self._prefix}{output}"
        self._nodes.append(helper.make_node(kind, given, [name], name=name, **attributes))

    def model(self) -> onnx.ModelProto:
        """The rewritten model; its last node gives what the Gather gave."""
        self._nodes[-1].output[0] = self._node.output[0]
        tensors = [numpy_helper.from_array(array, f"{self._prefix}{name}") for name, array in self.constants.items()]
        return model_like(self._given, self._nodes, self._given.graph.input[0], self._given.graph.output[0], tensors)


def _quantize_rows(table_VD: Floats, offset: int) -> tuple[npt.NDArray[np.integer], Floats]:
    """Numbers around `offset`, and a scale for every row."""
    numbers_VD: npt.NDArray[np.integer] = np.empty(table_VD.shape, dtype=np.uint8 if offset else np.int8)
    scales_V = np.empty(len(table_VD), dtype=table_VD.dtype)
    for start in range(0, len(table_VD), _ROWS):
        part = slice(start, start + _ROWS)
        some_VD = table_VD[part].astype(np.float32)
        scales_V[part] = np.abs(some_VD).max(1) / _LARGEST_OF_8_BITS
        # The scale as it is stored: by a float16 rounded down the largest number would pass the last step.
        scales_V1 = np.where(scales_V[part] == 0, 1, scales_V[part]).astype(np.float32)[:, None]
        steps_VD = np.clip(np.rint(some_VD / scales_V1), -_LARGEST_OF_8_BITS, _LARGEST_OF_8_BITS)
        numbers_VD[part] = (steps_VD + offset).astype(numbers_VD.dtype)
    return numbers_VD, scales_V


def _quantize_blocks(table_VD: Floats) -> tuple[Numbers, Numbers, Floats]:
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
        scales = (high - low) / _LARGEST_OF_4_BITS
        scales[scales == 0] = 1
        zeros = np.rint(-low / scales)
        numbers_VK = np.clip(np.rint(some_VNB / scales) + zeros, 0, _LARGEST_OF_4_BITS).astype(np.uint8)
        lower_VH, higher_VH = np.split(numbers_VK.reshape(len(some_VD), -1), 2, axis=1)
        packed_VH[part] = lower_VH | higher_VH << 4
        zeros_VN1[part], scales_VN1[part] = zeros.astype(np.uint8), scales
    return packed_VH, zeros_VN1, scales_VN1
