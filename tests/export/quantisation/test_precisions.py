"""Every precision, with weights beside the graphs: names, sizes, types, answers, and bounds that broken files break."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image

from switchkd.cli.main import main
from switchkd.export.assembly import export_checkpoint
from switchkd.export.contract.bundle import DECODER, GRAPHS, MANIFEST, Bundle
from switchkd.export.graphs.onnx_graph import OnnxGraph, Storage, unload
from switchkd.export.quantisation import weight_only
from switchkd.export.quantisation.embedding_tables import table_of_4_bits, table_of_8_bits
from switchkd.export.quantisation.precisions import PRECISIONS, Bounds
from switchkd.export.quantisation.weight_only import dynamic
from switchkd.export.verification.graph_runner import GraphRunner, ValuesError, exercise
from switchkd.export.verification.parity import Expected, SamplePrompt, compare, record, sample_prompts
from switchkd.serve import Engine

SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "uint8": "_uint8",
    "q8": "_quantized",
    "q4": "_q4",
    "q4f16": "_q4f16",
    "bnb4": "_bnb4",
}
PART = 40_000


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in every precision, all large weights outside, in parts of 40 kB."""
    path = tmp_path_factory.mktemp("precisions") / "bundle"
    storage = Storage(inline_bytes=0, part_bytes=PART)
    export_checkpoint(tiny_checkpoint, path, precisions=list(PRECISIONS), storage=storage, pairs=6)
    return path


@pytest.fixture(scope="module")
def expected(bundle: Path) -> tuple[list[SamplePrompt], list[Expected]]:
    reference = GraphRunner(Bundle.open(bundle, "fp32"))
    prompts = sample_prompts(reference.bundle)
    return prompts, record(reference, prompts)


def test_names_are_those_of_transformers_js(bundle: Path) -> None:
    assert list(SUFFIXES) == list(PRECISIONS)
    graphs = {f"{name}{suffix}.onnx" for name in GRAPHS for suffix in SUFFIXES.values()}
    assert {file.name for file in (bundle / "onnx").glob("*.onnx")} == graphs
    config = json.loads((bundle / "config.json").read_text())["transformers.js_config"]
    assert config["kv_cache_dtype"] == {"fp16": "float16", "q4f16": "float16"}
    parts = config["use_external_data_format"]
    assert set(parts) == graphs
    assert parts["decoder_model_merged.onnx"] > 1
    data = {f"{name}_data{f'_{part}' if part else ''}" for name in parts for part in range(parts[name])}
    assert {file.name for file in (bundle / "onnx").iterdir()} - graphs == data


def test_manifest_lists_the_data_files(bundle: Path) -> None:
    manifest = Bundle.open(bundle, check_hashes=True).manifest
    for graph in manifest.graphs:
        locations = {
            entry.value
            for tensor in onnx.load(bundle / graph.file, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert {Path(name).name for name in graph.data} == locations
        assert all(manifest.files[name].bytes <= PART for name in graph.data)
    listed = {name for graph in manifest.graphs for name in (graph.file, *graph.data)}
    assert {name for name in manifest.files if name.startswith("onnx/")} == listed


def test_outside_and_inside_hold_the_same(bundle: Path, tiny_bundle: Path) -> None:
    for name in GRAPHS:
        outside = onnx.load(bundle / f"onnx/{name}.onnx").graph
        inside = onnx.load(tiny_bundle / f"onnx/{name}.onnx").graph
        assert [node.name for node in outside.node] == [node.name for node in inside.node]
        others = {tensor.name: tensor for tensor in inside.initializer}
        assert {tensor.name for tensor in outside.initializer} == set(others)
        for tensor in outside.initializer:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), numpy_helper.to_array(others[tensor.name]))


def test_a_tensor_larger_than_a_part_gets_its_own(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.full(size, size, np.float32), f"w{size}") for size in (300, 5000, 400, 10)]
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], weights)))
    names = ("g.onnx_data", "g.onnx_data_1", "g.onnx_data_2")
    assert unload(model, tmp_path / "g.onnx", 4000) == names
    assert [file.stat().st_size for file in sorted(tmp_path.iterdir())] == [1200, 20000, 1600]


