"""Makes a graph's activations easier to quantise without changing what it computes: SmoothQuant (arXiv 2211.10438).

A few channels of an activation are often a hundred times as large as the rest, and one scale for all leaves the rest no
steps. Such channels are made smaller where they come from, and the matrices' rows for them larger by the same factors.

Shapes in names: R rows of activations, K and N a matrix's inputs and outputs, M some of the outputs.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from ..contract.integer_products import LARGEST_INT7
from ..graphs.onnx_graph import OnnxGraph
from .activations import Activations, Floats
from .weight_only import constant_matrices

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # α of the paper's equation 4
MAX_ERROR = 0.1  # of an int8 product, relative; ordinary ones are off by 0.01 to 0.06
_ROWS = 256  # on which errors are measured
_COLUMNS = 2**12  # likewise; a vocabulary has many, and they do not depend on each other
_SMALLEST = 1e-3  # of the largest channel: what is never seen on calibration data may be seen later
# Where a norm has its gain, and the bias that it adds after it.
_NORMS = {"LayerNormalization": (1, 2), "SimplifiedLayerNormalization": (1,), "SkipSimplifiedLayerNormalization": (2,)}


@dataclass(frozen=True)
class _Constant:
    """One constant input of one node."""

    node: onnx.NodeProto
    place: int

    @property
    def name(self) -> str:
        """Of the tensor."""
        return str(self.node.input[self.place])


def smooth(
    graph: OnnxGraph,
    activations: Activations,
    nodes: Collection[str] | None = None,
    max_error: float = MAX_ERROR,
) -> frozenset[str]:
    """Scale activations and matrices in place for products in int8; the graph computes what it did, up to rounding.

    Channels of an activation that comes out of a norm or a gated product, and goes into constant matrices alone, are
    divided by max|X_j|^α / max|W_j|^(1-α) (equation 4), with the α of least error on the recorded rows, or not at all.
    Given `nodes`, only MatMuls of these names change. Returns the names of those whose int8 product is still further
    off than `max_error`: they are better kept in float32. `activations` stay those of the graph as it was.
    """
    groups: dict[str, list[_Constant]] = {}
    for node, _ in constant_matrices(graph, "MatMul"):
        if node.input[0] in activations and (nodes is None or node.name in nodes):
            groups.setdefault(node.input[0], []).append(_Constant(node, 1))
    wiring = _Wiring(graph, [matrix for group in groups.values() for matrix in group])
    kept: set[str] = set()
    for activation, group in groups.items():
        matrices = [_array(graph, matrix) for matrix in group]
        sources = wiring.sources(activation, group)
        factors_K, errors = _search(activations[activation], matrices, search=bool(sources))
        if factors_K is not None:
            for constant in sources:
                _multiply(graph, constant, np.reciprocal(factors_K), shared=wiring.uses[constant.name] > 1)
            for matrix in group:
                _multiply(graph, matrix, factors_K[:, None])
        kept.update(matrix.node.name for matrix, error in zip(group, errors, strict=True) if error > max_error)
    return frozenset(kept)


class _Wiring:
    """Who makes and who uses a graph's tensors."""

    def __init__(self, graph: OnnxGraph, matrices: list[_Constant]) -> None:
        proto = graph.proto.graph
        self.constants = graph.constants()
        self.makers = {name: node for node in proto.node for name in node.output}
        self.uses = Counter(name for node in proto.node for name in node.input)
        self.uses.update(value.name for value in proto.output)
        self.products = {matrix.node.output[0]: matrix for matrix in matrices if self.uses[matrix.name] == 1}

    def sources(self, activation: str, group: list[_Constant]) -> list[_Constant]:
        """The constants to divide so that the activation is divided; none where something else would change too."""
        if self.uses[activation] != len(group) or any(self.uses[matrix.name] > 1 for matrix in group):
            return []
        maker = self.makers.get(activation)
        if maker is not None and self._cuts_time(maker) and self.uses[maker.input[0]] == 1:
            activation, maker = maker.input[0], self.makers.get(maker.input[0])
        if maker is None or maker.output[0] != activation:
            return []
        width = self.constants[group[0].name].dims[0]
        if maker.op_type == "Mul":
            for place, name in enumerate(maker.input):
                if name in self.products and self.uses[name] == 1:  # a gated product: the columns of one factor
                    return [self.products[name]]
                if self._is_vector(name, width):
                    return [_Constant(maker, place)]
        found = [_Constant(maker, place) for place in _NORMS.get(maker.op_type, ()) if place < len(maker.input)]
        return found if all(self._is_vector(constant.name, width) for constant in found) else []

    def _cuts_time(self, node: onnx.NodeProto) -> bool:
        """Whether a node passes on some places of an activation, whole, as before the language model's head."""
        axes = self.constants.get(node.input[3]) if node.op_type == "Slice" and len(node.input) > 3 else None
        return axes is not None and numpy_helper.to_array(axes).tolist() == [1]

    def _is_vector(self, name: str, width: int) -> bool:
        return name in self.constants and list(self.constants[name].dims) == [width]


