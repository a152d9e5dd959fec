"""What phones need of a bundle: .ort files, the mobile usability checker's verdicts, and a card that says how."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from switchkd.cli.main import main
from switchkd.export.card.licence import stated_licence
from switchkd.export.card.mobile_checker import check_mobile
from switchkd.export.card.ort_files import ort_file, write_ort_files
from switchkd.export.contract.bundle import DECODER, GRAPHS, MANIFEST, Bundle
from switchkd.export.graphs.tracing import ExportError

PRECISIONS = ("fp32", "fp16", "int8", "q4")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle with .ort files, of a checkpoint that states its licence."""
    folder = tmp_path_factory.mktemp("phones")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    front = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: LICENSE\ntags: [a]\n---\n# Tiny\n"
    (folder / "checkpoint" / "README.md").write_text(front)
    (folder / "checkpoint" / "LICENSE").write_text("Do what you like.\n")
    words = ["export", str(folder / "checkpoint"), str(folder / "bundle"), "--dtype", ",".join(PRECISIONS)]
    assert main([*words, "--ort", "--external-data", "--pairs", "6"]) == 0
    yield folder / "bundle"
    shutil.rmtree(folder)


# --- .ort files ---


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ort_files_give_what_the_graphs_give(bundle: Path, precision: str) -> None:
    opened = Bundle.open(bundle, precision)
    model = opened.model
    random = np.random.default_rng(0)
    embeds_BTD = random.standard_normal((2, 5, model.hidden_size)).astype(np.float32)
    cache = np.zeros((2, model.cache.kv_heads, 0, model.cache.head_dim), opened.cache_dtype)
    feeds = {
        "pixel_values": random.standard_normal((2, *model.picture_shape)).astype(np.float32),
        "input_ids": random.integers(0, model.vocab_size, (2, 7)),
        "inputs_embeds": embeds_BTD,
        "attention_mask": np.ones((2, 5), np.int64),
        "position_ids": np.arange(5)[None].repeat(2, axis=0),
        "num_logits_to_keep": np.array(2),
        **dict.fromkeys(model.cache.past_names(), cache),
    }
    for name in GRAPHS:
        graph = opened.graph(name)
        sessions = [onnxruntime.InferenceSession(bundle / file) for file in (graph.file, ort_file(graph))]
        inputs = {tensor.name: feeds[tensor.name] for tensor in graph.inputs}
        for wanted, got in zip(*(session.run(None, inputs) for session in sessions), strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-3 * max(1.0, np.abs(wanted).max()))


def test_operators_for_a_reduced_build_are_listed(bundle: Path) -> None:
    lines = (bundle / "ort" / "required_operators.config").read_text().splitlines()
    assert "# - decoder_model_merged_q4.ort" in lines  # without a folder of this machine
    own = next(line for line in lines if line.startswith("com.microsoft;1;")).split(";")[2].split(",")
    assert set(own) >= {"MatMulNBits", "DynamicQuantizeMatMul"}
    assert {line.split(";")[0] for line in lines if ";" in line} == {"ai.onnx", "com.microsoft"}


def test_ort_files_are_listed_and_others_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle, check_hashes=True).manifest
    assert {ort_file(graph) for graph in manifest.graphs} < set(manifest.files)
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (copy / "ort" / "another.ort").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"another\.ort: the manifest does not list it"):
        Bundle.open(copy)


