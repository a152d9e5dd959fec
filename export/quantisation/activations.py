"""Records what goes into a float32 graph's constant matrices when it runs on calibration data.

Shapes in names: R rows, K width of an activation.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper

from ..graphs.onnx_graph import OnnxGraph
from .weight_only import constant_matrices

Floats = npt.NDArray[np.float32]
Activations = Mapping[str, Floats]  # rows_RK by tensor name
ROWS = 1024
_GOLDEN = (5**0.5 - 1) / 2


def record_activations(
    path: Path, feeds: Iterable[Mapping[str, npt.NDArray[Any]]], rows: int = ROWS
) -> dict[str, Floats]:
    """Run the float32 graph at `path` and return rows_RK of every tensor that a constant matrix is multiplied with.

    At most `rows` of each, spread evenly over all feeds and positions, the same every time; among them is the one with
    the largest number, which sets the range when activations are quantised. A feed's tensors are in memory together,
    so pictures are better fed one by one.
    """
    graph = OnnxGraph.read(path)
    tensors = list(dict.fromkeys(node.input[0] for node, _ in constant_matrices(graph, "MatMul")))
    samples = {name: _Sample(rows) for name in tensors}
    inputs = {value.name for value in graph.proto.graph.input}
    computed = [name for name in tensors if name not in inputs]
    session = _session(path, graph, computed)
    for feed in feeds:
        found = dict(zip(computed, session.run(computed, dict(feed)), strict=True)) if computed else {}
        for name, sample in samples.items():
            values = found.pop(name) if name in found else feed[name]
            sample.add(values.reshape(-1, values.shape[-1]))
    return {name: sample.rows_RK for name, sample in samples.items() if sample.seen}


def _session(path: Path, graph: OnnxGraph, tensors: list[str]) -> onnxruntime.InferenceSession:
    """Open a graph with these tensors as outputs too."""
    outputs = graph.proto.graph.output
    known = {value.name for value in outputs}
    outputs.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors if name not in known
    )
    return open_graph(path, graph)


def open_graph(
    path: Path, graph: OnnxGraph, *, as_written: bool = False, packed: bool = True
) -> onnxruntime.InferenceSession:
    """Open a graph that was changed since it was read from `path`, beside which its weights stay.

    `as_written` leaves out the runtime's optimisations. Not `packed`, weights are used as they lie in the file: no copy
    of them is made in the order in which a product takes them.
    """
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    # Threads that wait by spinning take the processor from whatever trains beside an export.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False  # it grows in powers of two and gives nothing back
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Sample:
    """At most so many rows of a stream whose length is not known: those with the smallest keys.

    The keys are multiples of the golden ratio modulo 1, of which any stretch is spread evenly (Weyl's sequence), and
    which step neither with the patches of a picture nor with powers of two.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.keys_R: npt.NDArray[np.floating] = np.empty(0)
        self.rows_RK: Floats = np.empty((0, 0), dtype=np.float32)

    def add(self, rows_RK: Floats) -> None:
        """Take in the next rows of the stream."""
        keys_R = np.arange(self.seen, self.seen + len(rows_RK)) * _GOLDEN % 1.0
        if self.seen:
            rows_RK, keys_R = np.concatenate([self.rows_RK, rows_RK]), np.concatenate([self.keys_R, keys_R])
        self.seen += len(keys_R) - len(self.keys_R)
        chosen_R = np.argsort(keys_R)[: self.size]
        largest = int(np.argmax(np.abs(rows_RK).max(axis=1)))
        if largest not in chosen_R:
            chosen_R[-1] = largest
        self.rows_RK, self.keys_R = rows_RK[chosen_R], keys_R[chosen_R]