@pytest.mark.parametrize("precision", ["fp16", "q4f16"])
def test_only_caches_are_float16_from_outside(bundle: Path, precision: str) -> None:
    opened = Bundle.open(bundle, precision)
    assert opened.cache_dtype == "float16"
    for name in GRAPHS:
        graph = opened.graph(name)
        halves = {tensor.name for tensor in (*graph.inputs, *graph.outputs) if tensor.dtype == "float16"}
        cache = opened.model.cache
        assert halves == ({*cache.past_names(), *cache.present_names()} if name == DECODER else set())


def test_sums_of_squares_and_angles_stay_float32(bundle: Path) -> None:
    path = bundle / "onnx" / "decoder_model_merged_fp16.onnx"
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    found = [node for node in model.graph.node if node.op_type in ("Pow", "ReduceMean", "Sqrt", "Reciprocal", "Cos")]
    assert len(found) == 4 * 5 + 1
    assert {types[node.output[0]] for node in found} == {TensorProto.FLOAT}
    # Between them there is no way through float16, in which a large number's square does not fit.
    makers = {node.output[0]: node for node in model.graph.node}
    assert {makers[node.input[0]].op_type for node in found if node.op_type == "ReduceMean"} == {"Pow"}


def test_large_activations_survive_float16(bundle: Path) -> None:
    runner, wide = (GraphRunner(Bundle.open(bundle, name)) for name in ("fp16", "fp32"))
    embeds_1TD = np.random.default_rng(0).standard_normal((1, 7, 32), dtype=np.float32) * 2000
    rows_R = np.arange(7)
    difference = runner.logits(embeds_1TD, rows_R) - wide.logits(embeds_1TD, rows_R)
    assert np.abs(difference).max() < 0.05 * np.abs(wide.logits(embeds_1TD, rows_R)).max()


@pytest.mark.parametrize(
    ("precision", "product", "table"),
    [
        ("int8", "MatMulInteger", "Gather"),
        ("uint8", "MatMulInteger", "Gather"),
        ("q8", "MatMulInteger", "Gather"),
        ("q4", "MatMulNBits", "Floor"),
        ("q4f16", "MatMulNBits", "Floor"),
        ("bnb4", "MatMulBnb4", "Floor"),
    ],
)
def test_all_constant_matrices_are_quantised(bundle: Path, precision: str, product: str, table: str) -> None:
    opened = Bundle.open(bundle, precision)
    for name, op_type in (("vision_encoder", product), (DECODER, product), ("embed_tokens", table)):
        graph = onnx.load(opened.graph_path(name)).graph
        assert any(node.op_type == op_type for node in graph.node)
        matrices = (tensor for tensor in graph.initializer if len(tensor.dims) == 2)
        floats = {t.name for t in matrices if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)}
        constant = [n.name for n in graph.node if n.op_type in ("MatMul", "Gather") and floats & set(n.input)]
        assert constant == []


def of_one_node(op_type: str, given: onnx.ValueInfoProto, constant: np.ndarray) -> onnx.ModelProto:
    """A model of one operator with its constant matrix."""
    inputs = [given.name, "matrix"] if op_type == "MatMul" else ["matrix", given.name]
    node = helper.make_node(op_type, inputs, ["rows"], name="product")
    onnx_type = helper.np_dtype_to_tensor_dtype(constant.dtype)
    rows = helper.make_tensor_value_info("rows", onnx_type, ["batch", "time", constant.shape[1]])
    graph = helper.make_graph([node], "g", [given], [rows], [numpy_helper.from_array(constant, "matrix")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def look_up(table_VD: np.ndarray) -> onnx.ModelProto:
    """A model that looks up rows of a table."""
    return of_one_node("Gather", helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "time"]), table_VD)


