"""The end of a prompt: logits of its last tokens alone, and prompts that another precision's decoder reads."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from switchkd.cli.main import main
from switchkd.export.contract.bundle import (
    DECODER,
    EMBED_TOKENS,
    FUSED,
    MANIFEST,
    PORTABLE,
    VISION_ENCODER,
    Bundle,
    BundleError,
    TensorSpec,
    Variant,
)
from switchkd.export.contract.pixels import to_pixels
from switchkd.export.verification.graph_runner import GraphRunner, ShapeError, ValuesError, exercise
from switchkd.export.verification.parity import sample_prompts
from switchkd.serve import Engine
from switchkd.serve.http.server import served_models
from switchkd.serve.http.settings import ServerSettings

QUESTION = "How many red circles are there?"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def bundle(wide_heads_checkpoint: Path) -> Iterator[Path]:
    """Both forms of the decoder in 4 and 8 bit, and prompts that 8 bit reads."""
    with tempfile.TemporaryDirectory(prefix="prefill-") as folder:
        path = Path(folder) / "bundle"
        words = ["--dtype", "q4,int8", "--prefill", "int8", "--decoder", "both", "--pairs", "6"]
        assert main(["export", str(wide_heads_checkpoint), str(path), *words]) == 0
        yield path


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """One that a test may spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8))


# --- logits of the last tokens ---


@pytest.mark.parametrize("form", [PORTABLE, FUSED])
@pytest.mark.parametrize(("precision", "rounding"), [("q4", 1e-5), ("int8", 0.05)])
def test_the_last_rows_are_those_among_all(bundle: Path, precision: str, form: str, rounding: float) -> None:
    runner = GraphRunner(Bundle.open(bundle, precision).in_form(form))
    embeds_1TD = runner.embed(np.random.default_rng(0).integers(0, 300, (1, 9)))
    cache = runner.decode(embeds_1TD[:, :4], runner.empty_cache())[1]
    all_15V, grown = runner.decode(embeds_1TD[:, 4:], cache)
    assert all_15V.shape == (1, 5, 300)
    for keep, rows in ((1, 1), (2, 2), (5, 5), (9, 5)):
        logits_1RV, other = runner.decode(embeds_1TD[:, 4:], cache, keep=keep)
        assert logits_1RV.shape == (1, rows, 300)
        assert np.linalg.norm(logits_1RV - all_15V[:, -rows:]) < rounding * np.linalg.norm(logits_1RV)
        np.testing.assert_array_equal(other, grown)  # the cache holds every token all the same


def test_the_last_row_of_a_batch_is_its_last_place(bundle: Path) -> None:
    """Padded on the left that is every prompt's last token; on the right it is not, for the shorter ones."""
    runner = GraphRunner(Bundle.open(bundle, "q4").in_form(PORTABLE))
    embeds_1TD = runner.embed(np.random.default_rng(0).integers(0, 300, (1, 6)))
    batch_2TD = np.concatenate([embeds_1TD, np.pad(embeds_1TD[:, 2:], ((0, 0), (2, 0), (0, 0)))])
    mask_2T = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    last_21V, _ = runner.decode(batch_2TD, runner.empty_cache(2), mask_2T, keep=1)
    for row, prompt_1TD in enumerate((embeds_1TD, embeds_1TD[:, 2:])):
        alone_11V, _ = runner.decode(prompt_1TD, runner.empty_cache(), keep=1)
        np.testing.assert_allclose(last_21V[row], alone_11V[0], atol=1e-4)


def spoiled(copy: Path, model: onnx.ModelProto) -> GraphRunner:
    """A runner of the fused 4-bit decoder in this place."""
    opened = Bundle.open(copy, "q4").in_form(FUSED)
    onnx.save(model, opened.graph_path(DECODER))
    content = json.loads((copy / MANIFEST).read_text())
    content["files"][opened.graph(DECODER).file]["bytes"] = opened.graph_path(DECODER).stat().st_size
    (copy / MANIFEST).write_text(json.dumps(content))
    return GraphRunner(Bundle.open(copy, "q4").in_form(FUSED))


def load(copy: Path) -> onnx.ModelProto:
    return onnx.load(Bundle.open(copy, "q4").in_form(FUSED).graph_path(DECODER))


def test_another_number_of_rows_is_found(copy: Path) -> None:
    model = load(copy)
    next(node for node in model.graph.node if node.op_type == "Neg").op_type = "Identity"  # from row n on
    with pytest.raises(ShapeError, match="logits has 2 rows for num_logits_to_keep 1 and 3 new tokens, expected 1"):
        exercise(spoiled(copy, model))


