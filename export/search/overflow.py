"""What of a model float16 cannot hold: found once for all float16 precisions of a bundle, kept in float32, and said."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from ..contract.bundle import DECODER
from ..graphs.onnx_graph import OnnxGraph
from ..graphs.parts import part_of
from ..graphs.tracing import ExportError, GraphDescription
from ..quantisation.half import MARGIN, always_float32, overflowing, soften_mask
from ..quantisation.ranges import HELD, LOOKED_AT
from ..verification.parity import Expected, SamplePrompt
from .calibration import Pair
from .variants import Variants


@dataclass(frozen=True)
class Kept:
    """What stays float32 in a graph: how many operators, of which parts, and the largest number that they have."""

    operators: int
    parts: tuple[str, ...]
    largest: float


@dataclass(frozen=True)
class Overflow:
    """The largest number of every float tensor of the float32 graphs, and what stays float32 for it, by file name."""

    largest: Mapping[str, Mapping[str, float]]
    kept: Mapping[str, Kept]

    @classmethod
    def find(
        cls,
        variants: Variants,
        descriptions: Sequence[GraphDescription],
        prompts: Iterable[SamplePrompt],
        expected: Sequence[Expected],
    ) -> Self:
        """Look while the graphs read the first prompts and their answers.

        Raises ExportError where keys or values of the decoder are too large: a float16 precision's cache is float16.
        """
        pairs = [
            Pair(prompt, "", want.answer.tokens)
            for prompt, want in islice(zip(prompts, expected, strict=False), LOOKED_AT)
        ]
        largest: dict[str, Mapping[str, float]] = {}
        kept: dict[str, Kept] = {}
        for description in descriptions:
            path = variants.traced(description)
            graph = OnnxGraph.read(path)
            soften_mask(graph)
            graph.largest = largest[path.name] = variants.largest_numbers(description, pairs)
            if description.name == DECODER:
                _check_cache(path, graph, description)
            if found := _kept(graph):
                kept[path.name] = found
        return cls(largest, kept)

    def record(self, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """What the manifest says of a precision whose graphs were made from these files."""
        return {
            path.stem: {"operators": kept.operators, "parts": list(kept.parts), "largest": kept.largest}
            for path in paths
            if (kept := self.kept.get(path.name)) is not None
        }


def _check_cache(path: Path, graph: OnnxGraph, description: GraphDescription) -> None:
    cached = {name: graph.largest[name] for name in description.facts.cache.present_names()}
    name, number = max(cached.items(), key=lambda item: item[1])
    if not number * MARGIN <= HELD:
        raise ExportError(
            f"{path.stem}: {name} reaches {number:,.0f}, and the float16 of a KV cache ends at {HELD:,.0f} (other "
            f"prompts may reach {MARGIN} times further); leave fp16 and q4f16 out of --dtype"
        )


def _kept(graph: OnnxGraph) -> Kept | None:
    anyway = set(always_float32(graph.proto.graph))
    nodes = [node for node in overflowing(graph) if node.name not in anyway]
    if not nodes:
        return None
    parts = tuple(dict.fromkeys(part for node in nodes if (part := part_of(node)) is not None))
    touched = {name for node in nodes for name in (*node.input, *node.output)}
    return Kept(len(nodes), parts, max(graph.largest.get(name, 0.0) for name in touched))
