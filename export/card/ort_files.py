"""Graphs in ONNX Runtime's own format, `.ort`, which its minimal builds for phones and boards read.

Such a build has no reader of ONNX and holds only the operators that a list asks for: the list is written too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import onnxruntime
from onnxruntime.tools.ort_format_model import create_config_from_models

from ..contract.bundle import DECODER, VISION_ENCODER, Bundle, GraphFile, Manifest, Variant
from ..graphs.onnx_graph import MAX_PROTOBUF_BYTES
from ..graphs.tracing import ExportError, quiet
from ..verification.graph_runner import Array, GraphRunner
from ..verification.parity import Difference, SamplePrompt

FOLDER = "ort"
OPERATORS = "required_operators.config"
_SAME = 0.01  # relative RMS; the operators are the same, but where they are joined otherwise, they round otherwise


def ort_file(graph: GraphFile) -> str:
    """The .ort file of a graph, relative to the bundle."""
    return f"{FOLDER}/{PurePosixPath(graph.file).stem}.ort"


def has_ort_files(manifest: Manifest) -> bool:
    """Whether the bundle has its graphs as .ort files too."""
    return bool(manifest.graphs) and ort_file(manifest.graphs[0]) in manifest.files


def write_ort_files(path: Path, graphs: Sequence[GraphFile]) -> None:
    """Write ort/*.ort of every graph of a bundle folder, and the list of operators that a reduced build needs.

    Raises ExportError for a graph over 2 GB, which the format cannot hold.
    """
    for graph in graphs:
        size = sum((path / name).stat().st_size for name in (graph.file, *graph.data))
        if size > MAX_PROTOBUF_BYTES:
            raise ExportError(
                f"{graph.file}: {size / 1e9:.1f} GB, and an .ort file holds 2 GB at most; leave out --ort, or "
                f"{graph.precision} from --dtype"
            )
    (path / FOLDER).mkdir()
    with quiet():
        for graph in graphs:
            _convert(path / graph.file, path / ort_file(graph))
        create_config_from_models([path / ort_file(graph) for graph in graphs], path / FOLDER / OPERATORS, False)
    listed = (path / FOLDER / OPERATORS).read_text(encoding="utf-8")
    (path / FOLDER / OPERATORS).write_text(listed.replace(f"{path / FOLDER}/", ""), encoding="utf-8")


def _convert(source: Path, target: Path) -> None:
    """Let onnxruntime read, optimise and save a graph: as far as `extended`.

    What comes after that lays tensors out for the processor at hand. The session of a converter stays unused.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def is_checked(manifest: Manifest, variant: Variant) -> bool:
    """Whether a variant's .ort files are compared: each graph is a part of one such variant at least."""
    return variant.prefill is None or variant.prefill not in manifest.precisions


def check_ort_files(path: Path, variant: Variant, prompts: Sequence[SamplePrompt]) -> None:
    """Run a variant's .ort files after its .onnx files; raises ValuesError, and what `GraphRunner.run` raises.

    With a reader in it, that one's decoder reads the prompts, and is what is compared.
    """
    bundle = Bundle.open(path, variant.precision).in_form(variant.form)
    graphs = tuple(replace(graph, file=ort_file(graph), data=()) for graph in bundle.manifest.graphs)
    converted = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
    features, logits = Difference(), Difference()
    wanted = _results(bundle, variant, prompts)  # one after the other, since both may be large
    for (got_PND, got_RV), (wanted_PND, wanted_RV) in zip(_results(converted, variant, prompts), wanted, strict=True):
        if got_PND is not None and wanted_PND is not None:
            features.add(got_PND, wanted_PND)
        logits.add(got_RV, wanted_RV)
    features.check(converted.graph(VISION_ENCODER).file, float("inf"), _SAME)
    logits.check(converted.graph(DECODER).file, float("inf"), _SAME)


def _results(bundle: Bundle, variant: Variant, prompts: Sequence[SamplePrompt]) -> list[tuple[Array | None, Array]]:
    """A prompt's features_PND, where it has pictures, and its last logits_RV."""
    runner = GraphRunner(bundle, None if variant.prefill is None else bundle.prefill())
    runner.encode_ahead(prompt.pixels_PCHW for prompt in prompts if prompt.pixels_PCHW is not None)
    return [
        (
            None if prompt.pixels_PCHW is None else runner.encode(prompt.pixels_PCHW),
            runner.logits(runner.merge(prompt.ids, prompt.pixels_PCHW), np.arange(len(prompt.ids))[-8:]),
        )
        for prompt in prompts
    ]
