"""4-bit weights that are rounded so that products with recorded activations stay near: GPTQ (arXiv 2210.17323).

ONNX Runtime carries an implementation (`GPTQWeightOnlyQuantConfig`), whose result is plain rounding's: it reads the
rounding error's feedback from the empty half of a triangular matrix. It also fails at an odd number of blocks. Both
were found in 1.32, by comparing it with the paper's algorithm.

Shapes in names: R rows of activations, K and N a matrix's inputs and outputs, M some outputs, J blocks of B inputs.
"""

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from .activations import Activations, Floats
from .weight_only import BLOCK, MICROSOFT, Tool, blocks_of_4_bits

_LEVELS = 15  # the largest of 4 bits
_DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
_COLUMNS = 2**13  # of a matrix at a time: they do not depend on each other, and a vocabulary has many

Integers = npt.NDArray[np.uint8]


def gptq(activations: Activations) -> Tool:
    """4 bit: MatMulNBits as `blocks_of_4_bits` makes it, its weights rounded by GPTQ on the recorded activations.

    A matrix without recorded rows is rounded to nearest.
    """

    def tool(model: onnx.ModelProto) -> onnx.ModelProto:
        rows_RK = activations.get(model.graph.input[0].name)
        if rows_RK is None:
            return blocks_of_4_bits(symmetric=False)(model)
        weight = model.graph.initializer[0]
        weight_KN = numpy_helper.to_array(weight)
        order_K, feedback_KK = _feedback(rows_RK)
        scales_JN, zeros_JN = _grid(weight_KN)
        integers_KN: Integers = np.empty(weight_KN.shape, dtype=np.uint8)
        for start in range(0, weight_KN.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            integers_KN[:, part] = _round(
                weight_KN[:, part].astype(np.float32), scales_JN[:, part], zeros_JN[:, part], order_K, feedback_KK
            )
        return _with_product(model, integers_KN, scales_JN, zeros_JN)

    return tool


def _grid(weight_KN: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.floating], Integers]:
    """Scales, in the weight's own type, and zero points of every block: its numbers and 0 in 16 equal steps."""
    pad = -len(weight_KN) % BLOCK
    blocks_JBN = np.pad(weight_KN, ((0, pad), (0, 0))).reshape(-1, BLOCK, weight_KN.shape[1])
    low_JN, high_JN = np.minimum(blocks_JBN.min(axis=1), 0), np.maximum(blocks_JBN.max(axis=1), 0)
    scales_JN = (high_JN.astype(np.float32) - low_JN) / _LEVELS
    scales_JN[scales_JN == 0] = 1
    zeros_JN = np.clip(np.rint(-low_JN / scales_JN), 0, _LEVELS).astype(np.uint8)
    return scales_JN.astype(weight_KN.dtype), zeros_JN


def _feedback(rows_RK: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """The order in which weights are rounded, and how much of the errors before goes into each (both in that order).

    The inputs with the largest activations come first, as the paper's authors do it ("act order"). With the Hessian
    H = AᵀA, A lower triangular, the error of a product is |A(W - Q)|, and rounding row by row makes each of its rows
    small in turn. That is GPTQ without an inverse (arXiv 2507.18553: Babai's nearest plane).
    """
    hessian_KK = (rows_RK.T @ rows_RK).astype(np.float64)
    diagonal_K = np.diag(hessian_KK).copy()
    hessian_KK[np.diag_indices_from(hessian_KK)] += _DAMPING * diagonal_K.mean() or 1.0
    order_K = np.argsort(-diagonal_K, kind="stable")
    backward_K = order_K[::-1]
    # numpy's factor is of the other kind, LLᵀ: it is taken of the matrix turned over, and turned over again.
    factor_KK = np.linalg.cholesky(hessian_KK[np.ix_(backward_K, backward_K)]).T[::-1, ::-1]
    return order_K, (factor_KK / np.diag(factor_KK)[:, None]).astype(np.float32)


def _round(
    weight_KM: Floats,
    scales_JM: npt.NDArray[np.floating],
    zeros_JM: Integers,
    order_K: npt.NDArray[np.intp],
    feedback_KK: Floats,
) -> Integers:
    """The 4-bit integers of some of a matrix's columns, each rounded after the errors before it were added to it."""
    integers_KM: Integers = np.empty(weight_KM.shape, dtype=np.uint8)
    errors_KM = np.zeros_like(weight_KM)  # in the order of rounding
    for start in range(0, len(order_K), BLOCK):
        stop = min(start + BLOCK, len(order_K))
        before_BM = feedback_KK[start:stop, :start] @ errors_KM[:start]  # for several rows at once, for speed
        for place in range(start, stop):
            row = order_K[place]
            scale_M, zero_M = scales_JM[row // BLOCK].astype(np.float32), zeros_JM[row // BLOCK]
            target_M = weight_KM[row] + before_BM[place - start]
            target_M += feedback_KK[place, start:place] @ errors_KM[start:place]
            integers_M = np.clip(np.rint(target_M / scale_M) + zero_M, 0, _LEVELS)
            errors_KM[place] = weight_KM[row] - (integers_M - zero_M) * scale_M
            integers_KM[row] = integers_M
    return integers_KM


def _with_product(
    model: onnx.ModelProto, integers_KN: Integers, scales_JN: npt.NDArray[np.floating], zeros_JN: Integers
) -> onnx.ModelProto:
    """The model with MatMulNBits in place of its MatMul, with the names that ONNX Runtime's tool gives."""
    node, name = model.graph.node[0], model.graph.initializer[0].name
    inputs, outputs = integers_KN.shape
    padded_KN = np.pad(integers_KN, ((0, len(zeros_JN) * BLOCK - inputs), (0, 0)))
    packed = _pairs(padded_KN).T.reshape(outputs, len(zeros_JN), BLOCK // 2)
    tensors = {
        f"{name}_Q4": packed,
        f"{name}_scales": scales_JN.T,
        f"{name}_zero_points": _pairs(np.pad(zeros_JN, ((0, len(zeros_JN) % 2), (0, 0)))).T,
    }
    product = helper.make_node(
        "MatMulNBits",
        [node.input[0], *tensors],
        list(node.output),
        name=f"{node.name}_Q4" if node.name else "",
        domain=MICROSOFT,
        K=inputs,
        N=outputs,
        bits=4,
        block_size=BLOCK,
    )
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.append(product)
    result.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(array), tensor) for tensor, array in tensors.items()
    )
    return result


def _pairs(integers_KN: Integers) -> Integers:
    """Two rows in the four lower and the four higher bits of one."""
    return integers_KN[::2] | integers_KN[1::2] * np.uint8(16)
