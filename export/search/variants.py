"""Mixes of methods as graphs on disk, each made from the traced float32 graph when it is first asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..contract.bundle import VISION_ENCODER, Bundle, GraphFile
from ..graphs.onnx_graph import OnnxGraph, Storage
from ..graphs.parts import PARTS, parts_in
from ..graphs.tracing import GraphDescription, quiet
from ..quantisation.activations import Activations, record_activations
from ..quantisation.precisions import CALIBRATED, METHODS, MIXED, change_parts
from ..quantisation.ranges import largest_numbers
from ..verification.graph_runner import Array, GraphRunner
from .calibration import Pair, feeds, picture_key, pictures

FLOAT32 = dict.fromkeys(PARTS, METHODS[0])


class Variants:
    """The graphs of one model in any mix of methods; what a float32 graph multiplies is recorded once."""

    def __init__(self, folder: Path, settings: Bundle, descriptions: Sequence[GraphDescription]) -> None:
        """`folder` holds the traced graphs; `settings` is the bundle as far as it is."""
        self.settings = settings
        self.pairs: Sequence[Pair] = ()  # to calibrate on
        self._folder, self._descriptions = folder.resolve(), list(descriptions)
        self._activations: dict[str, Activations] = {}
        self._features: dict[bytes, Array] = {}

    def file(self, description: GraphDescription, parts: Mapping[str, str]) -> Path:
        """The file of a graph with its parts in these methods."""
        methods = {part: parts[part] for part in parts_in(description.name)}
        traced = self.traced(description)
        if set(methods.values()) == {METHODS[0]}:
            return traced
        path = traced.with_stem("-".join((traced.stem, *methods.values())))
        if not path.exists():
            graph = OnnxGraph.read(traced)
            activations = self._recorded(description) if CALIBRATED & set(methods.values()) else {}
            with quiet():
                change_parts(graph, methods, activations)
                graph.write(path, Storage(inline_bytes=0))
        return path

    def traced(self, description: GraphDescription) -> Path:
        """The file of a graph in float32."""
        return self._folder / _name(description)

    def runner(self, parts: Mapping[str, str]) -> GraphRunner:
        """The mix with the decoder's first form, ready to run; features of float32 are remembered for all mixes."""
        bundle = self.bundle(parts)
        encoder = {parts[part] for part in parts_in(VISION_ENCODER)}
        return _Runner(bundle, self._features if encoder == {METHODS[0]} else {})

    def bundle(self, parts: Mapping[str, str]) -> Bundle:
        """The mix with the decoder's first form as a bundle, unchecked: its files are the exporter's own."""
        names = {description.name: description for description in reversed(self._descriptions)}
        return self._bundle(list(names.values()), parts)

    def bytes(self, parts: Mapping[str, str]) -> int:
        """Bytes of the mix's graphs with the weights beside them, the decoder in its first form."""
        names = [Path(graph.file).name for graph in self.bundle(parts).manifest.graphs]
        return sum(file.stat().st_size for name in names for file in self._folder.glob(f"{name}*"))

    def forget(self) -> None:
        """Remove the files of all mixes, to be made again when asked for: a large model's would fill a disk."""
        traced = {_name(description) for description in self._descriptions}
        for file in self._folder.glob("*.onnx*"):
            if f"{file.name.partition('.onnx')[0]}.onnx" not in traced:
                file.unlink()

    def _bundle(self, descriptions: Sequence[GraphDescription], parts: Mapping[str, str]) -> Bundle:
        graphs = tuple(
            GraphFile(
                description.name,
                MIXED,
                description.form,
                str(self.file(description, parts)),
                (),
                *description.tensors(),
            )
            for description in descriptions
        )
        manifest = replace(self.settings.manifest, graphs=graphs)
        return replace(self.settings, precision=MIXED, manifest=manifest)

    def _recorded(self, description: GraphDescription) -> Activations:
        """What a float32 graph multiplies while it reads the pairs, by the name of the tensor."""
        name = _name(description)
        if name not in self._activations:
            self._activations[name] = record_activations(self._folder / name, self._feeds(description, self.pairs))
        return self._activations[name]

    def largest_numbers(self, description: GraphDescription, pairs: Sequence[Pair]) -> dict[str, float]:
        """The largest number of every float tensor of a float32 graph while it reads these pairs."""
        return largest_numbers(self.traced(description), self._feeds(description, pairs))

    def _feeds(self, description: GraphDescription, pairs: Sequence[Pair]) -> Iterator[dict[str, Array]]:
        others = [other for other in self._descriptions if other.name != description.name]
        runner = _Runner(self._bundle([description, *others], FLOAT32), self._features)
        runner.encode_ahead(pictures(pairs))
        runner.close_encoder()
        return feeds(runner, description.name, pairs)


class _Runner(GraphRunner):
    """A runner that forgets no picture's features, and shares them with others that have the same encoder."""

    def __init__(self, bundle: Bundle, features: dict[bytes, Array]) -> None:
        super().__init__(bundle)
        self._known = features

    def encode(self, pixels_PCHW: Array) -> Array:
        """Pictures to features_PND."""
        key = picture_key(pixels_PCHW)
        if key not in self._known:
            self._known[key] = self.run(VISION_ENCODER, [pixels_PCHW])[0]
        return self._known[key]

    def close_encoder(self) -> None:
        """Give back the memory of a graph whose pictures are all remembered."""
        self._sessions = {key: session for key, session in self._sessions.items() if key[0] != VISION_ENCODER}


def _name(description: GraphDescription) -> str:
    return f"{description.stem or description.name}.onnx"
