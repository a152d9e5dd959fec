"""The decoder in fused operators says what PyTorch and the portable one say, within its limits, and is served."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from switchkd.cli.main import main
from switchkd.export.assembly import export_checkpoint
from switchkd.export.contract.bundle import DECODER, FUSED, PORTABLE, Bundle, BundleError, CacheShape, ModelFacts
from switchkd.export.graphs.fused_decoder import FusedDecoder
from switchkd.export.graphs.tracing import ExportError
from switchkd.export.quantisation.precisions import PRECISIONS
from switchkd.export.verification.graph_runner import GraphRunError, GraphRunner, ValuesError
from switchkd.export.verification.parity import compare, record, sample_prompts
from switchkd.export.verification.reference import TorchReference
from switchkd.serve import Engine
from switchkd.serve.engine.graph_session import MissingOperatorError
from switchkd.serve.engine.kv_cache import GrowingCache, SharedCache

QUESTION = "How many red circles are there?"


@pytest.fixture(scope="module")
def both(wide_heads_checkpoint: Path) -> Iterator[Path]:
    """A bundle with a file of each form."""
    with tempfile.TemporaryDirectory(prefix="both-") as folder:
        path = Path(folder) / "bundle"
        command = ["export", str(wide_heads_checkpoint), str(path), "--decoder", "both", "--dtype", "fp32,q4,q4f16"]
        command += ["--pairs", "6"]
        assert main(command) == 0
        yield path


@pytest.fixture
def copy(both: Path, tmp_path: Path) -> Path:
    """One that a test may spoil."""
    return Path(shutil.copytree(both, tmp_path / "bundle"))


def change(bundle: Path, node: str, op_type: str = "", **attributes: int) -> None:
    """Change one node of the fused float32 decoder, and the manifest's size with it."""
    name = "onnx/decoder_model_merged_fused.onnx"
    model = onnx.load(bundle / name)
    found = next(each for each in model.graph.node if each.name == node)
    found.op_type = op_type or found.op_type
    found.domain = "com.microsoft"
    found.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())
    onnx.save(model, bundle / name)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name]["bytes"] = (bundle / name).stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest))


# --- the graph ---

COMMON: dict[str, Any] = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
LANGUAGE_MODELS = {
    "qwen2": Qwen2Config(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, **COMMON),
    "llama with every bias": LlamaConfig(
        num_attention_heads=3, num_key_value_heads=3, attention_bias=True, mlp_bias=True, **COMMON
    ),
    "llama 3.2": LlamaConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # not hidden_size / num_attention_heads
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        **COMMON,
    ),
}