def _search(rows_RK: Floats, matrices: Sequence[Floats], *, search: bool) -> tuple[Floats | None, list[float]]:
    """The factors that divide an activation's channels with the least error of its products, and the errors.

    No factors where none are better, or where there is no `search`.
    """
    weights_K = np.max([np.maximum(each_KN.max(axis=1), -each_KN.min(axis=1)) for each_KN in matrices], axis=0)
    largest_K = np.abs(rows_RK).max(axis=0)
    largest_K, weights_K = (np.maximum(each, _SMALLEST * each.max() or 1.0) for each in (largest_K, weights_K))
    # Rows from the largest on down: the first sets the range.
    rows_RK = _some(rows_RK[np.argsort(-np.abs(rows_RK).max(axis=1), kind="stable")], _ROWS)
    some = [_some(each_KN.T, _COLUMNS).T for each_KN in matrices]
    best: Floats | None = None
    ones_K: Floats = np.ones_like(largest_K)
    errors = [_error(rows_RK, part_KM, ones_K) for part_KM in some]
    for strength in STRENGTHS if search else ():
        factors_K = largest_K**strength / weights_K ** (1 - strength)
        found = [_error(rows_RK, part_KM, factors_K) for part_KM in some]
        if sum(found) < sum(errors):
            best, errors = factors_K, found
    return best, errors


def _some(array: Floats, count: int) -> Floats:
    """At most so many of an array's rows, evenly spread, the first among them."""
    return array[:: -(-len(array) // count)]


def _error(rows_RK: Floats, part_KM: Floats, factors_K: Floats) -> float:
    """The relative root-mean-square error of the scaled product in int8: a scale for all rows, one for each column."""
    expected_RM = rows_RK @ part_KM
    got_RM = _as_uint8(rows_RK / factors_K) @ _as_int8(part_KM * factors_K[:, None])
    return float(np.linalg.norm(got_RM - expected_RM)) / max(float(np.linalg.norm(expected_RM)), 1e-30)


def _as_uint8(rows_RK: Floats) -> Floats:
    """What DynamicQuantizeLinear keeps of numbers: 256 steps over their range, which includes 0."""
    low, high = min(0.0, float(rows_RK.min())), max(0.0, float(rows_RK.max()))
    scale = (high - low) / 255 or 1.0
    zero = np.rint(-low / scale)
    rounded: Floats = (np.clip(np.rint(rows_RK / scale) + zero, 0, 255) - zero) * scale
    return rounded.astype(np.float32)


def _as_int8(matrix_KM: Floats) -> Floats:
    """What is left of a matrix in 129 steps for each column, symmetric around 0: int8 weights keep to 7 bits."""
    scale_M = np.abs(matrix_KM).max(axis=0) / LARGEST_INT7
    scale_M[scale_M == 0] = 1
    rounded: Floats = np.rint(matrix_KM / scale_M) * scale_M
    return rounded


def _array(graph: OnnxGraph, constant: _Constant) -> Floats:
    return graph.array(graph.constants()[constant.name]).astype(np.float32, copy=False)


def _multiply(graph: OnnxGraph, constant: _Constant, factors: Floats, *, shared: bool = False) -> None:
    """Multiply a constant; one that others use too becomes another constant for this node. Large ones wait on disk."""
    tensor = graph.constants()[constant.name]
    if shared:
        copy = graph.proto.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = f"{constant.node.output[0]}.{tensor.name}"
        if tensor.name in graph.weights:
            graph.weights[copy.name] = graph.weights[tensor.name]
        constant.node.input[constant.place], tensor = copy.name, copy
    if tensor.name in graph.weights:
        graph.weights[tensor.name] = _lazily_multiplied(graph.weights[tensor.name], factors)
    else:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factors, tensor.name))


def _lazily_multiplied(weight: ir.TensorProtocol, factors: npt.NDArray[Any]) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.Tensor(weight.numpy() * factors, name=weight.name)

    return ir.LazyTensor(read, dtype=weight.dtype, shape=ir.Shape(weight.shape.numpy()), name=weight.name)