def test_rows_of_other_tokens_are_found(copy: Path) -> None:
    model = load(copy)
    next(node for node in model.graph.node if "logits" in node.output).output[0] = "right"
    # Multiplied by 1 - n: as it should be only for n = 0.
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, dtype=np.float32), "one_float"))
    model.graph.node.extend(
        [
            onnx.helper.make_node("Cast", ["num_logits_to_keep"], ["n"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Sub", ["one_float", "n"], ["factor"]),
            onnx.helper.make_node("Mul", ["right", "factor"], ["logits"]),
        ]
    )
    with pytest.raises(ValuesError, match=r"fused_q4\.onnx: logits with num_logits_to_keep 1 are .* off"):
        exercise(spoiled(copy, model))


# --- prompts that another precision reads ---


def test_a_decoder_that_never_reads_prompts_is_made_for_single_tokens(bundle: Path) -> None:
    """accuracy_level 4 writes a token faster and reads a prompt more slowly (benchmarks/README.md)."""
    for graph in Bundle.open(bundle, "q4").manifest.graphs:
        products = [node for node in onnx.load(bundle / graph.file).graph.node if node.op_type == "MatMulNBits"]
        levels = {each.i for node in products for each in node.attribute if each.name == "accuracy_level"}
        assert (graph.precision == "q4" and graph.name != EMBED_TOKENS) == bool(products)
        if products:
            assert max(levels, default=0) == (4 if graph.name == DECODER else 0)


def by_hand(bundle: Path, picture: Image.Image, form: str, reader: str) -> tuple[int, ...]:
    """Features, the prompt's logits and cache by the `reader`'s graphs, everything else by 4-bit ones."""
    writing = GraphRunner(Bundle.open(bundle, "q4").in_form(form))
    reading = GraphRunner(Bundle.open(bundle, reader).in_form(form))
    ids = Engine(writing.bundle, threads=1).stream(QUESTION, [picture])._request.prompt
    both = GraphRunner(writing.bundle, reading.bundle)
    embeds_1TD = both.merge(ids, to_pixels(picture, writing.bundle.preprocessing)[None])
    assert np.array_equal(embeds_1TD, writing.merge(ids, to_pixels(picture, writing.bundle.preprocessing)[None])) == (
        reader == "q4"  # otherwise it would not show who encodes
    )
    logits_11V, cache = reading.decode(embeds_1TD, reading.empty_cache(), keep=1)
    tokens: list[int] = []
    while len(tokens) < NEW_TOKENS:
        tokens.append(int(logits_11V[0, 0].argmax()))
        if tokens[-1] in writing.bundle.model.eos_token_ids:
            return tuple(tokens[:-1])
        logits_11V, cache = writing.decode(writing.embed(np.array([tokens[-1:]])), cache)
    return tuple(tokens)


@pytest.mark.parametrize("form", [PORTABLE, FUSED])
def test_the_engine_reads_with_one_decoder_and_writes_with_another(
    bundle: Path, picture: Image.Image, form: str
) -> None:
    opened = Bundle.open(bundle, "q4").in_form(form)
    expected = by_hand(bundle, picture, form, "int8")
    engine = Engine(opened, threads=1, prefix_memory=0)  # reads a prompt in one piece
    assert engine.answer(QUESTION, [picture], max_new_tokens=NEW_TOKENS).tokens == expected
    alone = by_hand(bundle, picture, form, "q4")
    assert alone != expected  # otherwise this would show nothing
    engine = Engine(opened, threads=1, prefill=False, prefix_memory=0)
    assert engine.answer(QUESTION, [picture], max_new_tokens=NEW_TOKENS).tokens == alone


def test_the_fused_decoders_are_taken_for_both(bundle: Path, picture: Image.Image) -> None:
    engine = Engine.open(bundle, threads=1, prefix_memory=0)
    assert (engine.bundle.precision, engine.decoder.form) == ("q4", FUSED)
    answer = engine.answer(QUESTION, [picture], max_new_tokens=NEW_TOKENS)
    assert answer.tokens == by_hand(bundle, picture, FUSED, "int8")


def halved(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """With a float16 cache."""
    return tuple(replace(tensor, dtype="float16") if "past" in tensor.name else tensor for tensor in tensors)


def test_who_reads_for_whom(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert json.loads((bundle / MANIFEST).read_text())["prefill"] == "int8"
    assert manifest.prefill_of("q4") == "int8"
    assert manifest.prefill_of("int8") is None
    assert Bundle.open(bundle, "int8").prefill() is None
    others = [replace(graph, precision="fp32") for graph in manifest.graphs if graph.precision == "q4"]
    others += [replace(graph, precision="q4f16", inputs=halved(graph.inputs)) for graph in others]
    more = replace(manifest, graphs=(*manifest.graphs, *others))
    assert more.cache_dtype("q4f16") == "float16"
    assert [more.prefill_of(name) for name in more.precisions] == ["int8", None, None, None]
    variants = manifest.variants()
    assert list(variants) == ["q4", "q4 fused", "q4 after int8", "int8", "int8 fused"]
    assert variants["q4 after int8"] == Variant("q4", FUSED, "int8")
    sizes = {name: manifest.graph_bytes(*variant)[DECODER] for name, variant in variants.items()}
    assert sizes["q4 after int8"] == sizes["q4 fused"] + sizes["int8 fused"]
    encoders = {name: manifest.graph_bytes(*variant)[VISION_ENCODER] for name, variant in variants.items()}
    assert encoders["q4 after int8"] == encoders["int8"] != encoders["q4"]


def test_both_together_are_verified(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Bundle.open(copy).manifest
    record = manifest.verification["q4 after int8"]
    # Most of the logits compared are a prompt's.
    assert record["logits"]["relative_rms"] < 0.5 * manifest.verification["q4"]["logits"]["relative_rms"]
    assert record["image_features"] == manifest.verification["int8"]["image_features"]
    runner = GraphRunner.open(copy, manifest.variants()["q4 after int8"])
    prompt = sample_prompts(runner.bundle)[0]
    reader = GraphRunner.open(copy, manifest.variants()["int8 fused"])
    assert prompt.pixels_PCHW is not None
    np.testing.assert_array_equal(runner.encode(prompt.pixels_PCHW), reader.encode(prompt.pixels_PCHW))
    merged_1TD = runner.merge(prompt.ids, prompt.pixels_PCHW)
    rows_R = np.array([3, len(prompt.ids) - 1])
    np.testing.assert_array_equal(runner.logits(merged_1TD, rows_R), reader.logits(merged_1TD, rows_R))
    assert main(["verify", str(copy)]) == 0
    assert "q4 after int8: 14 runs in order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        ("fp32", "prefill 'int8' is of no use to fp32"),
        ("q4f16,int8", "is of no use to q4f16, int8: it takes another precision with a float32 KV cache"),
        ("fp32,int8", "fp32 reads its own prompts"),
    ],
)
def test_a_prefill_that_nobody_could_use_is_refused(
    wide_heads_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, reason: str
) -> None:
    words = ["export", str(wide_heads_checkpoint), str(tmp_path / "bundle"), "--dtype", dtype, "--prefill", "int8"]
    assert main(words) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prefill", "reason"),
    [("uint8", "prefill is 'uint8', but its decoders are in q4, int8"), (8, "prefill is 8, expected text")],
)
def test_a_prefill_that_is_not_there_is_refused(copy: Path, prefill: str | int, reason: str) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**content, "prefill": prefill}))
    with pytest.raises(BundleError, match=reason):
        Bundle.open(copy)


