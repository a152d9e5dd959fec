"""MatMulNBits at accuracy_level 0 (float32 activations) and 4 (rounded to 8 bit), and int8: speed, error, tokens.

    python -m benchmarks.accuracy_level --threads 1
    python -m benchmarks.accuracy_level --bundle BUNDLE --questions data/test.json --picture-root data/pictures

The matrices are those of Qwen2.5-0.5B's layers, with random weights; one row is a token that is written, many are a
prompt. With a bundle that has fp32, its decoder answers questions in each form, and the tokens are compared.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantType

from switchkd.export.contract.bundle import DECODER, Bundle
from switchkd.export.graphs.onnx_graph import OnnxGraph, Storage
from switchkd.export.graphs.tracing import quiet
from switchkd.export.quantisation.weight_only import Tool, blocks_of_4_bits, dynamic, quantize
from switchkd.export.search.calibration import feeds, read_calibration
from switchkd.export.verification.graph_runner import GraphRunner

from .measuring import describe_machine, times_ms

# Inputs and outputs of the matrices of a layer, and of the head.
MATRICES = {
    "queries, keys, values": (896, 1152),
    "attention output": (896, 896),
    "gate or up": (896, 4864),
    "down": (4864, 896),
    "lm_head": (896, 151_936),
}


class Form(NamedTuple):
    """A way to compute a product: what its matrix becomes, and session options."""

    tool: Tool
    options: Mapping[str, str] = {}  # a tuple's: nobody changes it


FORMS = {
    "level 0": Form(blocks_of_4_bits(symmetric=False)),
    "level 4": Form(blocks_of_4_bits(symmetric=False, accuracy_level=4)),
    "int8": Form(dynamic(QuantType.QInt8)),
}

Array = npt.NDArray[Any]


def session(
    model: onnx.ModelProto | Path, threads: int, entries: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """A graph, open."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def product(weight_KN: Array) -> onnx.ModelProto:
    """A model of one MatMul."""
    inputs, outputs = weight_KN.shape
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        one (float[batch, time, {inputs}] x) => (float[batch, time, {outputs}] y) {{ [product] y = MatMul(x, w) }}"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(weight_KN, "w"))
    return proto


def activations(rows: int, width: int, random: np.random.Generator) -> Array:
    """Random rows with 1 channel of 100 twenty times as large, as language models have them."""
    rows_RK = random.standard_normal((rows, width), dtype=np.float32)
    rows_RK[:, ::100] *= 20
    return rows_RK


def measure_matrix(
    shape: tuple[int, int], args: argparse.Namespace, forms: Mapping[str, Form] = FORMS
) -> Iterator[str]:
    """Cells of a matrix's row of the table: times of one row and of a prompt, and errors, in each form."""
    first = next(iter(forms))
    random = np.random.default_rng(0)
    weight_KN = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    with quiet():
        sessions = {
            name: session(form.tool(product(weight_KN)), args.threads, form.options) for name, form in forms.items()
        }
    for rows, inner in ((1, args.inner), (args.prompt, 1)):
        if rows > 1 and shape == MATRICES["lm_head"]:  # of a prompt it reads the last row alone
            yield from ["–"] * len(forms)
            continue
        x = activations(rows, shape[0], random)[None]
        works = {name: partial(run_often, each, x, inner) for name, each in sessions.items()}
        taken = times_ms(works, args.repeats, torch.device("cpu"))
        for name in forms:
            ratio = statistics.median(a / b for a, b in zip(taken[first], taken[name], strict=True))
            yield f"{statistics.median(taken[name]) / inner:.2f} (× {ratio:.2f})"
    x = activations(64, shape[0], random)
    expected = x @ weight_KN
    for each in sessions.values():
        yield f"{off(np.asarray(each.run(None, {'x': x[None]})[0])[0], expected):.4f}"


def run_often(opened: onnxruntime.InferenceSession, x: Array, times: int) -> None:
    """One row takes too little time for a clock."""
    for _ in range(times):
        opened.run(None, {"x": x})


def off(got: Array, expected: Array) -> float:
    """Relative root-mean-square error."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def compare_answers(args: argparse.Namespace, forms: Mapping[str, Form] = FORMS) -> None:
    """Print how many tokens of answers to questions differ from float32's, each after the same tokens before it."""
    bundle = Bundle.open(args.bundle, "fp32")
    calibration = read_calibration(bundle, args.questions, args.picture_root, 2 * args.pairs)
    pairs = calibration.score
    given = list(feeds(GraphRunner(bundle), DECODER, pairs))
    logits: dict[str, Array] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, form in {"float32": None, **forms}.items():
            graph = OnnxGraph.read(bundle.graph_path(DECODER))
            with quiet():
                if form:
                    quantize(graph, "MatMul", form.tool)
                graph.write(Path(folder) / "decoder.onnx", Storage())
            opened = session(Path(folder) / "decoder.onnx", args.threads, form.options if form else None)
            found = [np.asarray(opened.run(["logits"], feed)[0])[0] for feed in given]
            answers = [rows_TV[len(pair.prompt.ids) - 1 : -1] for rows_TV, pair in zip(found, pairs, strict=True)]
            logits[name] = np.concatenate(answers)
    expected = logits["float32"]
    print(f"\n{len(pairs)} answers, {len(expected)} tokens\n\n| form | error of logits | other tokens than float32 |")
    print("|---|---|---|")
    for name in forms:
        other = int((logits[name].argmax(axis=1) != expected.argmax(axis=1)).sum())
        print(f"| {name} | {off(logits[name], expected):.4f} | {other} |")


def measure(description: str | None, forms: Mapping[str, Form] = FORMS) -> None:
    """Read the command's arguments, measure these forms, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=770, help="rows at once (default: %(default)s)")
    parser.add_argument("--inner", type=int, default=5, help="single rows per time taken (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bundle", type=Path, help="a bundle with fp32, whose decoder answers --questions")
    parser.add_argument("--questions", type=Path, help="LLaVA JSON or JSONL")
    parser.add_argument("--picture-root", type=Path)
    parser.add_argument("--pairs", type=int, default=200, help="questions of them (default: %(default)s)")
    args = parser.parse_args()
    if (args.bundle is None) != (args.questions is None):
        parser.error("--bundle and --questions belong together")
    torch.set_num_threads(args.threads)
    print(f"{describe_machine(torch.device('cpu'))}, onnxruntime {onnxruntime.__version__}")
    first = next(iter(forms))
    print(f"ms, median of {args.repeats} in turns (× {first}'s rate in the same round); a prompt of {args.prompt}\n")
    heads = [f"{what}, {name}" for what in ("token", "prompt", "error") for name in forms]
    print(f"| matrix | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name, shape in MATRICES.items():
        print(f"| {name} {shape[0]} × {shape[1]} | {' | '.join(measure_matrix(shape, args, forms))} |", flush=True)
    if args.bundle:
        compare_answers(args, forms)


if __name__ == "__main__":
    measure(__doc__)
