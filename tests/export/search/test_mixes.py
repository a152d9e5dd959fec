"""A method for each part of the model: by hand, from a calibration file, and found by the search."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.export.contract.bundle import GRAPHS, Bundle, CacheShape, ModelFacts
from switchkd.export.graphs.checkpoint import open_checkpoint
from switchkd.export.graphs.fused_decoder import FusedDecoder
from switchkd.export.graphs.onnx_graph import OnnxGraph
from switchkd.export.graphs.parts import PARTS, part_of
from switchkd.export.graphs.tracing import EmbedTokens, PortableDecoder, VisionEncoder
from switchkd.export.quantisation.precisions import format_parts, parse_parts
from switchkd.export.quantisation.weight_only import constant_matrices
from switchkd.export.search.calibration import CalibrationError, read_calibration
from switchkd.export.search.mix_options import Mixing, MixOptions
from switchkd.export.search.mixes import Trial, predict
from switchkd.export.search.variants import Variants
from switchkd.serve import Engine

MIX = "vision_encoder=int8_smooth,projector=int8,embeddings=q4,decoder=q4_gptq"
PAIRS = 16


def count_by_part(path: Path, op_types: tuple[str, ...] = ("MatMul",)) -> dict[tuple[str | None, str], int]:
    """How many nodes of these kinds each part has; of MatMuls and Gathers those of a constant matrix."""
    graph = OnnxGraph.read(path)
    constant = {node.name for kind in ("MatMul", "Gather") for node, _ in constant_matrices(graph, kind)}
    found: dict[tuple[str | None, str], int] = {}
    for node in graph.proto.graph.node:
        if node.op_type in op_types and (node.op_type not in ("MatMul", "Gather") or node.name in constant):
            key = part_of(node), node.op_type
            found[key] = found.get(key, 0) + 1
    return found


# --- parts ---


def test_every_matrix_has_its_part(tiny_bundle: Path) -> None:
    onnx_files = tiny_bundle / "onnx"
    # The layer after the one whose features are taken is no longer in the graph.
    assert count_by_part(onnx_files / "vision_encoder.onnx") == {
        ("vision_encoder", "MatMul"): 2 * 6,
        ("projector", "MatMul"): 2,
    }
    assert count_by_part(onnx_files / "decoder_model_merged.onnx") == {
        ("decoder", "MatMul"): 2 * 7,
        ("lm_head", "MatMul"): 1,
    }
    assert count_by_part(onnx_files / "embed_tokens.onnx", ("Gather",)) == {("embeddings", "Gather"): 1}
    assert count_by_part(onnx_files / "vision_encoder_int8.onnx", ("MatMul", "MatMulInteger")) == {
        ("vision_encoder", "MatMulInteger"): 2 * 6,
        ("projector", "MatMulInteger"): 2,
    }


def test_every_matrix_of_llama_has_its_part(clip_vision: CLIPVisionConfig, tmp_path: Path) -> None:
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=clip_vision, text_config=text)).eval()
    facts = ModelFacts("<image>", 3, 16, (3, 24, 24), (2,), 40, 32, 64, CacheShape(1, 2, 16))
    for description, matrices in ((PortableDecoder(text, facts), 7), (FusedDecoder(text, facts), 5)):
        path = tmp_path / f"{description.form}.onnx"
        description.write(model, path)
        assert count_by_part(path) == {("decoder", "MatMul"): matrices, ("lm_head", "MatMul"): 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--dtype", "fp32,mixed", "--parts", "decoder=int4"], "decoder cannot be 'int4'; choose from fp32, int8"),
        (
            ["--dtype", "fp32,mixed", "--parts", "embeddings=q4_gptq"],
            "embeddings cannot be 'q4_gptq'; choose from",
        ),
        (["--dtype", "fp32,mixed", "--parts", "head=int8"], "part 'head' is unknown; write PART=METHOD with one of"),
        (["--dtype", "fp32,mixed", "--parts", "decoder"], "decoder cannot be ''"),
        (["--dtype", "fp32,mixed", "--parts", "decoder=q4,decoder=q4"], "decoder is named twice"),
        (["--dtype", "fp32,mixed"], "mixed needs --parts"),
        (["--dtype", "fp32,q8,mixed", "--parts", "decoder=q4"], "q8 and mixed go by the same file names"),
        (["--dtype", "mixed,auto", "--parts", "decoder=q4"], "mixed and auto are one precision"),
        (["--dtype", "fp32,int8", "--parts", "decoder=q4"], "--parts is for mixed, which --dtype does not name"),
        (["--dtype", "fp32,int8", "--max-drop", "1"], "--max-drop is for auto, which --dtype does not name"),
        (["--dtype", "fp32,auto", "--max-drop", "-1"], "--max-drop is -1.0; give percentage points"),
        (["--calibration-pairs", "1"], "--calibration-pairs is 1; give 2 or more"),
        (["--picture-root", "."], "--picture-root is for pictures of --calibration"),
    ],
)
def test_options_that_do_not_fit(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert main(["export", str(tiny_checkpoint), str(tmp_path / "bundle"), *options]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- a calibration file ---


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Questions about pictures, of which every other has two."""
    questions = ("<image>\nHow many red circles?", "What colour is it?\n<image>")
    return [
        {
            "id": str(number),
            "image": f"{number // 2}.png",
            "conversations": [
                {"from": "human", "value": questions[number % 2]},
                {"from": "gpt", "value": "There are three."},
                {"from": "human", "value": "And squares?"},
                {"from": "gpt", "value": "None."},
            ],
        }
        for number in range(24)
    ]