def test_the_prefill_graph_is_looked_into_before_it_is_opened(copy: Path) -> None:
    path = Bundle.open(copy, "int8").in_form(PORTABLE).graph_path(DECODER)
    model = onnx.load(path)
    model.graph.node[0].domain = "somebody.else"
    onnx.save(model, path)
    content = json.loads((copy / MANIFEST).read_text())
    content["files"][path.relative_to(copy).as_posix()]["bytes"] = path.stat().st_size
    (copy / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"decoder_model_merged_int8\.onnx: uses operators of 'somebody.else'"):
        Bundle.open(copy, "q4")


# --- a precision that does nothing but read for another ---


@pytest.fixture(scope="module")
def lean(wide_heads_checkpoint: Path) -> Iterator[Path]:
    """4 bit alone to be asked for, with what 8 bit needs to read for it."""
    with tempfile.TemporaryDirectory(prefix="prefill-") as folder:
        path = Path(folder) / "bundle"
        words = ["--dtype", "q4", "--prefill", "int8", "--decoder", "fused", "--pairs", "6", "--ort"]
        assert main(["export", str(wide_heads_checkpoint), str(path), *words]) == 0
        yield path


def test_one_that_only_reads_has_no_embeddings_and_its_encoder_is_the_only_one(lean: Path, bundle: Path) -> None:
    assert {file.name for file in (lean / "onnx").iterdir()} == {
        "vision_encoder_int8.onnx",
        "embed_tokens_q4.onnx",
        "decoder_model_merged_q4.onnx",
        "decoder_model_merged_int8.onnx",
    }
    manifest = Bundle.open(lean, check_hashes=True).manifest
    assert (manifest.precisions, manifest.prefill) == (("q4",), "int8")
    assert list(manifest.variants()) == list(manifest.verification) == ["q4", "q4 after int8"]
    with pytest.raises(BundleError, match="holds no graphs in 'int8', only q4"):
        Bundle.open(lean, "int8")
    larger = Bundle.open(bundle).manifest
    assert manifest.graph_bytes("q4", FUSED, "int8") == larger.graph_bytes("q4", FUSED, "int8")
    assert manifest.graph_bytes("q4")[VISION_ENCODER] == larger.graph_bytes("int8")[VISION_ENCODER]


