"""A checkpoint with the LDPv2 projector goes the whole way: folder, verified bundle, the engine's answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaConfig
from transformers.models.clip import CLIPVisionConfig, CLIPVisionModel
from transformers.models.llama import LlamaConfig
from transformers.models.siglip import SiglipVisionConfig

from switchkd.cli.main import main
from switchkd.export.assembly import export_checkpoint
from switchkd.export.contract.bundle import Bundle
from switchkd.export.graphs.tracing import ExportError
from switchkd.export.llava.projectors import Ldpv2LlavaForConditionalGeneration, encoder_tokens, tokens_per_picture
from switchkd.serve import Engine
from switchkd.training.models.vlm import build_vlm, load_vlm

QUESTION = "What colour is the square on the left?"


@pytest.fixture(scope="module")
def checkpoint(ldpv2_checkpoint: Path) -> Path:
    """The tiny checkpoint with the other projector, under its name here."""
    return ldpv2_checkpoint


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldpv2-bundle") / "bundle"
    config = json.loads((checkpoint / "config.json").read_text())
    # As transformers notes it in what others put together.
    config["text_config"]["_name_or_path"] = str(checkpoint.parent / "language_model")
    (checkpoint / "config.json").write_text(json.dumps(config))
    export_checkpoint(checkpoint, path, pairs=6)
    return path


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Two pictures that differ in every place."""
    random = np.random.default_rng(5)
    return [Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)) for size in ((24, 24, 3), (60, 45, 3))]


