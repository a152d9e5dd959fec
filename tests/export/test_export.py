"""A checkpoint becomes a verified bundle through the real command; what fails verification leaves nothing behind."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.export.assembly import export_checkpoint
from switchkd.export.contract.bundle import Bundle
from switchkd.export.contract.pixels import to_pixels
from switchkd.export.graphs.onnx_graph import OnnxGraph
from switchkd.export.graphs.tracing import ExportError
from switchkd.export.quantisation.precisions import PRECISIONS, Precision
from switchkd.export.verification.graph_runner import (
    Array,
    AxesError,
    GraphRunError,
    GraphRunner,
    Greedy,
    NamesError,
    ShapeError,
    TokensError,
    ValuesError,
    exercise,
)
from switchkd.export.verification.parity import compare, record, sample_prompts
from switchkd.export.verification.reference import TorchReference


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_layout_and_record(tiny_bundle: Path) -> None:
    assert set(contents(tiny_bundle)) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *(
            f"onnx/{name}{suffix}.onnx"
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
            for suffix in ("", "_int8")
        ),
    }
    record = json.loads((tiny_bundle / "manifest.json").read_text())["verification"]
    assert record["fp32"]["image_features"]["max_abs"] <= 1e-4
    assert record["fp32"]["logits"]["max_abs"] <= 1e-3
    assert record["fp32"]["greedy"]["equal"] == record["fp32"]["greedy"]["prompts"] == 6
    assert 0 < record["int8"]["logits"]["relative_rms"] < 0.3


def test_files_for_transformers_js(tiny_bundle: Path) -> None:
    tokenizer = json.loads((tiny_bundle / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "Qwen2Tokenizer"
    assert "<|im_start|>" in tokenizer["chat_template"]
    processor = json.loads((tiny_bundle / "preprocessor_config.json").read_text())
    assert processor["processor_class"] == "LlavaProcessor"
    assert processor["image_processor_type"] == "SiglipImageProcessor"
    counting = json.loads((tiny_bundle / "processor_config.json").read_text())
    assert (counting["patch_size"], counting["num_additional_image_tokens"], counting["image_token"]) == (
        6,
        0,
        "<image>",
    )


def test_graphs_are_small_and_say_nothing_of_this_machine(tiny_bundle: Path) -> None:
    vision = onnx.load(tiny_bundle / "onnx/vision_encoder.onnx")
    # Three layers in the checkpoint, features of the second: two attentions and no trace of the third.
    assert Counter(node.op_type for node in vision.graph.node)["Softmax"] == 2
    assert not any("layers.2" in tensor.name for tensor in vision.graph.initializer)
    here = f"/{Path(__file__).resolve().parts[1]}".lower().encode()  # the folder under which this checkout lies
    for file in (tiny_bundle / "onnx").iterdir():
        assert here not in file.read_bytes().lower()
        assert b"site-packages" not in file.read_bytes()


def test_int8_is_the_fast_form(tiny_bundle: Path) -> None:
    for name in ("vision_encoder", "decoder_model_merged"):
        graph = onnx.load(tiny_bundle / f"onnx/{name}_int8.onnx").graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type == "MatMulInteger"]
        assert products
        for node in products:
            weight = weights[node.input[1]]
            assert weight.data_type == onnx.TensorProto.INT8  # with sign; the activations' uint8 is the operator's own
            zero_point = weights[node.input[3]]
            assert list(zero_point.dims) == [weight.dims[1]]  # one per output channel
            assert not numpy_helper.to_array(zero_point).any()
        assert not any(node.op_type == "MatMul" and node.input[1] in weights for node in graph.node)


def test_int8_is_smaller(tiny_bundle: Path) -> None:
    def size(name: str, precision: str) -> int:
        return Bundle.open(tiny_bundle, precision).graph_path(name).stat().st_size

    # The other two hold more graph than weights at this size.
    assert size("embed_tokens", "int8") < 0.33 * size("embed_tokens", "fp32")  # a quarter, and 4 bytes for every 32
    assert size("decoder_model_merged", "int8") < 0.6 * size("decoder_model_merged", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_graphs_run_over_their_axes(tiny_bundle: Path, precision: str) -> None:
    assert exercise(GraphRunner(Bundle.open(tiny_bundle, precision))) == 16


def test_answers_as_plain_transformers_does(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    model: Any = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    bundle = Bundle.open(tiny_bundle)
    pixels = to_pixels(image, bundle.preprocessing)[None]
    got = GraphRunner(bundle).greedy(inputs["input_ids"][0].tolist(), pixels, 20)
    assert got.tokens == expected.tolist()


def test_tokenizer_of_the_bundle_is_the_checkpoints(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    text = "<|im_start|>user\n<image>\nHow many red circles?<|im_end|>\n  12 Ünïcödé"
    assert AutoTokenizer.from_pretrained(tiny_bundle).encode(text) == AutoTokenizer.from_pretrained(
        tiny_checkpoint
    ).encode(text)


def test_script_of_the_card_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    script = re.search(r"```python\n(import sys.*?)```", (tiny_bundle / "README.md").read_text(), re.DOTALL)
    assert script is not None
    assert len(script[1].splitlines()) <= 60
    picture = tmp_path / "picture.png"
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    image.save(picture)
    result = subprocess.run(
        [sys.executable, "-c", script[1], str(picture), "How many?"],
        cwd=tiny_bundle,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == answer(tiny_bundle, image, "How many?").strip()


def answer(path: Path, image: Image.Image, question: str) -> str:
    bundle = Bundle.open(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    visual = "<image>" * bundle.model.tokens_per_picture
    prompt = f"<|im_start|>user\n{visual}\n{question}<|im_end|>\n<|im_start|>assistant\n"
    greedy = GraphRunner(bundle).greedy(tokenizer.encode(prompt), to_pixels(image, bundle.preprocessing)[None], 64)
    return str(tokenizer.decode(greedy.tokens, skip_special_tokens=True))


# --- the command ---


def test_export_and_verify_commands(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A base model's settings, as Qwen2.5's are: they end documents, not turns.
    settings = {"eos_token_id": 0, "num_beams": 4, "repetition_penalty": 1.1, "max_length": 300}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    before = contents(checkpoint)
    out = tmp_path / "deep" / "bundle"
    assert main(["export", str(checkpoint), str(out), "--dtype", "int8", "--pairs", "9"]) == 0
    assert contents(checkpoint) == before
    assert [file.name for file in out.parent.iterdir()] == ["bundle"]
    bundle = Bundle.open(out)
    assert bundle.precision == "int8"
    assert not (out / "onnx/vision_encoder.onnx").exists()
    assert bundle.model.eos_token_ids == (2, 0)
    assert json.loads((out / "generation_config.json").read_text()) == {**settings, "eos_token_id": [2, 0]}
    told = capsys.readouterr().out
    assert (
        "note: the chat template ends a turn with <|im_end|>, generation_config.json names <|endoftext|>: each of them "
        "ends an answer\n"
    ) in told
    left = "generation_config.json asks for num_beams 4, max_length 300: switchkd.serve does not do that\n"
    assert f"note: {left}" in told
    card = " ".join((out / "README.md").read_text().split())
    assert (
        "`<|im_end|>` or `<|endoftext|>` ends an answer. `generation_config.json` asks for `repetition_penalty`" in card
    )
    assert "It also asks for `num_beams` 4, `max_length` 300, which `switchkd.serve` does not do." in card
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--checkpoint", str(checkpoint)]) == 0
    assert f"{out}: verified" in capsys.readouterr().out
    assert main(["export", str(checkpoint), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


# --- refusals ---


def spoiled(bundle: Path, tmp_path: Path, name: str, model: onnx.ModelProto) -> GraphRunner:
    """A runner of a copy in which one graph was replaced, and the manifest's size with it."""
    copy = Path(shutil.copytree(bundle, tmp_path / "spoiled"))
    file = copy / f"onnx/{name}.onnx"
    onnx.save(model, file)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][f"onnx/{name}.onnx"]["bytes"] = file.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return GraphRunner(Bundle.open(copy, "fp32"))