def test_it_answers_as_the_whole_bundle_does(lean: Path, bundle: Path, picture: Image.Image) -> None:
    engine = Engine.open(lean, threads=1, prefix_memory=0)
    answer = engine.answer(QUESTION, [picture], max_new_tokens=NEW_TOKENS)
    assert answer.tokens == by_hand(bundle, picture, FUSED, "int8")
    light = Engine.open(lean, threads=1, prefill=False, prefix_memory=0)  # of both only the encoder
    features_ND = light.encoder.encode(light.encoder.open(picture))
    np.testing.assert_array_equal(features_ND, engine.encoder.encode(engine.encoder.open(picture)))
    assert light.answer(QUESTION, [picture], max_new_tokens=NEW_TOKENS).tokens != answer.tokens


def test_a_command_can_do_without_the_reader(
    lean: Path, picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture.save(tmp_path / "picture.png")
    words = ["ask", str(lean), str(tmp_path / "picture.png"), QUESTION, "--threads", "1", "--json"]
    said = []
    for prefill in (True, False):
        assert main([*words, "--max-new-tokens", str(NEW_TOKENS), *([] if prefill else ["--no-prefill"])]) == 0
        said.append(json.loads(capsys.readouterr().out)["tokens"])
        engine = Engine.open(lean, threads=1, prefill=prefill)
        assert said[-1] == list(engine.answer(QUESTION, [picture], max_new_tokens=NEW_TOKENS).tokens)
    assert said[0] != said[1]
    opening = served_models([str(lean)], ServerSettings(no_prefill=True)).openings["bundle:q4"]
    assert (opening.prefill, served_models([str(lean)], ServerSettings()).openings["bundle:q4"].prefill) == (
        False,
        True,
    )
    file = tmp_path / "report.json"
    assert main(["bench", str(lean), "--precision", "all", "--rounds", "1", "--tokens", "2", "--json", str(file)]) == 0
    about = {name: found["about"] for name, found in json.loads(file.read_text())["contenders"].items()}
    assert list(about) == ["switchkd q4", "switchkd q4 alone"]
    assert (about["switchkd q4"]["read by"], "read by" in about["switchkd q4 alone"]) == ("int8", False)


def test_all_its_files_are_verified(lean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(lean)]) == 0
    out = capsys.readouterr().out
    assert "q4 after int8: 14 runs in order" in out
    copied = Path(shutil.copytree(lean, tmp_path / "bundle"))
    file = copied / "ort" / "decoder_model_merged_int8.ort"
    shutil.copyfile(copied / "ort" / "decoder_model_merged_q4.ort", file)  # another graph in the reader's place
    content = json.loads((copied / MANIFEST).read_text())
    facts = content["files"]["ort/decoder_model_merged_q4.ort"]
    content["files"]["ort/decoder_model_merged_int8.ort"] = facts
    (copied / MANIFEST).write_text(json.dumps(content))
    assert main(["verify", str(copied)]) == 2
    assert "decoder_model_merged" in capsys.readouterr().err


def test_browsers_are_told_which_precision_each_graph_has(lean: Path, bundle: Path) -> None:
    said = json.loads((lean / "config.json").read_text())["transformers.js_config"]["dtype"]
    assert said == {"vision_encoder": "int8", "embed_tokens": "q4", "decoder_model_merged": "q4"}
    assert json.loads((bundle / "config.json").read_text())["transformers.js_config"]["dtype"] == "q4"
    card = (lean / "README.md").read_text()
    assert f"{{ dtype: {json.dumps(said)} }}" in card


@pytest.mark.parametrize(
    ("prefill", "reason"),
    [
        ("mixed", "prefill 'mixed': a mix reads for others only where it is among --dtype; add it there"),
        ("int7", "precision 'int7' is unknown"),
    ],
)
def test_a_reader_that_cannot_be_made_is_refused(
    wide_heads_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prefill: str, reason: str
) -> None:
    words = ["export", str(wide_heads_checkpoint), str(tmp_path / "bundle"), "--dtype", "q4", "--prefill", prefill]
    assert main(words) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