def random_model(text: Any) -> LlavaForConditionalGeneration:
    """A LLaVA around a language model in which no weight is zero or one."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=12
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def facts_of(text: Any) -> ModelFacts:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = CacheShape(text.num_hidden_layers, text.num_key_value_heads, head_dim)
    positions = text.max_position_embeddings
    return ModelFacts("<image>", 3, 4, (3, 24, 24), (2,), text.vocab_size, text.hidden_size, positions, cache)


@pytest.mark.parametrize("text", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_logits_are_pytorchs(text: Any, tmp_path: Path) -> None:
    model = random_model(text)
    FusedDecoder(text, facts := facts_of(text)).write(model, tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    embeds_1TD = np.random.default_rng(0).standard_normal((1, 150, text.hidden_size), dtype=np.float32)
    with torch.no_grad():
        expected = model(inputs_embeds=torch.from_numpy(embeds_1TD)).logits.numpy()
    shape = (1, facts.cache.kv_heads, 0, facts.cache.head_dim)
    cache = [np.zeros(shape, dtype=np.float32) for _ in facts.cache.past_names()]
    rows = []
    for start, end in ((0, 130), (130, 149), (149, 150)):  # a prompt, more of it, a token
        mask = np.ones((1, end), dtype=np.int64)
        past = dict(zip(facts.cache.past_names(), cache, strict=True))
        fed = {
            "inputs_embeds": embeds_1TD[:, start:end],
            "attention_mask": mask,
            "num_logits_to_keep": np.array(0),
            **past,
        }
        logits_1TV, *cache = session.run(None, fed)
        rows.append(logits_1TV)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_attention_heads": 6}, "a head has 8 numbers, expected a multiple of 16"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
    ],
)
def test_language_models_without_a_fused_form(changed: dict[str, Any], reason: str) -> None:
    text = LlamaConfig(**{**COMMON, "num_attention_heads": 3, "num_key_value_heads": 3, **changed})
    with pytest.raises(ExportError, match=f"{reason}.*--decoder portable"):
        FusedDecoder(text, facts_of(text))


# --- in a bundle ---


def test_both_forms_in_one_bundle(both: Path, wide_heads_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Bundle.open(both).manifest
    decoders = [graph for graph in manifest.graphs if graph.name == DECODER and graph.precision == "q4"]
    assert [(graph.form, graph.file) for graph in decoders] == [
        (PORTABLE, "onnx/decoder_model_merged_q4.onnx"),
        (FUSED, "onnx/decoder_model_merged_fused_q4.onnx"),
    ]
    assert list(manifest.variants()) == ["fp32", "fp32 fused", "q4", "q4 fused", "q4f16", "q4f16 fused"]
    found = manifest.verification["fp32 fused"]
    assert found["logits"]["max_abs"] <= 1e-3
    assert found["greedy"]["equal"] == found["greedy"]["prompts"] == 6
    # The weights are the same 4-bit numbers; the sums are done in another order.
    portable, fused = (manifest.verification[variant]["logits"]["relative_rms"] for variant in ("q4", "q4 fused"))
    assert fused == pytest.approx(portable, rel=0.05)
    capsys.readouterr()
    assert main(["verify", str(both), "--checkpoint", str(wide_heads_checkpoint)]) == 0
    assert "fp32 fused: 14 runs in order" in capsys.readouterr().out


def test_operators(both: Path) -> None:
    graph = onnx.load(both / "onnx/decoder_model_merged_fused_q4.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 2
    assert kinds.count("MatMulNBits") == 2 * 5 + 1  # queries, keys and values are one product
    assert "MatMul" not in kinds


def test_a_batch_is_refused_more_than_a_token_after_its_past(both: Path) -> None:
    runner = GraphRunner(Bundle.open(both).in_form(FUSED))
    embeds_BTD = runner.embed(np.full((2, 3), 7))
    _, cache = runner.decode(embeds_BTD, runner.empty_cache(2))
    with pytest.raises(GraphRunError, match=r"decoder_model_merged_fused\.onnx: fails at inputs_embeds \[2, 3, 32\]"):
        runner.decode(embeds_BTD, cache)


def test_wrong_fused_decoder_is_found(copy: Path, wide_heads_checkpoint: Path) -> None:
    change(copy, "layers.1.attention", local_window_size=8)
    model = LlavaForConditionalGeneration.from_pretrained(wide_heads_checkpoint)
    bundle = Bundle.open(copy)
    prompts = sample_prompts(bundle)
    expected = record(TorchReference(model, bundle.model.eos_token_ids), prompts)
    with pytest.raises(ValuesError, match=r"onnx/decoder_model_merged_fused\.onnx: differs"):
        compare(GraphRunner(bundle.in_form(FUSED)), prompts, expected, PRECISIONS["fp32"].bounds)


def test_fused_alone_has_the_usual_name(wide_heads_checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(wide_heads_checkpoint, tmp_path / "bundle", precisions=["fp32"], decoder="fused", pairs=6)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.forms == (FUSED,)
    assert bundle.graph(DECODER).file == "onnx/decoder_model_merged.onnx"
    assert "position_ids" not in (tmp_path / "bundle/README.md").read_text().split("```python")[2]
    with pytest.raises(BundleError, match="holds no portable decoder in fp32, only fused"):
        bundle.in_form(PORTABLE)


def test_unknown_form_is_refused(copy: Path) -> None:
    file = copy / "manifest.json"
    file.write_text(file.read_text().replace('"form": "fused"', '"form": "melted"'))
    with pytest.raises(BundleError, match=r"graphs\[3\]: form is 'melted', this switchkd knows portable, fused"):
        Bundle.open(copy)


# --- served ---


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def test_engine_takes_the_fused_form_and_answers_the_same(both: Path, picture: Image.Image) -> None:
    portable = Engine(Bundle.open(both).in_form(PORTABLE), threads=1)
    fused = Engine.open(both, threads=1)
    assert portable.decoder.form == PORTABLE
    assert fused.decoder.form == FUSED
    expected = portable.answer(QUESTION, [picture], max_new_tokens=20)
    assert fused.answer(QUESTION, [picture], max_new_tokens=20).tokens == expected.tokens
    assert len(Engine.open(both, "q4f16", threads=1).answer(QUESTION, [picture], max_new_tokens=3).tokens) == 3


def test_engine_goes_without_an_operator_that_its_runtime_lacks(copy: Path, picture: Image.Image) -> None:
    change(copy, "layers.0.mlp.sigmoid", "Rfft", signal_ndim=1, normalized=0, onesided=0)
    engine = Engine.open(copy, threads=1)
    assert engine.decoder.form == PORTABLE
    assert engine.answer(QUESTION, [picture], max_new_tokens=3).tokens
    with pytest.raises(MissingOperatorError, match="lacks an operator"):
        Engine(Bundle.open(copy).in_form(FUSED), threads=1)


@pytest.mark.parametrize("precision", ["fp32", "q4", "q4f16"])
def test_one_buffer_for_past_and_present_changes_no_bit(both: Path, precision: str) -> None:
    """Steps that write into the buffer give what steps that copy it give, also behind a beginning that was kept."""
    engine = Engine.open(both, precision, threads=1)
    decoder, model = engine.decoder, engine.bundle.model
    assert decoder.form == FUSED
    pieces = [decoder.embed(ids) for ids in ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16])]
    copied, shared = GrowingCache(model.cache, engine.bundle.cache_dtype), decoder.new_cache(12)
    assert isinstance(shared, SharedCache)
    for piece in pieces[:2]:
        np.testing.assert_array_equal(decoder.read(piece, shared), decoder.read(piece, copied))
    kept = shared.frozen()
    again = decoder.new_cache(40, kept)
    for piece in pieces[2:]:
        expected = decoder.read(piece, copied)
        np.testing.assert_array_equal(decoder.read(piece, shared), expected)
        np.testing.assert_array_equal(decoder.read(piece, again), expected)
    assert (kept.length, shared.length, again.length) == (10, 12, 12)
    assert kept.nbytes == sum(value.numpy().nbytes for value in kept.values.values())


def test_what_is_kept_of_a_buffer_is_a_copy_of_it() -> None:
    """Also with one key-value head, where its beginning lies in one piece and could be had as a view."""
    cache = SharedCache(CacheShape(1, 1, 4), "float32", 1000)
    cache.advance({}, 3)
    kept = cache.frozen().values["past_key_values.0.key"]
    cache.inputs["past_key_values.0.key"].update_inplace(np.ones((1, 1, 1000, 4), np.float32))
    np.testing.assert_array_equal(kept.numpy(), np.zeros((1, 1, 3, 4)))


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_a_known_picture_changes_no_bit_of_an_answer(both: Path, precision: str) -> None:
    picture = Image.new("RGB", (40, 30), (200, 60, 20))
    warm, cold = (Engine.open(both, precision, threads=1) for _ in range(2))

    def tokens(engine: Engine, question: str) -> tuple[int, ...]:
        return engine.answer(question, [picture], max_new_tokens=12).tokens

    first = tokens(warm, QUESTION)
    assert tokens(warm, "And what else is there?") == tokens(cold, "And what else is there?")
    assert tokens(warm, QUESTION) == first
