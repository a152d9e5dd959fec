"""Whether onnxruntime multiplies 8-bit integers exactly on this processor: found out by multiplying known ones.

An x86 processor without VNNI multiplies uint8 activations and int8 weights by an instruction that adds two products in
16 bits and stops at their limit (vpmaddubsw): 255 × 127 + 255 × 127 comes out as 32,767. Weights in 7 bits, -64 to 64,
cannot reach it, on any processor. Weights in uint8 go another way, which is exact. Nothing warns of a sum that stopped,
and what a model then says is a little wrong, or altogether.

Free of torch and of onnx: it runs on the device.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from .json_fields import BundleError
from .manifest import INT7, INT8, UINT8
from .onnx_wire import field, number

LARGEST_INT7 = 64  # 2 × 255 × 64 = 32,640 still fits 16 bits with a sign
ASK_FOR_EXACT = "session.x64quantprecision"  # a session option: int8 weights go the way of uint8, at half the speed

_RANGES = {INT7: (-LARGEST_INT7, LARGEST_INT7), INT8: (-127, 127), UINT8: (0, 255)}
_ROWS, _WIDTH, _COLUMNS = 3, 70, 33  # whole vectors of any processor, and a rest
# Of onnx.proto.
_UINT8_TYPE, _INT8_TYPE, _INT32_TYPE = 2, 3, 6
_IR_VERSION, _OPSET = 8, 17


def make_exact(options: onnxruntime.SessionOptions, weights: str | None, file: Path) -> bool:
    """Let a session compute integer products with such weights exactly (None: it has none); whether it had to be asked.

    The products are tried once in a process, in milliseconds. Raises BundleError where they are wrong all the same.
    """
    if weights is None or products_are_exact(weights):
        return False
    if not products_are_exact(weights, asked=True):
        raise BundleError(
            f"{file}: onnxruntime {onnxruntime.__version__} multiplies uint8 and {weights} wrongly on this processor, "
            "so its answers would be wrong; take a precision without integer products (fp32, q4), or another "
            "onnxruntime"
        )
    options.add_session_config_entry(ASK_FOR_EXACT, "1")
    return True


@lru_cache
def products_are_exact(weights: str, *, asked: bool = False) -> bool:
    """Whether sums of products of uint8 and such weights come out as integers do, `asked` for exactness or not."""
    activations_MK, weights_KN = known_factors(weights)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # no pool for a product this small
    if asked:
        options.add_session_config_entry(ASK_FOR_EXACT, "1")
    session = onnxruntime.InferenceSession(known_product(weights_KN), options, providers=["CPUExecutionProvider"])
    found = [session.run(None, {"activations": rows})[0] for rows in (activations_MK, activations_MK[:1])]
    expected_MN = activations_MK.astype(np.int32) @ weights_KN.astype(np.int32)
    return bool((found[0] == expected_MN).all() and (found[1] == expected_MN[:1]).all())


def known_factors(weights: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]:
    """Activations [M, K] and weights [K, N] of which sums of two products are as large as they can be, and others."""
    random = np.random.default_rng(0)
    low, high = _RANGES[weights]
    activations_MK = random.integers(200, 256, (_ROWS, _WIDTH), dtype=np.uint8)
    activations_MK[:, ::5] = 255
    weights_KN = random.integers(low, high + 1, (_WIDTH, _COLUMNS))
    weights_KN[:, 0], weights_KN[:, 1] = high, low
    return activations_MK, weights_KN.astype(np.uint8 if weights == UINT8 else np.int8)


def known_product(weights_KN: npt.NDArray[np.integer]) -> bytes:
    """A model of one MatMulInteger, spelled as protobuf: a device has no onnx package."""
    weight_type = _UINT8_TYPE if weights_KN.dtype == np.uint8 else _INT8_TYPE
    rows, columns = weights_KN.shape
    node = field(1, b"activations") + field(1, b"weights") + field(2, b"sums") + field(4, b"MatMulInteger")
    tensor = number(1, rows) + number(1, columns) + number(2, weight_type)
    tensor += field(8, b"weights") + field(9, np.ascontiguousarray(weights_KN).tobytes())
    graph = field(1, node) + field(2, b"product") + field(5, tensor)
    graph += field(11, _matrix(b"activations", _UINT8_TYPE, rows)) + field(12, _matrix(b"sums", _INT32_TYPE, columns))
    return number(1, _IR_VERSION) + field(7, graph) + field(8, number(2, _OPSET))


def _matrix(name: bytes, element: int, width: int) -> bytes:
    """A ValueInfoProto of any number of rows."""
    shape = field(1, field(2, b"rows")) + field(1, number(1, width))
    return field(1, name) + field(2, field(1, number(1, element) + field(2, shape)))
