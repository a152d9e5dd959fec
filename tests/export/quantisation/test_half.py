"""Float16 that is float16: where numbers pass 65,504 on the way, that part of a graph stays float32, and is named."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import LlavaConfig, LlavaForConditionalGeneration

from switchkd.export.contract.bundle import DECODER, EMBED_TOKENS, VISION_ENCODER, Bundle, ModelFacts
from switchkd.export.graphs.checkpoint import open_checkpoint
from switchkd.export.graphs.fused_decoder import FusedDecoder
from switchkd.export.graphs.onnx_graph import OnnxGraph, Storage
from switchkd.export.graphs.tracing import EmbedTokens, ExportError, GraphDescription, PortableDecoder, VisionEncoder
from switchkd.export.quantisation.activations import open_graph
from switchkd.export.quantisation.half import halve
from switchkd.export.quantisation.precisions import PRECISIONS
from switchkd.export.quantisation.ranges import largest_numbers
from switchkd.export.search.calibration import Pair, feeds
from switchkd.export.search.overflow import Overflow
from switchkd.export.search.variants import FLOAT32, Variants
from switchkd.export.verification.graph_runner import Array
from switchkd.export.verification.parity import Answer, Expected, sample_prompts

HELD = 65504
KEPT = ["pixel_values", "image_features", "inputs_embeds", "logits"]  # float32 in every precision
ANSWER = [7, 8, 9]
GRAPHS = (VISION_ENCODER, EMBED_TOKENS, "portable", "fused")


def change(path: Path, node_name: str, factor: float, shift: float = 0) -> None:
    """Scale the constant of a node in a graph's file, and shift its fourth number."""
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node_name in node.name)
    (constant,) = (tensor for tensor in model.graph.initializer if tensor.name in node.input)
    values = numpy_helper.to_array(constant) * np.float32(factor)
    values.flat[3] += shift
    constant.CopyFrom(numpy_helper.from_array(values, constant.name))
    OnnxGraph(model, {}).write(path, Storage(inline_bytes=0))


@dataclass
class Wide:
    """Float32 graphs of a model whose residual streams pass what float16 holds, as those of real models do."""

    variants: Variants
    descriptions: list[GraphDescription]

    def __post_init__(self) -> None:
        prompts = sample_prompts(self.variants.settings)[:2]
        expected = [Expected(Answer(ANSWER, np.zeros((1, 1)), np.zeros((1, 1))), None)] * 2
        self.pairs = [Pair(prompt, "", ANSWER) for prompt in prompts]
        self.overflow = Overflow.find(self.variants, self.descriptions, prompts, expected)

    def made(self, description: GraphDescription, precision: str, path: Path, *, looked: bool = True) -> OnnxGraph:
        """A graph in another precision, as the export makes it or as if it had not looked for large numbers."""
        traced = self.variants.traced(description)
        graph = OnnxGraph.read(traced)
        graph.largest = self.overflow.largest[traced.name] if looked else {}
        PRECISIONS[precision].change(description.name, graph)
        graph.write(path, Storage(inline_bytes=0))
        return OnnxGraph.read(path)

    def feeds(self, description: GraphDescription) -> Iterator[dict[str, Array]]:
        """What goes into a graph in float16."""
        dtypes = {spec.name: spec.dtype for spec in description.tensors("float16")[0]}
        for feed in feeds(self.variants.runner(FLOAT32), description.name, self.pairs):
            yield {key: value.astype(dtypes[key]) for key, value in feed.items()}


