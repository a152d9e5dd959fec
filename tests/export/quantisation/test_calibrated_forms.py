"""Forms of matrices that look at activations: recorded, smoothed for int8, and rounded by GPTQ."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantType

from switchkd.export.graphs.checkpoint import open_checkpoint
from switchkd.export.graphs.fused_decoder import FusedDecoder
from switchkd.export.graphs.onnx_graph import OnnxGraph, Storage, unload
from switchkd.export.graphs.tracing import PortableDecoder, VisionEncoder, quiet
from switchkd.export.quantisation.activations import record_activations
from switchkd.export.quantisation.gptq import gptq
from switchkd.export.quantisation.smoothing import smooth
from switchkd.export.quantisation.weight_only import blocks_of_4_bits, constant_matrices, dynamic, quantize

Array = npt.NDArray[Any]
Feed = dict[str, Array]
GRAPHS = ("vision_encoder", "portable", "fused")
OUTLIER = 50.0
CHANNELS = [3, 17]


def make_outliers(channels: list[int], grown: tuple[Any, ...], shrunk: tuple[Any, ...], factor: float) -> None:
    """Some channels get larger where they are made and count for less where they are used: nothing else changes."""
    for module in grown:
        module.weight[channels] *= factor
        if getattr(module, "bias", None) is not None:
            module.bias[channels] *= factor
    for module in shrunk:
        module.weight[:, channels] /= factor


@pytest.fixture(scope="module")
def graphs(wide_heads_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of float32 graphs that hold what the tiny checkpoint holds, but with outliers in their activations."""
    folder = tmp_path_factory.mktemp("outliers")
    source = open_checkpoint(wide_heads_checkpoint)
    facts, model = source.facts(), source.model
    tower: Any = model.model.vision_tower
    language_model: Any = model.model.language_model
    with torch.no_grad():
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            readers = (attention.q_proj, attention.k_proj, attention.v_proj)
            make_outliers(CHANNELS, (layer.layer_norm1,), readers, OUTLIER)
            make_outliers(CHANNELS, (layer.layer_norm2,), (layer.mlp.fc1,), OUTLIER)
        for layer in language_model.layers:
            attention = layer.self_attn
            readers = (attention.q_proj, attention.k_proj, attention.v_proj)
            make_outliers(CHANNELS, (layer.input_layernorm,), readers, OUTLIER)
            mlp = layer.mlp
            make_outliers(CHANNELS, (layer.post_attention_layernorm,), (mlp.gate_proj, mlp.up_proj), OUTLIER)
            make_outliers(CHANNELS, (mlp.up_proj,), (mlp.down_proj,), OUTLIER)
        # In the encoder also some that no scaling reaches: values of attention, ahead of its output's matrix.
        attention = tower.encoder.layers[0].self_attn
        make_outliers(CHANNELS, (attention.v_proj,), (attention.out_proj,), 10 * OUTLIER)
    text = source.config.text_config
    VisionEncoder(source.config.vision_config, facts).write(model, folder / "vision_encoder.onnx")
    PortableDecoder(text, facts).write(model, folder / "portable.onnx")
    FusedDecoder(text, facts).write(model, folder / "fused.onnx")
    return folder


def feeds(path: Path, seed: int, count: int = 4) -> Iterator[Feed]:
    """Random inputs of a graph."""
    random = np.random.default_rng(seed)
    inputs = {value.name: value.shape for value in onnxruntime.InferenceSession(path).get_inputs()}
    for _ in range(count):
        if "pixel_values" in inputs:
            yield {"pixel_values": random.standard_normal((2, 3, 24, 24), dtype=np.float32)}
            continue
        given: Feed = {
            "inputs_embeds": random.standard_normal((1, 20, 32), dtype=np.float32),
            "attention_mask": np.ones((1, 20), dtype=np.int64),
            "position_ids": np.arange(20)[None],
            "num_logits_to_keep": np.array(0),
        }
        for name, shape in inputs.items():
            if name.startswith("past"):
                given[name] = np.zeros((1, shape[1], 0, shape[3]), dtype=np.float32)
        yield {name: given[name] for name in inputs}