@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_table_of_8_bits_looks_up_rows_each_to_its_own_scale(
    weight_type: QuantType, dtype: type[np.floating]
) -> None:
    table_VD = np.random.default_rng(0).normal(size=(5000, 40)).astype(dtype)
    table_VD[7] = 0
    table_VD[4097] *= 1000  # in a scale for all rows no other would be seen
    model = table_of_8_bits(weight_type)(look_up(table_VD))
    numbers = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("table"))
    assert numpy_helper.to_array(numbers).dtype == (np.int8 if weight_type == QuantType.QInt8 else np.uint8)
    ids_BT = np.array([[0, 4999, 7], [4097, 4095, 4096]])
    got_BTD = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"ids": ids_BT})[0]
    wanted_BTD = table_VD[ids_BT]
    assert got_BTD.dtype == dtype
    step_BT1 = np.abs(wanted_BTD).max(-1, keepdims=True).astype(np.float32) / 127
    rounding = 0.1 if dtype == np.float16 else 0.001  # of the product, 127 steps of which are stored in 11 bits
    assert (np.abs(got_BTD.astype(np.float32) - wanted_BTD) <= step_BT1 * (0.5 + rounding)).all()
    assert (got_BTD[0, 2] == 0).all()


@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8])
def test_a_wide_matrix_is_quantised_a_few_columns_at_a_time(
    weight_type: QuantType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool holds what it is given eight times over, and a vocabulary's matrix is the largest of a model."""
    matrix_KM = np.random.default_rng(0).normal(size=(16, 11)).astype(np.float32)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "time", 16])
    model = of_one_node("MatMul", given, matrix_KM)
    whole = dynamic(weight_type)(model)
    widths = []

    def spied(part: onnx.ModelProto, *args: Any, **kwargs: Any) -> None:
        widths.append(part.graph.initializer[0].dims[1])
        quantize_dynamic(part, *args, **kwargs)

    monkeypatch.setattr(weight_only, "quantize_dynamic", spied)
    assert dynamic(weight_type, columns=4)(model) == whole
    assert widths == [4, 4, 3]
    x_BTK = np.random.default_rng(1).normal(size=(2, 3, 16)).astype(np.float32)
    got_BTM = onnxruntime.InferenceSession(whole.SerializeToString()).run(None, {"x": x_BTK})[0]
    np.testing.assert_allclose(got_BTM, x_BTK @ matrix_KM, atol=0.2)
    assert model.graph.initializer[0] == numpy_helper.from_array(matrix_KM, "matrix")


