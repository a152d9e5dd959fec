"""Products of 8-bit integers by the weights that they take, on this processor: are they exact, how fast, how far off?

    python -m benchmarks.integer_products --threads 1
    python -m benchmarks.integer_products --bundle BUNDLE --questions data/test.json --picture-root data/pictures

Four forms: int8 weights in all of 8 bits, the same where onnxruntime is asked to be exact, int8 weights in 7 bits (what
`int8` is), and uint8 weights. Run it as on a processor without VNNI by the library that tests/processors describes;
/proc/cpuinfo, and so the name of the machine that is printed, then still says what the processor really has.
"""

import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from switchkd.export.contract.bundle import WEIGHTS
from switchkd.export.contract.integer_products import ASK_FOR_EXACT, products_are_exact
from switchkd.export.quantisation.weight_only import dynamic

from .accuracy_level import Form, measure


def all_of_8_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """int8 weights from -127 to 127."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(path)


FORMS = {
    "int8": Form(all_of_8_bits),
    "int8, asked": Form(all_of_8_bits, {ASK_FOR_EXACT: "1"}),
    "7 bits": Form(dynamic(QuantType.QInt8)),
    "uint8": Form(dynamic(QuantType.QUInt8)),
}


if __name__ == "__main__":
    for weights in WEIGHTS:
        print(f"{weights}: {'exact' if products_are_exact(weights) else 'wrong'}", end="")
        print(f", asked: {'exact' if products_are_exact(weights, asked=True) else 'wrong'}")
    measure(__doc__, FORMS)
