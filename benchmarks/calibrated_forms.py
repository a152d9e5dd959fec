"""What calibration gains: image features and logits in int8, int8_smooth, q4 and q4_gptq, compared with float32's.

    python -m benchmarks.calibrated_forms BUNDLE data/test.json --picture-root data/pictures

BUNDLE has fp32. Half of the questions calibrate, the other half are compared: what a graph gives for the same inputs,
errors relative (root mean square), and how many of the answers' tokens are others. `--outliers 50` makes three channels
of every norm of the encoder so many times as large, and what reads them so much smaller: the same function, but with
activations as large encoders have them.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper

from switchkd.export.contract.bundle import DECODER, VISION_ENCODER, Bundle
from switchkd.export.graphs.onnx_graph import OnnxGraph, Storage
from switchkd.export.graphs.parts import parts_in
from switchkd.export.graphs.tracing import quiet
from switchkd.export.quantisation.activations import record_activations
from switchkd.export.quantisation.precisions import CALIBRATED, METHODS, change_parts
from switchkd.export.quantisation.weight_only import constant_matrices
from switchkd.export.search.calibration import Calibration, feeds, read_calibration
from switchkd.export.verification.graph_runner import GraphRunner

OUTLIERS = [3, 40, 77]

Array = npt.NDArray[Any]


def with_outliers(graph: OnnxGraph, factor: float) -> None:
    """Make some channels of every LayerNormalization larger, and the rows of the matrices that read them smaller."""
    constants = graph.constants()
    for norm in graph.proto.graph.node:
        read = [weight for node, weight in constant_matrices(graph, "MatMul") if node.input[0] == norm.output[0]]
        if norm.op_type == "LayerNormalization" and read:
            for name in norm.input[1:]:
                scale(graph, constants[name], factor)
            for weight in read:
                scale(graph, weight, 1 / factor)


def scale(graph: OnnxGraph, tensor: onnx.TensorProto, factor: float) -> None:
    """Multiply some rows of a constant."""
    values = graph.array(tensor).copy()
    values[OUTLIERS] *= factor
    graph.weights.pop(tensor.name, None)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def run(path: Path, given: list[dict[str, Array]]) -> list[Array]:
    """The first output for every input."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    output = session.get_outputs()[0].name
    return [np.asarray(session.run([output], feed)[0])[0] for feed in given]


def compare(name: str, runner: GraphRunner, calibration: Calibration, outliers: float, folder: Path) -> None:
    """Print a line for each method of one graph."""
    path = folder / "float32.onnx"
    graph = OnnxGraph.read(runner.bundle.graph_path(name))
    if outliers and name == VISION_ENCODER:
        with_outliers(graph, outliers)
    graph.write(path, Storage())
    begun = time.perf_counter()
    activations = record_activations(path, feeds(runner, name, calibration.calibrate))
    recorded = time.perf_counter() - begun
    given = list(feeds(runner, name, calibration.score))
    expected = chosen(name, run(path, given), calibration)
    for method in METHODS[1:]:
        begun, graph = time.perf_counter(), OnnxGraph.read(path)
        with quiet():
            change_parts(graph, dict.fromkeys(parts_in(name), method), activations)
            graph.write(folder / "changed.onnx", Storage())
        seconds = time.perf_counter() - begun + (recorded if method in CALIBRATED else 0)
        got = chosen(name, run(folder / "changed.onnx", given), calibration)
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        other = "" if name == VISION_ENCODER else f"{(got.argmax(1) != expected.argmax(1)).sum()} of {len(got)}"
        kept = len(list(constant_matrices(graph, "MatMul")))
        size = (folder / "changed.onnx").stat().st_size / 1e6
        print(f"| {name} | {method} | {error:.4f} | {other} | {kept} | {size:.2f} | {seconds:.1f} |", flush=True)


def chosen(name: str, outputs: list[Array], calibration: Calibration) -> Array:
    """Features as they are, and of logits those that an answer's tokens are chosen from."""
    if name == DECODER:
        outputs = [rows[-len(pair.tokens) - 1 : -1] for rows, pair in zip(outputs, calibration.score, strict=True)]
    return np.concatenate(outputs)


def main() -> None:
    """Compare, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("questions", type=Path, help="LLaVA JSON or JSONL")
    parser.add_argument("--picture-root", type=Path)
    parser.add_argument("--pairs", type=int, default=400, help="questions of them (default: %(default)s)")
    parser.add_argument("--outliers", type=float, default=0)
    args = parser.parse_args()
    runner = GraphRunner(Bundle.open(args.bundle, "fp32"))
    calibration = read_calibration(runner.bundle, args.questions, args.picture_root, args.pairs)
    print(f"{len(calibration.calibrate)} questions to calibrate, {len(calibration.score)} others to compare\n")
    print("| graph | method | error | other tokens | in float32 | MB | seconds |\n|---|---|---|---|---|---|---|")
    for name in (VISION_ENCODER, DECODER):
        with tempfile.TemporaryDirectory() as folder:
            compare(name, runner, calibration, args.outliers, Path(folder))


if __name__ == "__main__":
    main()