def outputs(path: Path, seed: int) -> Array:
    """The first output for several inputs."""
    session = onnxruntime.InferenceSession(path)
    return np.stack([np.asarray(session.run(None, feed)[0]) for feed in feeds(path, seed)])


def off(got: Array, expected: Array) -> float:
    """Relative root-mean-square error."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# --- recorded activations ---


def small_graph(path: Path) -> tuple[Array, Array]:
    """A graph of two matrices, its weights in a file beside it, as the exporter's own."""
    random = np.random.default_rng(0)
    first, second = (random.standard_normal(shape, dtype=np.float32) for shape in ((6, 70), (70, 5)))
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        small (float[batch, time, 6] x) => (float[batch, time, 5] y)
        { h = MatMul(x, first)  r = Relu(h)  y = MatMul(r, second) }"""
    )
    tensors = zip((first, second), ("first", "second"), strict=True)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for array, name in tensors)
    model = ir.from_proto(proto)
    assert unload(model, path, Storage().part_bytes)
    onnx.save_model(ir.to_proto(model), path)
    return first, second


def test_recorded_rows_are_spread_over_feeds_and_places(tmp_path: Path) -> None:
    first, _ = small_graph(tmp_path / "small.onnx")
    random = np.random.default_rng(1)
    xs = [random.standard_normal((2, length, 6), dtype=np.float32) for length in (20, 20, 40)]
    xs[2][1, 7] *= 100
    rows = record_activations(tmp_path / "small.onnx", ({"x": x} for x in xs), rows=32)
    assert {name: found.shape for name, found in rows.items()} == {"x": (32, 6), "r": (32, 70)}
    everything = np.concatenate([x.reshape(-1, 6) for x in xs])
    places = np.array([int(np.flatnonzero((everything == row).all(axis=1))[0]) for row in rows["x"]])
    assert len(set(places)) == 32
    assert 80 + 47 in places  # the row with the largest number
    for start in range(0, 160, 40):  # 8 of 32 would be just this part's share
        assert 6 <= ((places >= start) & (places < start + 40)).sum() <= 10
    np.testing.assert_allclose(rows["r"], np.maximum(everything[places] @ first, 0), rtol=1e-4, atol=1e-4)
    again = record_activations(tmp_path / "small.onnx", ({"x": x} for x in xs), rows=32)
    np.testing.assert_array_equal(rows["r"], again["r"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.onnx", "small.onnx_data"]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_constant_matrix_is_recorded(graphs: Path, name: str) -> None:
    path = graphs / f"{name}.onnx"
    rows = record_activations(path, feeds(path, 0), rows=50)
    found = list(constant_matrices(OnnxGraph.read(path), "MatMul"))
    assert {node.input[0] for node, _ in found} == set(rows)
    assert all(rows[node.input[0]].shape == (50, weight.dims[0]) for node, weight in found)


# --- int8 after smoothing ---


def in_int8(path: Path, folder: Path, left_out: Collection[str]) -> tuple[Path, list[str]]:
    """A graph in int8 but for some matrices, after smoothing if the folder's name says so; its operators' names too."""
    graph = OnnxGraph.read(path)
    folder.mkdir()
    if folder.name == "smooth":
        smooth(graph, record_activations(path, feeds(path, 0)))
        graph.write(folder / "float.onnx", Storage())
    names = {node.name for node, _ in constant_matrices(graph, "MatMul")}.difference(left_out)
    with quiet():
        quantize(graph, "MatMul", dynamic(QuantType.QInt8), names)
    graph.write(folder / "int8.onnx", Storage())
    return folder / "int8.onnx", sorted(node.op_type for node in graph.proto.graph.node)


@pytest.mark.parametrize("name", GRAPHS)
def test_smoothing_mends_int8_and_leaves_float32_as_it_was(graphs: Path, name: str, tmp_path: Path) -> None:
    path = graphs / f"{name}.onnx"
    kept = smooth(OnnxGraph.read(path), record_activations(path, feeds(path, 0)))
    plain, plain_operators = in_int8(path, tmp_path / "plain", kept)
    smoothed, operators = in_int8(path, tmp_path / "smooth", kept)
    expected = outputs(path, 1)
    assert off(outputs(smoothed.with_name("float.onnx"), 1), expected) < 1e-5
    assert off(outputs(smoothed, 1), expected) < 0.05
    assert off(outputs(plain, 1), expected) > 3 * off(outputs(smoothed, 1), expected)
    assert operators == plain_operators  # so it is as fast


def test_matrices_that_stay_bad_are_named(graphs: Path, tmp_path: Path) -> None:
    path = graphs / "vision_encoder.onnx"
    activations = record_activations(path, feeds(path, 0))
    (kept,) = smooth(OnnxGraph.read(path), activations)
    assert "layers.0.self_attn.out_proj" in kept
    assert smooth(OnnxGraph.read(path), activations, max_error=2.0) == frozenset()
    assert smooth(OnnxGraph.read(path), activations, nodes={"another"}) == frozenset()
    expected = outputs(path, 1)
    (tmp_path / "kept").mkdir()
    without, operators = in_int8(path, tmp_path / "kept" / "smooth", {kept})
    everything, all_operators = in_int8(path, tmp_path / "smooth", ())
    assert operators.count("MatMul") == all_operators.count("MatMul") + 1
    assert off(outputs(without, 1), expected) < 0.5 * off(outputs(everything, 1), expected)


def norm_graph(nodes: str) -> OnnxGraph:
    """A graph of LayerNormalizations and matrices of 8 channels, one of which is an outlier."""
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((8, 8), dtype=np.float32) for name in ("w", "v")}
    arrays |= {"gain": np.array([1, 1, 60, 1, 1, 1, 1, 1], dtype=np.float32), "bias": np.ones(8, dtype=np.float32)}
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        norms (float[batch, time, 8] x) => (float[batch, time, 8] y) {{ {nodes} }}"""
    )
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return OnnxGraph(proto, {})