def test_manifest_and_record(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["model"]["tokens_per_picture"] == 9
    assert manifest["source"]["projector"] == "ldpv2"
    record = manifest["verification"]
    assert record["fp32"]["image_features"]["max_abs"] <= 1e-4
    assert record["fp32"]["greedy"]["equal"] == record["fp32"]["greedy"]["prompts"] == 6
    assert 0 < record["int8"]["image_features"]["relative_rms"] < 0.3
    card = (bundle / "README.md").read_text()
    assert "ldpv2 projector" in card
    assert "is 9 visual tokens" in card


def test_an_mlp_is_named_too(tiny_bundle: Path) -> None:
    assert json.loads((tiny_bundle / "manifest.json").read_text())["source"]["projector"] == "mlp"
    assert "mlp projector" in (tiny_bundle / "README.md").read_text()


def test_files_of_the_bundle_expand_a_picture_to_its_tokens(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    assert (config["model_type"], config["image_seq_length"], config["projector_grid"]) == ("llava", 9, 3)
    # transformers.js goes by the architecture, and this one it knows.
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    # As its processor counts: whole patches, and this many more or fewer.
    processor = json.loads((bundle / "processor_config.json").read_text())
    assert processor["image_token"] == "<image>"
    assert (24 // processor["patch_size"]) ** 2 + processor["num_additional_image_tokens"] == 9
    inputs = AutoProcessor.from_pretrained(bundle, backend="pil")(
        text="<image>", images=Image.new("RGB", (50, 30)), return_tensors="pt"
    )
    assert inputs["input_ids"].shape[1] == 9


@pytest.mark.parametrize(("projector", "tokens"), [("mlp", 16), ("ldpv2", 9)])
def test_clips_class_token_is_not_counted(
    checkpoint: Path, clip_vision: CLIPVisionConfig, tmp_path: Path, projector: str, tokens: int
) -> None:
    CLIPVisionModel(clip_vision).save_pretrained(tmp_path / "encoder")
    shutil.copy(checkpoint.parent / "encoder" / "preprocessor_config.json", tmp_path / "encoder")
    language_model = checkpoint.parent / "language_model"
    build_vlm(tmp_path / "encoder", language_model, projector=projector, projector_grid=3).save(tmp_path / "vlm")
    export_checkpoint(tmp_path / "vlm", tmp_path / "bundle", precisions=["fp32"], pairs=6)
    assert Bundle.open(tmp_path / "bundle").model.tokens_per_picture == tokens
    processor = json.loads((tmp_path / "bundle" / "processor_config.json").read_text())
    assert 4 * 4 + processor["num_additional_image_tokens"] == tokens
    for folder in ("vlm", "bundle"):
        inputs = AutoProcessor.from_pretrained(tmp_path / folder, backend="pil")(
            text="<image>", images=Image.new("RGB", (50, 30)), return_tensors="pt"
        )
        assert inputs["input_ids"].shape[1] == tokens, folder


def test_small_files_say_nothing_of_this_machine(bundle: Path, checkpoint: Path) -> None:
    here = str(checkpoint.parent)
    assert here in (checkpoint / "config.json").read_text()
    assert not [path.name for path in bundle.iterdir() if path.is_file() and here in path.read_text()]


def test_pooling_and_convolution_stay_float_in_int8(bundle: Path) -> None:
    graph = onnx.load(bundle / "onnx/vision_encoder_int8.onnx").graph
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and set(node.input) & set(constants)]
    assert [constants[node.input[0]] for node in products] == [(3, 4), (3, 4)]
    (_, convolution) = (node for node in graph.node if node.op_type == "Conv")  # the first makes patches
    (groups,) = (attribute.i for attribute in convolution.attribute if attribute.name == "group")
    assert groups == 32
    # Two layers of the encoder are read, six products each; both of the projector's are 8 bit as well.
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 2 * 6 + 2


@pytest.mark.parametrize(("side", "grid"), [(5, 3), (4, 4), (27, 12)])
def test_vision_graph_at_sizes_that_do_not_divide(
    vision_graph_equals_torch: Callable[..., None], tmp_path: Path, side: int, grid: int
) -> None:
    settings: dict[str, Any] = {"projector_type": "ldpv2", "projector_grid": grid}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=20,
            intermediate_size=28,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=4 * side,
            patch_size=4,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        vision_feature_layer=[-2, -3],
        vision_feature_select_strategy="full",
        **settings,
    )
    assert (encoder_tokens(config), tokens_per_picture(config)) == (side**2, grid**2)
    model = Ldpv2LlavaForConditionalGeneration(config).eval()
    vision_graph_equals_torch(model, grid**2, 4 * side, tmp_path / "vision_encoder.onnx", (1, 3))


@pytest.mark.parametrize("count", [1, 2])
def test_engine_answers_as_torch_does(bundle: Path, checkpoint: Path, pictures: list[Image.Image], count: int) -> None:
    vlm = load_vlm(checkpoint)
    parts: Any = [{"type": "image"}] * count + [{"type": "text", "text": QUESTION}]
    prompt = vlm.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = vlm.processor(text=prompt, images=pictures[:count], return_tensors="pt")
    model: Any = vlm.model.eval()
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ].tolist()
    engine = Engine.open(bundle, "fp32", threads=1)
    answer = engine.answer(QUESTION, pictures[:count], max_new_tokens=20)
    eos = engine.bundle.model.eos_token_ids
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert list(answer.tokens) == [token for token in expected if token not in eos]
    assert len(answer.tokens) > 1
    # The picture counts: another one is answered otherwise.
    other = engine.answer(QUESTION, pictures[::-1][:count], max_new_tokens=20)
    assert other.tokens != answer.tokens


def test_verify_compares_it_with_its_checkpoint(
    bundle: Path, checkpoint: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle), "--checkpoint", str(checkpoint)]) == 0
    assert f"{bundle}: verified" in capsys.readouterr().out
    # The same encoder and language model with an MLP is another model.
    assert main(["verify", str(bundle), "--checkpoint", str(tiny_checkpoint)]) == 2
    assert "tokens_per_picture is 9 in the manifest and 16 in" in capsys.readouterr().err


def drop_the_convolution(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["multi_modal_projector.peg.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def configure(**changes: Any) -> Any:
    def change(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop_the_convolution, r"1 weights are missing, the first is .*peg\.weight"),
        (configure(projector_type="mlp"), r"peg\.bias is no weight of the projector .*'mlp'.*correct projector_type"),
        (configure(projector_type="resampler"), r"config\.json: projector_type is 'resampler', expected mlp or ldpv2"),
        (configure(projector_grid=5), r"config\.json: projector_grid is 5, expected 1 to 4"),
        (configure(projector_grid="12"), r"config\.json: projector_grid is '12', expected 1 to 4"),
        (configure(vision_feature_select_strategy="default"), r"config\.json: the encoder's 15 tokens are no square"),
    ],
)
def test_what_cannot_be_exported(checkpoint: Path, tmp_path: Path, spoil: Any, reason: str) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    spoil(copy)
    with pytest.raises(ExportError, match=reason) as caught:
        export_checkpoint(copy, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