@pytest.mark.parametrize("width", [32, 40, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_table_of_4_bits_looks_up_the_nearest_of_sixteen_steps(width: int, dtype: type[np.floating]) -> None:
    table_VD = np.random.default_rng(0).normal(size=(5000, width)).astype(dtype)
    table_VD[7] = 0
    session = onnxruntime.InferenceSession(table_of_4_bits(look_up(table_VD)).SerializeToString())
    ids_BT = np.array([[0, 4999, 7], [4097, 4095, 4096]])
    got_BTD = session.run(None, {"ids": ids_BT})[0]
    wanted_BTD = table_VD[ids_BT]
    assert got_BTD.dtype == dtype
    assert got_BTD.shape == wanted_BTD.shape
    for start in range(0, width, 32):
        block = wanted_BTD[..., start : start + 32].astype(np.float32)
        step = (np.maximum(block.max(-1), 0) - np.minimum(block.min(-1), 0)) / 15
        off = np.abs(got_BTD[..., start : start + 32] - block).max(-1)
        assert (
            off <= step * (1.01 if dtype == np.float16 else 1.0001)
        ).all()  # half a step, and half for the zero point
        assert np.median(off / np.maximum(step, 1e-9)) > 0.3  # it has sixteen steps, not more
    assert (got_BTD[0, 2] == 0).all()


def test_sizes_come_down(bundle: Path) -> None:
    bytes_of = {name: sum(Bundle.open(bundle).manifest.graph_bytes(name).values()) for name in PRECISIONS}
    assert bytes_of["fp16"] < 0.65 * bytes_of["fp32"]
    assert bytes_of["q4"] < 0.75 * bytes_of["int8"] < 0.5 * bytes_of["fp32"]
    assert bytes_of["q4f16"] < bytes_of["q4"]


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_engine_answers_as_the_graphs_do(bundle: Path, precision: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    answers = {
        name: Engine.open(bundle, name, threads=1).answer("How many red circles?", [image], max_new_tokens=8).tokens
        for name in dict.fromkeys((precision, "fp32"))
    }
    assert len(answers[precision]) == 8
    if precision in ("fp16", "int8", "uint8", "q8"):
        assert answers[precision] == answers["fp32"]


def spoil(graph: OnnxGraph) -> None:
    """Turn the rows of the last quantised or halved matrix around: of the right shape and type, and wrong."""
    matrices = [tensor for tensor in graph.proto.graph.initializer if np.prod(tensor.dims) > 1000]
    tensor = matrices[-1]
    array = graph.array(tensor)[::-1].copy()
    graph.weights.pop(tensor.name, None)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("name", GRAPHS)
def test_a_broken_file_is_beyond_its_bounds(
    bundle: Path, tmp_path: Path, expected: tuple[list[SamplePrompt], list[Expected]], precision: str, name: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    file = Bundle.open(bundle, precision).graph(name).file
    graph = OnnxGraph.read(copy / file)
    spoil(graph)
    graph.write(copy / file, Storage())
    content = json.loads((copy / MANIFEST).read_text())
    content["files"][file]["bytes"] = (copy / file).stat().st_size
    (copy / MANIFEST).write_text(json.dumps(content))
    runner = GraphRunner(Bundle.open(copy, precision))
    with pytest.raises(ValuesError, match=f"{name}{SUFFIXES[precision]}"):
        compare(runner, *expected, PRECISIONS[precision].bounds)


def test_sound_files_are_well_within_their_bounds(bundle: Path) -> None:
    record = json.loads((bundle / "manifest.json").read_text())["verification"]
    assert record["fp16"]["float32"] == record["q4f16"]["float32"] == {}  # no number of it is too large for float16
    for name, found in record.items():
        bounds: Bounds = PRECISIONS[name].bounds
        for part in ("image_features", "inputs_embeds", "logits"):
            assert found[part]["relative_rms"] < 0.7 * bounds.relative_rms, (name, part)


def test_verify_and_card(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle)]) == 0
    out = capsys.readouterr().out
    card = (bundle / "README.md").read_text()
    for name in PRECISIONS:
        assert f"{name}: 16 runs" in out
        assert f"- `{name}`: " in card


def test_full_verification_goes_to_the_limits(bundle: Path, tiny_checkpoint: Path) -> None:
    runner = GraphRunner(Bundle.open(bundle, "int8"))
    # 4 numbers of pictures; 16 - 2 runs as ever; batches of 3 and 4; the longest prompt; the longest past and one more.
    assert exercise(runner, full=True) == 4 + 14 + 2 * 2 * 3 + 2 + 2 * 2
    prompts = sample_prompts(runner.bundle, full=True)
    assert [prompt.places_T.sum() // 16 for prompt in prompts] == [1, 1, 0, 2, 1, 1, 3, 4, 0]
    assert len(prompts[-1].ids) == 512 - 16


def test_export_only_verify(bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(bundle.rglob("*"))
    assert main(["export", str(tiny_checkpoint), str(bundle), "--only", "verify"]) == 0
    assert f"against {tiny_checkpoint}" in capsys.readouterr().out
    assert sorted(bundle.rglob("*")) == before


def test_worse_than_recorded_is_found(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    content = json.loads((copy / MANIFEST).read_text())
    content["verification"]["q4"]["logits"]["relative_rms"] = 0.1
    (copy / MANIFEST).write_text(json.dumps(content))
    assert main(["verify", str(copy)]) == 2
    assert "q4: logits are off by 2.8" in capsys.readouterr().err
    del content["verification"]["q4"]
    (copy / MANIFEST).write_text(json.dumps(content))
    assert main(["verify", str(copy)]) == 2
    assert "q4: the manifest records no score of image_features" in capsys.readouterr().err
