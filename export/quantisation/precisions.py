"""The table of precisions: how each is made from the float32 graphs, and how far it may be from the model.

A mix has a method for each part of the model, and is a precision too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnxruntime.quantization import QuantType

from ..contract.bundle import EMBED_TOKENS, GRAPHS, VISION_ENCODER, Manifest
from ..graphs.onnx_graph import OnnxGraph
from ..graphs.parts import EMBEDDINGS, PARTS, part_of
from ..graphs.tracing import ExportError
from .activations import Activations
from .embedding_tables import table_of_4_bits, table_of_8_bits
from .gptq import gptq
from .half import halve
from .smoothing import smooth
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


_int8 = _products(dynamic(QuantType.QInt8), table_of_8_bits(QuantType.QInt8))
_uint8 = _products(dynamic(QuantType.QUInt8), table_of_8_bits(QuantType.QUInt8))
# A zero point in every block brings the weights nearer than symmetric blocks do.
_q4 = _products(blocks_of_4_bits(symmetric=False), table_of_4_bits)
_bnb4 = _products(normal_floats, table_of_4_bits)


def _q4f16(name: str, graph: OnnxGraph) -> None:
    _half(name, graph)
    _q4(name, graph)


def _within(relative_rms: float) -> Bounds:
    return Bounds(float("inf"), float("inf"), relative_rms, same_tokens=False)


_FAST_8_BIT = "uint8 activations, quantised at run time, × {} per output channel; a scale per row of embeddings"
_7_BIT = "int8 weights of 7 bits (exact on every processor)"
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
        Precision("int8", "_int8", _int8, _within(0.3), _FAST_8_BIT.format(_7_BIT)),
        Precision("uint8", "_uint8", _uint8, _within(0.3), _FAST_8_BIT.format("uint8 weights")),
        Precision("q8", "_quantized", _int8, _within(0.3), "`int8` under the name that browsers load by default"),
        Precision("q4", "_q4", _q4, _within(0.6), _4_BIT.format("activations stay float32")),
        Precision("q4f16", "_q4f16", _q4f16, _within(0.6), _4_BIT.format("the rest as in `fp16`"), "float16"),
        Precision(
            "bnb4", "_bnb4", _bnb4, _within(0.6), "bitsandbytes' NF4 weights, 64 to a scale; embeddings as in `q4`"
        ),
    )
}


# A mix goes by the suffix that browsers load by default, as `q8` does: a bundle holds one of the two.
MIXED, AUTO, Q8 = "mixed", "auto", "q8"
_MIX = Precision(MIXED, "_quantized", _unchanged, _within(0.6), "each part of the model in a method of its own:")
_TOOLS = {
    "int8": dynamic(QuantType.QInt8),
    "int8_smooth": dynamic(QuantType.QInt8),
    "q4": blocks_of_4_bits(symmetric=False),
}
_TABLE_TOOLS = {"int8": table_of_8_bits(QuantType.QInt8), "q4": table_of_4_bits}
CALIBRATED = frozenset(["int8_smooth", "q4_gptq"])
METHODS = ("fp32", "int8", "int8_smooth", "q4", "q4_gptq")
TABLE_METHODS = ("fp32", "int8", "q4")  # of embeddings: a row is looked up, and no activation is multiplied with it


def precision_of(name: str) -> Precision:
    """A precision, or a mix, as a bundle names it; raises ExportError for one that is unknown."""
    if name == MIXED:
        return _MIX
    if name not in PRECISIONS:
        raise ExportError(f"precision {name!r} is unknown; choose from {', '.join(PRECISIONS)}, {MIXED}, {AUTO}")
    return PRECISIONS[name]


def change_parts(graph: OnnxGraph, methods: Mapping[str, str], activations: Activations) -> None:
    """Bring every part of a float32 graph into its method; `activations` of its tensors are needed by CALIBRATED."""
    for method in dict.fromkeys(methods.values()):
        names = {node.name for node in graph.proto.graph.node if methods.get(part_of(node) or "") == method}
        if method == "int8_smooth":
            names -= smooth(graph, activations, names)  # some matrices' products would be too far off
        if EMBEDDINGS in methods:
            tool, op_type = _TABLE_TOOLS.get(method), "Gather"
        else:
            tool, op_type = gptq(activations) if method == "q4_gptq" else _TOOLS.get(method), "MatMul"
        if tool is not None:
            quantize(graph, op_type, tool, names)


def dtype_of(precision: str) -> str:
    """What transformers.js is asked for to load a graph in a precision."""
    return Q8 if precision == MIXED else precision


def dtypes_of(manifest: Manifest, precision: str) -> str | dict[str, str]:
    """What transformers.js is asked for to load a bundle in a precision: for each graph, where one is another's."""
    encoder, own = dtype_of(manifest.encoder_of(precision)), dtype_of(precision)
    return own if encoder == own else {name: encoder if name == VISION_ENCODER else own for name in GRAPHS}


def choose_precisions(names: tuple[str, ...] | list[str]) -> list[Precision]:
    """Look precisions up by name, each once, in the order given; `auto` is a mix that is yet to be found.

    Raises ExportError for an unknown one, and for two that go by one name.
    """
    if not names:
        raise ExportError(f"no precision given; choose from {', '.join(PRECISIONS)}, {MIXED}, {AUTO}")
    if MIXED in names and AUTO in names:
        raise ExportError(f"{MIXED} and {AUTO} are one precision; name the mix yourself, or let it be found")
    if Q8 in names and (MIXED in names or AUTO in names):
        other = MIXED if MIXED in names else AUTO
        raise ExportError(f"{Q8} and {other} go by the same file names (_quantized); leave one of them out")
    return [precision_of(MIXED if name == AUTO else name) for name in dict.fromkeys(names)]


def parse_parts(text: str) -> dict[str, str]:
    """Read `decoder=q4,lm_head=int8`: the method of each part, fp32 where none is named; raises ExportError."""
    mix = {}
    for item in text.split(","):
        part, _, method = (word.strip() for word in item.partition("="))
        if part not in PARTS:
            raise ExportError(f"--parts: part {part!r} is unknown; write PART=METHOD with one of {', '.join(PARTS)}")
        if part in mix:
            raise ExportError(f"--parts: {part} is named twice; give it one method")
        if method not in methods_of(part):
            raise ExportError(f"--parts: {part} cannot be {method!r}; choose from {', '.join(methods_of(part))}")
        mix[part] = method
    return {part: mix.get(part, METHODS[0]) for part in PARTS}


def methods_of(part: str) -> tuple[str, ...]:
    """The methods that a part can have, float32 first."""
    return TABLE_METHODS if part == EMBEDDINGS else METHODS


def format_parts(parts: Mapping[str, str]) -> str:
    """A mix as `parse_parts` reads it."""
    return ",".join(f"{part}={method}" for part, method in parts.items())