@pytest.mark.parametrize(
    ("nodes", "changes"),
    [
        ("a = LayerNormalization(x, gain, bias) b = MatMul(a, w) y = MatMul(b, v)", True),
        # A gain of two norms: one of them gets its own.
        ("a = LayerNormalization(x, gain) b = MatMul(a, w) c = LayerNormalization(b, gain) y = MatMul(c, v)", True),
        # A matrix of two products.
        ("a = LayerNormalization(x, gain, bias) b = MatMul(a, w) y = MatMul(b, w)", False),
        # An activation that also goes elsewhere.
        ("a = LayerNormalization(x, gain, bias) b = MatMul(a, w) y = Add(a, b)", False),
    ],
)
def test_what_others_use_is_not_scaled(nodes: str, changes: bool, tmp_path: Path) -> None:
    path = tmp_path / "norms.onnx"
    graph = norm_graph(nodes)
    graph.write(path, Storage())
    before = {name: numpy_helper.to_array(tensor) for name, tensor in graph.constants().items()}
    x = np.random.default_rng(1).standard_normal((4, 30, 8), dtype=np.float32)
    expected = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    smooth(graph, record_activations(path, [{"x": x}]))
    after = {name: numpy_helper.to_array(tensor) for name, tensor in graph.constants().items()}
    assert changes != np.array_equal(before["w"], after["w"])
    graph.write(path, Storage())
    np.testing.assert_allclose(
        onnxruntime.InferenceSession(path).run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-3
    )


# --- 4 bit by GPTQ ---


def one_product(weight_KN: Array) -> onnx.ModelProto:
    inputs, width = weight_KN.shape
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        one (float[batch, time, {inputs}] x) => (float[batch, time, {width}] y) {{ [product] y = MatMul(x, w) }}"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(weight_KN, "w"))
    return proto