def load(bundle: Path, name: str) -> onnx.ModelProto:
    return onnx.load(bundle / f"onnx/{name}.onnx")


def test_wrong_name_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load(tiny_bundle, "embed_tokens")
    model.graph.node[0].output[0] = model.graph.output[0].name = "embeddings"
    with pytest.raises(NamesError, match=r"embed_tokens\.onnx: its outputs are \['embeddings'\]"):
        exercise(spoiled(tiny_bundle, tmp_path, "embed_tokens", model))


def test_frozen_axis_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load(tiny_bundle, "embed_tokens")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(AxesError, match=r"input_ids is int64 .*frozen axis"):
        exercise(spoiled(tiny_bundle, tmp_path, "embed_tokens", model))


def test_axis_that_is_free_in_name_only_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load(tiny_bundle, "embed_tokens")
    model.graph.node[0].output[0] = "looked_up"
    # It gives the first row only, and onnxruntime cannot know that when it loads the graph.
    model.graph.initializer.append(numpy_helper.from_array(np.array([True]), "first"))
    model.graph.node.append(
        onnx.helper.make_node("Compress", ["looked_up", "first"], [model.graph.output[0].name], axis=0)
    )
    runner = spoiled(tiny_bundle, tmp_path, "embed_tokens", model)
    with pytest.raises(ShapeError, match=r"embed_tokens\.onnx: inputs_embeds came out as float32 \[1, \d+, 32\]"):
        exercise(runner)