def test_another_graph_under_an_ort_files_name_is_found(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    shutil.copyfile(copy / "ort/vision_encoder_q4.ort", copy / "ort/vision_encoder.ort")
    content = json.loads((copy / MANIFEST).read_text())
    content["files"]["ort/vision_encoder.ort"] = content["files"]["ort/vision_encoder_q4.ort"]
    (copy / MANIFEST).write_text(json.dumps(content))
    assert main(["verify", str(copy)]) == 2
    assert "ort/vision_encoder.ort: differs from the reference" in capsys.readouterr().err


def test_graphs_over_2_gb_are_refused(bundle: Path, tmp_path: Path) -> None:
    graph = Bundle.open(bundle).graph(DECODER)
    (tmp_path / "onnx").mkdir()
    for name in (graph.file, *graph.data):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**31)  # of nothing: it takes no room
    with pytest.raises(ExportError, match=r"onnx/decoder_model_merged\.onnx: 4\.3 GB, and an \.ort file holds 2 GB"):
        write_ort_files(tmp_path, [graph])
    assert not (tmp_path / "ort").exists()


# --- the checker ---


def test_the_checker_knows_every_portable_graph(bundle: Path) -> None:
    found = {}
    for precision in ("fp32", "fp16", "int8"):
        for name in GRAPHS:
            accelerated, verdicts = check_mobile(Bundle.open(bundle, precision).graph_path(name))
            assert [verdict.accelerator for verdict in verdicts] == [
                accelerator
                for accelerator in ("NNAPI", "CoreML NeuralNetwork", "CoreML MLProgram")
                for _ in ("as is", "fixed")
            ]
            assert all(0 <= verdict.nodes <= verdict.of_nodes for verdict in verdicts)
            found[precision, name] = accelerated, {str(verdict).partition(" (")[0] for verdict in verdicts}
    # CoreML takes the whole float32 encoder if its number of pictures is fixed. Masks, float16 and 8 bit: the CPU.
    whole = "CoreML MLProgram if modified to have fixed input shapes: YES"
    assert {key[1] for key, (_, said) in found.items() if whole in said} == {"vision_encoder"}
    assert [key for key, (accelerated, _) in found.items() if accelerated and key[1] != "embed_tokens"] == [
        ("fp32", "vision_encoder")
    ]


def test_verify_prints_the_verdicts(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle), "--mobile"]) == 0
    out = capsys.readouterr().out
    assert "onnx/vision_encoder.onnx: an accelerator may help\n" in out
    assert "onnx/decoder_model_merged_int8.onnx: best on the CPU\n    NNAPI as is: NO (" in out


# --- the card ---


def test_card_states_licence_speed_and_files_for_phones(bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    front = card.split("---\n")[1]
    assert 'license: "other"\nlicense_name: "tiny-licence"\nlicense_link: "LICENSE"\n' in front
    assert "The checkpoint states: tiny-licence (LICENSE). Its text: `LICENSE`." in card
    assert (bundle / "LICENSE").read_text() == "Do what you like.\n"
    manifest = Bundle.open(bundle).manifest
    for precision in PRECISIONS:
        speed = manifest.verification[precision]["speed"]
        assert min(speed["encode"], speed["prefill"], speed["decode"]) > 0
        assert f"| {precision} | {1e3 * speed['encode']:,.2f} ms | {1e3 * speed['prefill']:,.2f} ms |" in card
    phones = card.partition("### On Android and iOS")[2]
    smallest = manifest.graph_bytes("q4")
    assert sum(smallest.values()) < sum(manifest.graph_bytes("int8").values())
    shipped = phones.partition(":")[0]
    for name in GRAPHS:
        graph = Bundle.open(bundle, "q4").graph(name)
        assert all(f"`{file}`" in shipped.replace("\n", " ") for file in (graph.file, *graph.data))
    assert "`q4` is the smallest precision of this bundle with a float32 KV cache" in phones.replace("\n", " ")
    assert "$" not in phones.replace("$folder", "").replace("/$it", "").replace("$0", "")


def test_card_without_a_licence_says_so(tiny_bundle: Path, tmp_path: Path) -> None:
    card = (tiny_bundle / "README.md").read_text()
    assert "license" not in card.split("---\n")[1]
    assert "The checkpoint states none." in card
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ExportError, match=r"README\.md: its front matter is not YAML"):
        stated_licence(tmp_path)