def correlated(rows: int, width: int, seed: int) -> Array:
    """Activations that lie near a quarter of the directions, some of them far larger than others."""
    mixing = np.random.default_rng(9).standard_normal((width // 4, width))
    random = np.random.default_rng(seed)
    rows_RK = random.standard_normal((rows, width // 4)) @ mixing + 0.3 * random.standard_normal((rows, width))
    return (rows_RK * np.linspace(0.2, 2, width)).astype(np.float32)


def unpacked(model: onnx.ModelProto, inputs: int) -> Array:
    """The weights that a MatMulNBits holds, in float32."""
    packed, scales, zeros = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    integers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(np.float32)
    points = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, : packed.shape[1], None]
    weight_NK = ((integers - points) * scales.reshape(packed.shape[0], -1, 1)).reshape(len(packed), -1)
    return np.ascontiguousarray(weight_NK[:, :inputs].T)


def as_in_the_paper(weight_KN: Array, rows_RK: Array) -> Array:
    """GPTQ as its paper has it: Cholesky factor of the inverse Hessian, inputs in order of its diagonal, fixed grid."""
    hessian = (rows_RK.T @ rows_RK).astype(np.float64)
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    weight, result = weight_KN[order].astype(np.float64), np.empty_like(weight_KN)
    for place, row in enumerate(order):
        block = weight_KN[row // 32 * 32 : row // 32 * 32 + 32]
        low, high = np.minimum(block.min(axis=0), 0), np.maximum(block.max(axis=0), 0)
        scale = (high - low) / 15
        zero = np.rint(-low / scale)
        result[row] = (np.clip(np.rint(weight[place] / scale) + zero, 0, 15) - zero) * scale
        error = (weight[place] - result[row]) / upper[place, place]
        weight[place:] -= np.outer(upper[place, place:], error)
    return result


def test_gptq_is_the_papers() -> None:
    weight_KN = np.random.default_rng(0).standard_normal((64, 20), dtype=np.float32)
    rows_RK = correlated(200, 64, seed=1)
    got_KN = unpacked(gptq({"x": rows_RK})(one_product(weight_KN)), 64)
    np.testing.assert_allclose(got_KN, as_in_the_paper(weight_KN, rows_RK), atol=1e-5)


@pytest.mark.parametrize(("inputs", "width"), [(128, 48), (100, 33), (32, 1)])
def test_gptq_is_nearer_than_rounding_on_rows_it_has_not_seen(inputs: int, width: int) -> None:
    weight_KN = np.random.default_rng(0).standard_normal((inputs, width), dtype=np.float32)
    seen_RK, other_RK = correlated(400, inputs, seed=1), correlated(100, inputs, seed=2)
    rounded = blocks_of_4_bits(symmetric=False)(one_product(weight_KN))
    chosen = gptq({"x": seen_RK})(one_product(weight_KN))
    results = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": other_RK[None]})[0][0]
        for model in (rounded, chosen)
    ]
    np.testing.assert_allclose(results[1], other_RK @ unpacked(chosen, inputs), rtol=1e-4, atol=1e-3)
    assert off(results[1], other_RK @ weight_KN) < 0.7 * off(results[0], other_RK @ weight_KN)


def test_without_feedback_gptq_is_rounding() -> None:
    weight_KN = np.random.default_rng(0).standard_normal((128, 40), dtype=np.float32)
    rounded = blocks_of_4_bits(symmetric=False)(one_product(weight_KN))
    for rows in ({"x": np.eye(128, dtype=np.float32)}, {}):  # inputs that do not go together; no inputs at all
        np.testing.assert_array_equal(unpacked(gptq(rows)(one_product(weight_KN)), 128), unpacked(rounded, 128))


@pytest.mark.parametrize("name", GRAPHS)
def test_gptq_of_a_model_is_nearer_than_rounding(graphs: Path, name: str, tmp_path: Path) -> None:
    path = graphs / f"{name}.onnx"
    activations = record_activations(path, feeds(path, 0, count=20))
    expected, errors = outputs(path, 1), []
    for tool in (gptq(activations), blocks_of_4_bits(symmetric=False)):
        graph = OnnxGraph.read(path)
        with quiet():
            quantize(graph, "MatMul", tool)
        graph.write(tmp_path / "q4.onnx", Storage())
        assert not list(constant_matrices(graph, "MatMul"))
        errors.append(off(outputs(tmp_path / "q4.onnx", 1), expected))
    assert errors[0] < errors[1]