def test_not_a_number_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load(tiny_bundle, "embed_tokens")
    weights = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights[:] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, model.graph.initializer[0].name))
    runner = spoiled(tiny_bundle, tmp_path, "embed_tokens", model)
    with pytest.raises(ShapeError, match="not finite"):
        exercise(runner)


def test_graph_that_does_not_load_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load(tiny_bundle, "vision_encoder")
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(GraphRunError, match=r"vision_encoder\.onnx: onnxruntime cannot load it"):
        exercise(spoiled(tiny_bundle, tmp_path, "vision_encoder", model))


def shifted_logits(name: str, graph: OnnxGraph) -> None:
    """A precision that is wrong by a little in the decoder."""
    if name == "decoder_model_merged":
        main = graph.proto.graph
        product = next(node for node in main.node if node.output[0] == "logits")
        product.output[0] = "unshifted"
        main.initializer.append(numpy_helper.from_array(np.array([0.05], dtype=np.float32), "shift"))
        main.node.append(onnx.helper.make_node("Add", ["unshifted", "shift"], ["logits"]))


def test_a_wrong_graph_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tiny_checkpoint)
    monkeypatch.setitem(
        PRECISIONS, "wrong", Precision("wrong", "_wrong", shifted_logits, PRECISIONS["fp32"].bounds, "wrong")
    )
    with pytest.raises(ValuesError, match=r"onnx/decoder_model_merged_wrong\.onnx: differs"):
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", precisions=["wrong"], pairs=6)
    assert list(tmp_path.iterdir()) == []
    assert contents(tiny_checkpoint) == before


class Contrary(TorchReference):
    """Agrees about every number, and then answers another prompt."""

    def greedy(self, ids: Sequence[int], pixels_PCHW: Array | None, max_new_tokens: int) -> Greedy:
        return super().greedy([*ids, *ids[-3:]], pixels_PCHW, max_new_tokens)


def test_other_answers_are_found(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint)
    runner = GraphRunner(Bundle.open(tiny_bundle))
    prompts = sample_prompts(runner.bundle)
    expected = record(Contrary(model, runner.bundle.model.eos_token_ids), prompts)
    with pytest.raises(TokensError, match="greedy answers to pair 1 of 6 part at token"):
        compare(runner, prompts, expected, PRECISIONS["fp32"].bounds)