@pytest.fixture(scope="module")
def calibration_file(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records as JSON lines, their pictures beside them."""
    folder = tmp_path_factory.mktemp("calibration")
    for number in range(12):
        colours = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / f"{number}.png")
    file = folder / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def test_pairs_are_read(tiny_bundle: Path, calibration_file: Path, records: list[dict[str, Any]]) -> None:
    bundle = Bundle.open(tiny_bundle)
    calibration = read_calibration(bundle, calibration_file, pairs=10)
    assert (len(calibration.calibrate), len(calibration.score)) == (5, 5)
    ids = [pair.prompt.ids for pair in (*calibration.calibrate, *calibration.score)]
    assert len({len(pair_ids) for pair_ids in ids}) == 2  # both questions
    first = calibration.calibrate[0]
    assert first.answer == "There are three."
    assert first.tokens[-1] in bundle.model.eos_token_ids
    assert first.prompt.places_T.sum() == bundle.model.tokens_per_picture
    # As a JSON list with a folder of pictures elsewhere, and whole: each record once.
    other = calibration_file.parent / "lists" / "pairs.json"
    other.parent.mkdir(exist_ok=True)
    other.write_text(json.dumps(records))
    whole = read_calibration(bundle, other, calibration_file.parent)
    assert len(whole.calibrate) == len(whole.score) == 12
    assert whole.calibrate[0].prompt.ids == first.prompt.ids


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "none.png"}, r"record 3: .*none\.png: no such file; check the path; or give another --picture-root"),
        ({"image": ["0.png", "1.png"]}, r"record 3: image is \['0.png', '1.png'\], expected the path of one picture"),
        ({"conversations": "What?"}, "record 3: conversations is no list of turns"),
        ({"conversations": [{"from": "human", "value": "What?"}]}, "record 3: no answer .gpt. after a question"),
        ({"conversations": [{"from": "human", "value": 3}]}, "record 3: a turn's value is 3, expected text"),
        (
            {"conversations": [{"from": "human", "value": "a " * 600}, {"from": "gpt", "value": "b"}]},
            "record 3: .* room",
        ),
    ],
)
def test_records_that_cannot_be_used(
    tiny_bundle: Path, calibration_file: Path, records: list[dict[str, Any]], change: dict[str, Any], reason: str
) -> None:
    file = calibration_file.parent / "changed.json"
    file.write_text(json.dumps([*records[:2], {**records[2], **change}, *records[3:]]))
    with pytest.raises(CalibrationError, match=reason) as caught:
        read_calibration(Bundle.open(tiny_bundle), file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file; give --calibration a LLaVA JSON or JSONL file"),
        ("", "holds 0 records; at least 2 are needed"),
        ("[{]", "not valid JSON"),
        ('{"image": "0.png"}\n{\n', "line 2 is not valid JSON"),
    ],
)
def test_files_that_cannot_be_used(tiny_bundle: Path, tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(CalibrationError, match=reason):
        read_calibration(Bundle.open(tiny_bundle), tmp_path / "pairs.json")


# --- a mix by hand ---


@pytest.fixture(scope="module")
def by_hand(wide_heads_checkpoint: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose first precision is a mix, in both forms of the decoder."""
    out = tmp_path_factory.mktemp("by-hand") / "bundle"
    command = ["export", str(wide_heads_checkpoint), str(out), "--dtype", "mixed,fp32", "--decoder", "both"]
    command += ["--parts", MIX, "--calibration", str(calibration_file), "--pairs", "6"]
    assert main(command) == 0
    return out


def test_every_part_has_its_operators(by_hand: Path) -> None:
    kinds = ("MatMul", "MatMulInteger", "MatMulNBits", "Floor")
    counts = {}
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged", "decoder_model_merged_fused"):
        counts[name] = count_by_part(by_hand / f"onnx/{name}_quantized.onnx", kinds)
    assert counts == {
        "vision_encoder": {("vision_encoder", "MatMulInteger"): 2 * 6, ("projector", "MatMulInteger"): 2},
        "embed_tokens": {("embeddings", "Floor"): 1},
        "decoder_model_merged": {("decoder", "MatMulNBits"): 2 * 7, ("lm_head", "MatMul"): 1},
        "decoder_model_merged_fused": {("decoder", "MatMulNBits"): 2 * 5, ("lm_head", "MatMul"): 1},
    }


def test_the_manifest_says_what_is_in_a_mix(by_hand: Path, calibration_file: Path) -> None:
    records = Bundle.open(by_hand).manifest.verification
    assert list(records) == ["mixed", "mixed fused", "fp32", "fp32 fused"]
    for name in ("mixed", "mixed fused"):
        assert format_parts(records[name]["parts"]) == f"{MIX},lm_head=fp32"
        assert records[name]["search"] is None
        assert 0 < records[name]["calibration"]["relative_rms"] < 0.6
    assert "parts" not in records["fp32"]
    assert records["fp32"]["calibration"]["agreement"] == 1
    assert records["fp32"]["calibration"]["pairs"] == records["fp32"]["calibration"]["calibrated_on"] == 12
    assert records["fp32"]["calibration"]["source"] == calibration_file.name
    card = (by_hand / "README.md").read_text()
    assert "vision_encoder int8_smooth, projector int8, embeddings q4, decoder q4_gptq, lm_head fp32" in card
    assert "| precision | answers that match |" in card


def test_transformers_js_is_told_the_default(by_hand: Path, tiny_bundle: Path) -> None:
    for path, dtype in ((by_hand, "q8"), (tiny_bundle, "fp32")):
        assert json.loads((path / "config.json").read_text())["transformers.js_config"]["dtype"] == dtype


def test_a_mix_is_verified_and_served(by_hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(by_hand), "--pairs", "6"]) == 0
    assert "mixed fused: 1" in capsys.readouterr().out
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    engine = Engine.open(by_hand, threads=1)
    assert len(engine.answer("How many red circles?", [image], max_new_tokens=8).tokens) == 8


