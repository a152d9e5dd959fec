"""The table of precisions: how each is made from the float32 graphs, and how far it may be from the model."""

from collections.abc import Callable
from dataclasses import dataclass

from onnxruntime.quantization import QuantType

from .bundle import EMBED_TOKENS
from .graphs import ExportError
from .half import halve
from .onnx_graph import OnnxGraph
from .weight_only import Tool, blocks_of_4_bits, dynamic, normal_floats, quantize


@dataclass(frozen=True)
class Bounds:
    """How far a graph's outputs may be from PyTorch's before the export is refused."""

    vision_max: float  # largest absolute difference of an image feature
    logits_max: float  # largest absolute difference of a logit
    relative_rms: float  # root mean square of the difference over that of the expected values, any graph
    same_tokens: bool  # whether greedy answers must be equal


@dataclass(frozen=True)
class Precision:
    """One column of a bundle: files named `graph + suffix + .onnx`."""

    name: str
    suffix: str  # as transformers.js looks for it
    change: Callable[[str, OnnxGraph], None]  # turns a float32 graph, given its name, into this precision
    bounds: Bounds
    note: str  # what it is, for the card
    cache_dtype: str = "float32"  # of the decoder's KV cache; every other input and output is float32 or int64


# transformers.js puts visual features among embeddings as float32, and takes float16 for the caches of these two alone.
_FLOAT32 = ["pixel_values", "image_features", "inputs_embeds", "logits"]


def _products(product: Tool, table: Tool) -> Callable[[str, OnnxGraph], None]:
    """Quantise constant matrices of a graph: embeddings by one tool, all others by another."""

    def change(name: str, graph: OnnxGraph) -> None:
        if name == EMBED_TOKENS:
            quantize(graph, "Gather", table)  # the largest table of a small model
        else:
            quantize(graph, "MatMul", product)

    return change


def _unchanged(_name: str, _graph: OnnxGraph) -> None:
    """As traced."""


def _half(_name: str, graph: OnnxGraph) -> None:
    halve(graph, _FLOAT32)


_int8 = _products(dynamic(QuantType.QInt8), dynamic(QuantType.QInt8))
_uint8 = _products(dynamic(QuantType.QUInt8), dynamic(QuantType.QUInt8))
# A zero point in every block brings the weights nearer than symmetric blocks do; GatherBlockQuantized needs it.
_q4 = _products(blocks_of_4_bits(symmetric=False), blocks_of_4_bits(symmetric=False))
_bnb4 = _products(normal_floats, blocks_of_4_bits(symmetric=False))


def _q4f16(name: str, graph: OnnxGraph) -> None:
    _half(name, graph)
    _q4(name, graph)


def _within(relative_rms: float) -> Bounds:
    return Bounds(float("inf"), float("inf"), relative_rms, same_tokens=False)


_FAST_8_BIT = "uint8 activations, quantised at run time, × {} weights per output channel; embeddings the same"
_HALF = (
    "float16 weights, activations and KV cache; a CPU computes most of it in float32, so it is small there, not fast"
)
_4_BIT = "4-bit weights and embeddings with a scale and a zero point for every 32; {}"

# A broken graph is off by its whole signal (1.0 and more).
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "", _unchanged, Bounds(1e-4, 1e-3, 1e-4, same_tokens=True), "as trained"),
        Precision("fp16", "_fp16", _half, _within(0.02), _HALF, "float16"),
        Precision("int8", "_int8", _int8, _within(0.3), _FAST_8_BIT.format("int8")),
        Precision("uint8", "_uint8", _uint8, _within(0.3), _FAST_8_BIT.format("uint8")),
        Precision("q8", "_quantized", _int8, _within(0.3), "`int8` under the name that browsers load by default"),
        Precision("q4", "_q4", _q4, _within(0.6), _4_BIT.format("activations stay float32")),
        Precision("q4f16", "_q4f16", _q4f16, _within(0.6), _4_BIT.format("the rest as in `fp16`"), "float16"),
        Precision(
            "bnb4", "_bnb4", _bnb4, _within(0.6), "bitsandbytes' NF4 weights, 64 to a scale; embeddings as in `q4`"
        ),
    )
}


def choose_precisions(names: tuple[str, ...] | list[str]) -> list[Precision]:
    """Look precisions up by name, each once, in the order given; raises ExportError for an unknown one."""
    if not names:
        raise ExportError(f"no precision given; choose from {', '.join(PRECISIONS)}")
    for name in names:
        if name not in PRECISIONS:
            raise ExportError(f"precision {name!r} is unknown; choose from {', '.join(PRECISIONS)}")
    return [PRECISIONS[name] for name in dict.fromkeys(names)]