# --- checkpoints that cannot be exported ---


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit(file: Path, *keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        (("model_type",), "llava_next", "model_type is 'llava_next', switchkd exports llava"),
        (("text_config", "model_type"), "mistral", "text_config.model_type is 'mistral'"),
        (("vision_config", "model_type"), "dinov2", "vision_config.model_type is 'dinov2'"),
        (("text_config", "layer_types"), ["full_attention", "sliding_attention"], "sliding windows"),
        (("text_config", "rope_parameters"), {"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
        (("text_config", "hidden_size"), 64, r"30 weights have other shapes .*\[300, 32\], expected \[300, 64\]"),
        (("vision_feature_layer",), -5, "vision_feature_layer is -5, the vision encoder has 3 layers"),
        (("vision_feature_select_strategy",), "cls", r"config\.json: .*'default', 'full'\), got cls"),
        (("multimodal_projector_bias",), False, "linear_1.bias is no weight of the projector"),
        (("quantization_config",), {"quant_method": "gptq"}, r"its weights are quantised \(gptq\)"),
        (("image_token_index",), 999, "image_token_index is 999"),
    ],
)
def test_config_that_cannot_be_exported(checkpoint: Path, keys: tuple[str, ...], value: Any, reason: str) -> None:
    edit(checkpoint / "config.json", *keys, value=value)
    cannot_export(checkpoint, reason)


def test_sliding_windows_that_older_configs_do_not_list(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    for name, value in (("use_sliding_window", True), ("sliding_window", 64), ("max_window_layers", 1)):
        edit(file, "text_config", name, value=value)
    edit(file, "text_config", "layer_types", value=None)
    cannot_export(checkpoint, "sliding windows")


def test_checkpoint_of_another_make(checkpoint: Path) -> None:
    """A head of its own, a projector without biases that reads two layers, numbers beyond float16, several files."""
    weights = load_file(checkpoint / "model.safetensors")
    weights[next(name for name in weights if name.endswith("encoder.layers.0.mlp.fc2.bias"))][3] += 3e5
    weights = {name: tensor for name, tensor in weights.items() if not re.search(r"projector.*bias", name)}
    first = next(name for name in weights if "linear_1.weight" in name)
    weights[first] = torch.cat([weights[first], weights[first].flip(0)], dim=1)
    embeddings = next(tensor for name, tensor in weights.items() if "embed_tokens" in name)
    weights["lm_head.weight"] = embeddings.flip(0)
    for keys, value in (
        (("multimodal_projector_bias",), False),
        (("vision_feature_layer",), [-2, -3]),
        (("tie_word_embeddings",), False),
        (("text_config", "tie_word_embeddings"), False),
    ):
        edit(checkpoint / "config.json", *keys, value=value)
    (checkpoint / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for shard in set(places.values()):
        part = {name: weights[name].contiguous() for name in names if places[name] == shard}
        save_file(part, checkpoint / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    out = checkpoint.parent / "bundle"
    export_checkpoint(checkpoint, out, precisions=["fp32", "fp16"], pairs=6)
    constants = [numpy_helper.to_array(tensor) for tensor in load(out, "decoder_model_merged").graph.initializer]
    head = weights["lm_head.weight"].numpy()
    assert any(np.array_equal(constant, head.T) for constant in constants)
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["source"]["weights"]) == 2
    # What float16 cannot hold stays float32 in that precision, and whoever reads of it is told.
    assert "float32" not in manifest["verification"]["fp32"]
    kept = manifest["verification"]["fp16"]["float32"]["vision_encoder"]
    assert kept["parts"] == ["vision_encoder", "projector"]
    said = f"- In `fp16` {kept['operators']} operators of `vision_encoder` (vision_encoder, projector) stay float32"
    assert said in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_missing_part_of_a_checkpoint(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    cannot_export(checkpoint, f"{name}: missing")


def test_cut_weights(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    cannot_export(checkpoint, r"model\.safetensors: not whole")


def test_pickled_weights_are_never_loaded(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    cannot_export(checkpoint, r"pytorch_model\.bin: pickled weights can hold code")


def test_missing_shard(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    shard = "model-0000{}-of-00002.safetensors".format
    save_file(weights, checkpoint / shard(1), metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard(1)) | {"lm_head.weight": shard(2)}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    cannot_export(checkpoint, r"model-00002-of-00002\.safetensors: missing")


def test_missing_weight(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if "linear_2.weight" in name)
    del weights[name]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    cannot_export(checkpoint, "1 weights are missing, the first is .*linear_2.weight")


def test_pictures_of_another_size(checkpoint: Path) -> None:
    edit(checkpoint / "processor_config.json", "image_processor", "size", value={"height": 30, "width": 24})
    cannot_export(checkpoint, r"prepared as \(30, 24\), the vision encoder takes \(24, 24\)")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "bitsandbytes", "--dtype", "q4"], "--dtype has no effect with --format bitsandbytes"),
        (["--format", "bitsandbytes", "--pairs", "6"], "--pairs has no effect with --format bitsandbytes"),
        (["--only", "verify", "--picture-root", "there"], "--picture-root has no effect with --only verify"),
        (["--bits", "8"], "--bits has no effect with --format onnx"),
        (["--full"], "--full has no effect with --format onnx"),
    ],
)
def test_options_without_effect(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert main(["export", str(tiny_checkpoint), str(tmp_path / "bundle"), *options]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_places_that_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="inside the checkpoint"):
        export_checkpoint(checkpoint, checkpoint / "bundle")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(checkpoint, tmp_path / "taken")
    with pytest.raises(ExportError, match="precision 'fp8' is unknown; choose from fp32, fp16, int8"):
        export_checkpoint(checkpoint, tmp_path / "bundle", precisions=["fp8"])
    with pytest.raises(ExportError, match="no such checkpoint folder"):
        export_checkpoint(tmp_path / "none", tmp_path / "bundle")


def cannot_export(checkpoint: Path, reason: str) -> None:
    out = checkpoint.parent / "bundle"
    with pytest.raises(ExportError, match=reason) as caught:
        export_checkpoint(checkpoint, out)
    assert "\n" not in str(caught.value)
    assert [file.name for file in checkpoint.parent.iterdir()] == ["checkpoint"]