@pytest.fixture(scope="module")
def portable(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Wide:
    folder = tmp_path_factory.mktemp("portable")
    bundle = Bundle.open(tiny_bundle, "fp32")
    for name in (VISION_ENCODER, EMBED_TOKENS, DECODER):
        (folder / f"{name}.onnx").write_bytes(bundle.graph_path(name).read_bytes())
    change(folder / f"{VISION_ENCODER}.onnx", "layers.0.mlp.fc2.node_linear", 1, 3e5)
    change(folder / f"{DECODER}.onnx", "layers.0.mlp.down_proj", 3e4)
    config: LlavaConfig = LlavaConfig.from_pretrained(tiny_checkpoint)
    return of_graphs(folder, bundle, config, PortableDecoder)


@pytest.fixture(scope="module")
def fused(portable: Wide, wide_heads_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Wide:
    folder = tmp_path_factory.mktemp("fused")
    source = open_checkpoint(wide_heads_checkpoint)
    source.model.model.language_model.layers[0].mlp.down_proj.weight.data *= 3e4
    FusedDecoder(source.config.text_config, source.facts()).write(source.model, folder / f"{DECODER}.onnx")
    for description in portable.descriptions[:2]:
        for file in portable.variants.traced(description).parent.glob(f"{description.name}.onnx*"):
            (folder / file.name).write_bytes(file.read_bytes())
    bundle = portable.variants.settings
    settings = replace(bundle, manifest=replace(bundle.manifest, model=source.facts()))
    return of_graphs(folder, settings, source.config, FusedDecoder)


def of_graphs(folder: Path, settings: Bundle, config: LlavaConfig, decoder: type[GraphDescription]) -> Wide:
    facts: ModelFacts = settings.model
    vision: Any = config.vision_config
    text: Any = config.text_config
    descriptions = [VisionEncoder(vision, facts), EmbedTokens(text, facts), decoder(text, facts)]
    return Wide(Variants(folder, settings, descriptions), descriptions)


@pytest.fixture
def graph(request: pytest.FixtureRequest, portable: Wide, fused: Wide) -> tuple[Wide, GraphDescription]:
    """One of GRAPHS by its parameter."""
    wide = fused if request.param == "fused" else portable
    name = request.param if request.param in (VISION_ENCODER, EMBED_TOKENS) else DECODER
    return wide, next(description for description in wide.descriptions if description.name == name)


def float16_numbers(path: Path, graph: OnnxGraph, feed: dict[str, Array]) -> dict[str, Array]:
    """Every float16 tensor of a graph as a device computes it that has float16."""
    known = {value.name for value in graph.proto.graph.output}
    made = [name for node in graph.proto.graph.node for name in node.output if name and name not in known]
    graph.proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    session = open_graph(path, graph, as_written=True)
    names = [output.name for output in session.get_outputs() if output.type == "tensor(float16)"]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("precision", ["fp16", "q4f16"])
@pytest.mark.parametrize("graph", GRAPHS, indirect=True)
def test_no_number_of_float16_passes_what_it_holds(
    graph: tuple[Wide, GraphDescription], precision: str, tmp_path: Path
) -> None:
    wide, description = graph
    path = tmp_path / "made.onnx"
    made = wide.made(description, precision, path)
    for feed in wide.feeds(description):
        found = float16_numbers(path, OnnxGraph.read(path), feed)
        assert len(found) > 10 or description.name == EMBED_TOKENS
        assert all(np.isfinite(array).all() for array in found.values())
        # Others may reach further: on those that were seen there is room left.
        assert max((np.abs(array).max(initial=0) for array in found.values()), default=0) <= HELD / 4
    # Most of it is small.
    types = [tensor.data_type for tensor in made.proto.graph.initializer if np.prod(tensor.dims) > 500]
    assert types.count(TensorProto.FLOAT) < max(1, len(types) / 4)


@pytest.mark.parametrize("graph", [VISION_ENCODER, "portable", "fused"], indirect=True)
def test_without_looking_they_would(graph: tuple[Wide, GraphDescription], tmp_path: Path) -> None:
    wide, description = graph
    path = tmp_path / "made.onnx"
    halved = wide.made(description, "fp16", path, looked=False)
    found = float16_numbers(path, halved, next(wide.feeds(description)))
    # Not a number, infinite, or cut off at the end; only in the last case does a verification here see a difference.
    assert not max(np.abs(array).max(initial=0) for array in found.values()) < HELD


@pytest.mark.parametrize("graph", [VISION_ENCODER, "portable", "fused"], indirect=True)
def test_what_comes_out_is_as_in_float32(graph: tuple[Wide, GraphDescription], tmp_path: Path) -> None:
    wide, description = graph
    wide.made(description, "fp16", tmp_path / "made.onnx")
    half, whole = (
        onnxruntime.InferenceSession(path) for path in (tmp_path / "made.onnx", wide.variants.traced(description))
    )
    for feed in wide.feeds(description):
        got = half.run(None, feed)[0]
        assert got.dtype == np.float32
        float32 = {key: array.astype(np.float32) if array.dtype == np.float16 else array for key, array in feed.items()}
        expected = whole.run(None, float32)[0]
        assert np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected)


def test_torch_in_float16_gives_nothing_finite(portable: Wide, tiny_checkpoint: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.model.vision_tower.encoder.layers[0].mlp.fc2.bias.data[3] += 3e5
    (pixels_PCHW,) = (feed["pixel_values"] for feed in list(portable.feeds(portable.descriptions[0]))[:1])
    with torch.no_grad():
        features = model.half().get_image_features(torch.from_numpy(pixels_PCHW).half()).pooler_output[0]
    assert not torch.isfinite(features).all()


def test_what_stays_float32_is_named(portable: Wide, fused: Wide) -> None:
    for wide in (portable, fused):
        record = wide.overflow.record(wide.variants.traced(description) for description in wide.descriptions)
        assert record.keys() == {VISION_ENCODER, DECODER}
        assert record[VISION_ENCODER]["parts"] == ["vision_encoder", "projector"]
        assert record[VISION_ENCODER]["operators"] == 11
        assert record[DECODER]["parts"] == ["decoder"]
        assert 3e5 <= record[VISION_ENCODER]["largest"] < 3.1e5
        # Not the squares under a root, which are float32 in any case.
        assert HELD / 4 < record[DECODER]["largest"] < 1e6


def test_keys_that_the_cache_cannot_hold_are_refused(fused: Wide, tmp_path: Path) -> None:
    decoder = fused.descriptions[-1]
    for file in fused.variants.traced(decoder).parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(tmp_path / f"{DECODER}.onnx")
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "layers.1.attention.qkv.bias")
    values = numpy_helper.to_array(bias).copy()
    values[34] = 30_000  # of the first key, behind 32 queries
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    OnnxGraph(model, {}).write(tmp_path / f"{DECODER}.onnx", Storage(inline_bytes=0))
    with pytest.raises(ExportError, match=r"present\.1\.key reaches 30,00\d, and the float16 of a KV cache ends at"):
        Wide(Variants(tmp_path, fused.variants.settings, fused.descriptions), fused.descriptions)


def test_a_weight_beyond_float16_is_not_cut(tmp_path: Path) -> None:
    matrix_KM = np.full((40, 30), 0.5, dtype=np.float32)
    matrix_KM[3, 4] = 1e6
    node = helper.make_node("MatMul", ["pixel_values", "matrix"], ["logits"], name="product")
    shape = ["batch", "time"]
    given, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("pixel_values", "logits")
    )
    main = helper.make_graph([node], "g", [given], [result], [numpy_helper.from_array(matrix_KM, "matrix")])
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(main, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    rows = np.full((1, 40), 1e-3, dtype=np.float32)
    graph = OnnxGraph.read(path)
    graph.largest = largest_numbers(path, [{"pixel_values": rows}])
    assert graph.largest["matrix"] == 1e6
    assert graph.largest["logits"] == pytest.approx(1000, rel=0.01)
    halve(graph, KEPT)
    session = onnxruntime.InferenceSession(graph.proto.SerializeToString())
    np.testing.assert_allclose(session.run(None, {"pixel_values": rows})[0], rows @ matrix_KM, rtol=1e-3)