# --- a mix that is found ---


@pytest.fixture
def variants(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> Variants:
    """The tiny model's float32 graphs as the export has them before it quantises."""
    for name in GRAPHS:
        shutil.copy(tiny_bundle / f"onnx/{name}.onnx", tmp_path)
    config = open_checkpoint(tiny_checkpoint).config
    bundle = Bundle.open(tiny_bundle)
    text = config.text_config
    descriptions = [
        VisionEncoder(config.vision_config, bundle.model),
        EmbedTokens(text, bundle.model),
        PortableDecoder(text, bundle.model),
    ]
    return Variants(tmp_path, bundle, descriptions)


@pytest.mark.parametrize("max_drop", [0.0, 25.0])
def test_a_mix_within_the_allowed_drop_is_found(variants: Variants, max_drop: float) -> None:
    said: list[str] = []
    mixing = Mixing.prepare(MixOptions(max_drop=max_drop, pairs=PAIRS), variants, None)
    mixing.search(said.append)
    record = mixing.record("mixed", variants.runner(mixing.parts))
    search, found = record["search"], record["calibration"]
    assert found["drop"] <= max_drop
    assert len(search["trials"]) == 4 * 4 + 2
    assert search["accuracy"] == 1  # of the float32 model's own answers
    assert max(trial["drop"] for trial in search["trials"]) > 25  # random weights forgive little
    assert parse_parts(search["command"].removeprefix("--parts ")) == mixing.parts == record["parts"]
    assert sum(line.startswith("measure ") for line in said) == 18
    held = [attempt for attempt in search["attempts"] if attempt["held"]]
    assert held or max_drop == 0
    if held:  # what was recorded is what a fresh measurement gives
        again = {**held[0]["score"], "seconds": 0}
        assert again.items() <= {**found, "seconds": 0}.items()
        assert held[0]["mix"]["parts"] == mixing.parts
    assert variants.bytes(mixing.parts) <= search["float32"]["bytes"]


def trial(part: str, method: str, drop: float, relative_rms: float, size: int, seconds: float) -> Trial:
    return Trial(part, method, drop, 1.0, relative_rms, size, seconds)


def test_what_is_predicted_of_a_mix() -> None:
    float32 = trial("vision_encoder", "fp32", 0.0, 0.0, 1000, 4.0)
    trials = [
        trial("decoder", "q4", 1.5, 0.3, 600, 3.0),
        trial("decoder", "int8", -0.5, 0.1, 700, 2.0),
        trial("lm_head", "int8", 0.5, 0.4, 900, 3.0),
    ]
    mixes = {(mix.parts["decoder"], mix.parts["lm_head"]): mix for mix in predict(float32, trials, 90.0)}
    assert list(mixes) == [
        ("int8", "int8"),
        ("q4", "int8"),
        ("int8", "fp32"),
        ("q4", "fp32"),
        ("fp32", "int8"),
        ("fp32", "fp32"),
    ]
    both = mixes["q4", "int8"]
    assert (both.drop, both.bytes, both.seconds) == (2.0, 500, 2.0)
    assert both.relative_rms == pytest.approx(0.5)
    assert both.cost == pytest.approx(0.25)
    assert mixes["int8", "int8"].drop == 0.5  # what the decoder won does not pay for the head
    assert predict(float32, trials, 1.0)[1].drop == 1.0  # no more than there is


def test_auto_writes_what_it_found(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    command = ["export", str(tiny_checkpoint), str(out), "--dtype", "fp32,auto", "--max-drop", "100"]
    assert main([*command, "--calibration-pairs", "12", "--pairs", "6"]) == 0
    printed = capsys.readouterr().out
    record = Bundle.open(out, "mixed", check_hashes=True).manifest.verification["mixed"]
    assert f"again without the search: --dtype mixed --parts {format_parts(record['parts'])}\n" in printed
    assert set(record["parts"]) == set(PARTS)
    assert "1. taken" in printed
    attempt = record["search"]["attempts"][0]
    assert attempt["bytes"] < 0.75 * record["search"]["float32"]["bytes"]
    assert record["calibration"]["pairs"] == 6
    assert main(["verify", str(out), "--pairs", "6"]) == 0
