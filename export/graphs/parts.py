"""The parts of a model that can each be quantised in a way of their own, and how a graph's nodes tell theirs."""

import ast

import onnx

from ..contract.bundle import DECODER, EMBED_TOKENS, VISION_ENCODER

EMBEDDINGS = "embeddings"
# Every part, and the graph that its matrices lie in.
PARTS = {
    "vision_encoder": VISION_ENCODER,
    "projector": VISION_ENCODER,
    EMBEDDINGS: EMBED_TOKENS,
    "decoder": DECODER,
    "lm_head": DECODER,
}
# By the first word of a module's name in the graphs' own modules, and of a node's name in the fused decoder.
_PART_OF_MODULE = {
    "vision_tower": "vision_encoder",
    "projector": "projector",
    "language_model": "decoder",
    "layers": "decoder",
    "lm_head": "lm_head",
}
_SCOPES = "pkg.torch.onnx.name_scopes"  # what torch's exporter notes at a node: its modules' names, its own at the end


def name_by_part(graph: str, node: onnx.NodeProto) -> None:
    """Let the name of a node that torch traced begin with its part and module; nodes of no module keep theirs."""
    scopes: list[str] = next((ast.literal_eval(note.value) for note in node.metadata_props if note.key == _SCOPES), [])
    module, _, rest = (scopes[-2] if len(scopes) > 1 else "").partition(".")
    part = EMBEDDINGS if graph == EMBED_TOKENS else _PART_OF_MODULE.get(module)
    if part is not None:
        node.name = ".".join(filter(None, (part, rest, node.name)))


def part_of(node: onnx.NodeProto) -> str | None:
    """The part that a node of an exported graph belongs to, by its name; None for what is no part's."""
    first = node.name.partition(".")[0]
    return first if first in PARTS else _PART_OF_MODULE.get(first)


def parts_in(graph: str) -> tuple[str, ...]:
    """The parts whose matrices lie in a graph (one of GRAPHS)."""
    return tuple(part for part, place in PARTS.items() if place == graph)
