"""TinyLLaVA Factory's two layouts, written here by its description: imported tensor for tensor, logits compared."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from switchkd.cli.main import main
from switchkd.training.data.label_mask import model_inputs
from switchkd.training.models.alignment import IGNORED
from switchkd.training.models.switch import check_tokenizers
from switchkd.training.models.vlm import build_vlm, load_vlm

SIDE = 24  # of the pictures; 4 x 4 patches
WORDS = 290  # of the tokenizer's vocabulary; three special tokens come behind them
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
QUESTION, ANSWER = "How many circles are there?", "There are three."


@dataclass
class Original:
    """A tiny TinyLLaVA model in parts, and its files as TinyLLaVA Factory names them."""

    tower: Any
    connector: nn.Sequential
    language_model: Any
    tokenizer: Any
    config: dict[str, Any]

    def forward(self, pixels_BCHW: Tensor, prompt: str) -> Tensor:
        """TinyLLaVA's forward for one row: logits at the text, the picture's features where `<image>` stands."""
        features = self.tower(pixels_BCHW, output_hidden_states=True).hidden_states[-2]
        if self.config["vision_feature_select_strategy"] == "patch":
            features = features[:, 1:]
        seen = self.connector(features)[0]
        chunks = [self.tokenizer(chunk)["input_ids"] for chunk in prompt.split("<image>")]
        embed = self.language_model.get_input_embeddings()
        said = [embed(torch.tensor(ids, dtype=torch.long)) for ids in chunks]
        logits: Tensor = self.language_model(inputs_embeds=torch.cat([said[0], seen, said[1]])[None]).logits
        return logits

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Each part's tensors by the names of `named_parameters` in the releases TinyLLaVA Factory runs with."""
        tower = {"vision_model." + name: tensor for name, tensor in self.tower.named_parameters()}
        connector = {"_connector." + name: tensor for name, tensor in self.connector.named_parameters()}
        return {
            part: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for part, tensors in (
                ("language_model", dict(self.language_model.named_parameters())),
                ("vision_tower", tower),
                ("connector", connector),
            )
        }

    def whole(self) -> dict[str, Tensor]:
        """All tensors by the names of the whole model."""
        prefixes = {"language_model": "language_model.", "vision_tower": "vision_tower._vision_tower.", "connector": ""}
        return {
            (prefixes[part] or "connector.") + name: tensor
            for part, tensors in self.parts().items()
            for name, tensor in tensors.items()
        }


def tiny_original(
    folder: Path, *, encoder: str = "siglip", rows: int = WORDS + 3, tied: bool = True, end: str = "<|endoftext|>"
) -> Original:
    """A model with random weights in bfloat16; SigLIP has the pooling head, which TinyLLaVA saves with it."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "image_size": SIDE, "patch_size": 6}
    text: dict[str, Any] = {"vocab_size": rows, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": tied}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower: Any = (
            SiglipVisionModel(SiglipVisionConfig(**sizes))
            if encoder == "siglip"
            else CLIPVisionModel(CLIPVisionConfig(**sizes))
        )
        language_model = Qwen2ForCausalLM(Qwen2Config(**text, initializer_range=0.2))
        connector = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24))
    config = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration.TinyLlavaConfig"},  # as on the hub; never followed
        "model_type": "tinyllava",
        "llm_model_name_or_path": "Qwen/Qwen2-0.5B",
        "tokenizer_name_or_path": "Qwen/Qwen2-0.5B",
        "vision_model_name_or_path": "/data/siglip-so400m-patch14-384",
        "vision_model_name_or_path2": "",
        "connector_type": "mlp2x_gelu",
        "image_token_index": -200,
        "image_aspect_ratio": "square",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "text_config": text | {"model_type": "qwen2", "torch_dtype": "bfloat16", "_name_or_path": "/data/Qwen2-0.5B"},
        "vision_config": sizes | {"model_type": f"{encoder}_vision_model", "model_name_or_path": "/data/siglip"},
    }
    for part in (tower, language_model, connector):
        for parameter in part.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.bfloat16()
    return Original(tower.eval(), connector, language_model.eval(), slow_tokenizer(folder, end), config)


def slow_tokenizer(folder: Path, end: str) -> Any:
    """Write a Qwen2 tokenizer as TinyLLaVA saves it, the slow one: vocab.json, merges.txt, no tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SYSTEM, QUESTION, ANSWER, "USER: ASSISTANT:"] * 3, trainer)
    assert tokenizer.get_vocab_size() == WORDS
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(WORDS + i): {"content": name, **token} for i, name in enumerate(special)},
        "additional_special_tokens": special[1:],
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "eos_token": end,
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 2048,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def write_encoder_folder(folder: Path) -> Path:
    """The folder of the vision encoder as it is on the hub, of which only the image processor is asked here."""
    settings: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    settings |= {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    folder.mkdir(parents=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def write_checkpoint(original: Original, folder: Path, layout: str) -> None:
    """The end of a pretraining (three folders), or of a fine-tuning (one folder, in one file or several)."""
    (folder / "config.json").write_text(json.dumps(original.config))
    if layout == "parts":
        for part, tensors in original.parts().items():
            (folder / part).mkdir()
            torch.save(tensors, folder / part / "pytorch_model.bin")
    elif layout == "whole":
        save_file(original.whole(), folder / "model.safetensors")
    else:
        tensors = original.whole()
        names = sorted(tensors)
        files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, held in files.items():
            save_file({name: tensors[name] for name in held}, folder / file)
        where = {name: file for file, held in files.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def imported_tensors(folder: Path) -> dict[str, Tensor]:
    """The written tensors by TinyLLaVA's names, so that they are compared by name."""
    names = {
        "vision_tower.": "vision_tower._vision_tower.",
        "multi_modal_projector.linear_1.": "connector._connector.0.",
        "multi_modal_projector.linear_2.": "connector._connector.2.",
        "language_model.": "language_model.",
    }
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        (start,) = [start for start in names if name.startswith(start)]
        renamed[names[start] + name.removeprefix(start)] = tensor
    return renamed


@pytest.mark.parametrize(
    ("layout", "settings", "strategy"),
    [
        ("parts", {}, "patch"),
        ("whole", {"end": "<|im_end|>"}, "patch"),
        ("shards", {"rows": 400, "tied": False}, "cls_patch"),
        ("whole", {"encoder": "clip"}, "patch"),
    ],
)
def test_imports_tensor_for_tensor_and_gives_the_same_logits(
    layout: str, settings: dict[str, Any], strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    original = tiny_original(checkpoint, **settings)
    original.config["vision_feature_select_strategy"] = strategy
    write_checkpoint(original, checkpoint, layout)
    encoder = write_encoder_folder(tmp_path / "encoder")
    assert main(["import", "tinyllava", str(checkpoint), str(out), "--encoder", str(encoder)]) == 0

    written, whole = imported_tensors(out), original.whole()
    left_out = {name for name in whole if name not in written}
    assert all("vision_model.head." in name for name in left_out)
    assert ("left out" in capsys.readouterr().err) == bool(left_out) == (original.tower.config.model_type[:4] == "sigl")
    assert written.keys() == whole.keys() - left_out
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        rows = len(whole[name])  # `<image>` may need a row more
        assert len(tensor) == rows or "embed_tokens" in name or "lm_head" in name
        assert torch.equal(tensor[:rows], whole[name]), name

    # Plain transformers loads it: the prompt is TinyLLaVA's, and so are the logits.
    model: Any = LlavaForConditionalGeneration.from_pretrained(out)
    processor: Any = AutoProcessor.from_pretrained(out, backend="pil")
    end = settings.get("end", "<|endoftext|>")
    prompt = f"{SYSTEM}USER: <image>\n{QUESTION} ASSISTANT: {ANSWER}{end}USER: And now? ASSISTANT:"
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": "And now?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt
    picture = Image.linear_gradient("L").resize((50, 30)).convert("RGB")
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    pixels = inputs["pixel_values"].bfloat16()
    for part in (model, original.tower, original.connector, original.language_model):
        part.float()
    with torch.no_grad():
        expected = original.forward(pixels.float(), prompt)
        logits = model(**(dict(inputs) | {"pixel_values": pixels.float()})).logits
        generated = model.generate(**inputs, max_new_tokens=3)
    tokens = {"patch": 15, "cls_patch": 16}[strategy] + (settings.get("encoder") == "clip")
    assert logits.shape[1] == expected.shape[1]
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == tokens
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-5)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == original.tokenizer.convert_tokens_to_ids(end)
    # A path of the machine where it was trained stays there, and there is no code to run.
    assert "/data/" not in "".join(path.read_text() for path in out.glob("*.json"))
    assert "auto_map" not in (out / "config.json").read_text()


def test_training_on_it_supervises_the_answers_as_tinyllava_does(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    original = tiny_original(checkpoint)
    write_checkpoint(original, checkpoint, "whole")
    arguments = ["--encoder", str(write_encoder_folder(tmp_path / "encoder")), "--prompt", "instruct"]
    assert main(["import", "tinyllava", str(checkpoint), str(tmp_path / "out"), *arguments]) == 0
    vlm = load_vlm(tmp_path / "out")
    assert vlm.tokens_per_picture == 15
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    ]
    messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "And now?"}]
    messages += [{"role": "assistant", "content": "Three."}]
    ids, labels = model_inputs(vlm)[0].encode(messages)
    supervised = [label for label in labels if label != IGNORED]
    expected = [
        token
        for text in (f" {ANSWER}<|im_end|>", " Three.<|im_end|>")
        for token in original.tokenizer(text)["input_ids"]
    ]
    assert supervised == expected
    assert ids.count(vlm.model.config.image_token_index) == 15


def test_a_student_of_another_prompt_takes_over_its_own(tmp_path: Path) -> None:
    original = tiny_original(tmp_path / "checkpoint")
    write_checkpoint(original, tmp_path / "checkpoint", "whole")
    encoder = write_encoder_folder(tmp_path / "encoder")
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "teacher"), "--encoder", str(encoder)]
    assert main(["import", "tinyllava", *arguments]) == 0
    student = tmp_path / "student"
    slow_tokenizer(student, "<|im_end|>")  # as an instruct model's: it ends its answers with another token
    original.language_model.save_pretrained(student)
    original.tower.save_pretrained(encoder)
    (student / "chat_template.jinja").write_bytes((tmp_path / "teacher" / "chat_template.jinja").read_bytes())
    ours, theirs = build_vlm(encoder, student, drop_first_patch=True), load_vlm(tmp_path / "teacher")
    check_tokenizers(ours.tokenizer, theirs.tokenizer)
    assert ours.tokenizer.eos_token == theirs.tokenizer.eos_token == "<|endoftext|>"
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert ours.tokens_per_picture == theirs.tokens_per_picture


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"connector_type": "resampler"}, "connector_type is 'resampler', supported is 'mlp2x_gelu'"),
        ({"connector_type": "qformer"}, "connector_type is 'qformer', supported is 'mlp2x_gelu'"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio is 'pad', supported is 'square'"),
        ({"model_type": "llava"}, "model_type is 'llava', supported is 'tinyllava'"),
        ({"vision_model_name_or_path": "mof:openai/clip", "vision_model_name_or_path2": "mof:dino"}, "a mixture"),
        (
            {"llm_model_name_or_path": "microsoft/phi-2", "text_config": {"model_type": "phi"}},
            "'microsoft/phi-2' of type 'phi', supported are Qwen2 and Qwen2.5",
        ),
        ({"text_config": {"model_type": "stablelm"}}, "of type 'stablelm', supported are Qwen2 and Qwen2.5"),
        ({"vision_config": {"model_type": "dinov2"}}, "of type 'dinov2', supported are siglip_vision_model"),
        ({"text_config": None, "llm_model_name_or_path": "/data/qwen2"}, "give it by --language-model FOLDER"),
        ({}, "names '/data/siglip-so400m-patch14-384'; give it by --encoder FOLDER"),
    ],
)
def test_what_has_no_place_in_the_standard_folder_is_refused_by_name(
    change: dict[str, Any], reason: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in published.iterdir():
        (checkpoint / path.name).symlink_to(path)
    config = json.loads((published / "config.json").read_text()) | change
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(["import", "tinyllava", str(checkpoint), str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("switchkd: error: ")]
    assert reason in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published layout, without the encoder's image processor, as it comes."""
    folder = tmp_path_factory.mktemp("published")
    original = tiny_original(folder)
    write_checkpoint(original, folder, "whole")
    return folder


def test_weights_that_do_not_fit_or_hold_more_than_tensors_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(published / "model.safetensors")
    norm = "language_model.model.norm.weight"
    encoder = write_encoder_folder(tmp_path / "encoder")
    damages: dict[str, tuple[dict[str, Any], str]] = {
        "missing": ({name: tensor for name, tensor in tensors.items() if name != norm}, "1 missing keys, the first is"),
        "unknown": (tensors | {"resampler.queries": torch.ones(1)}, "resampler.queries is no weight of"),
        "shape": (tensors | {norm: torch.ones(5)}, "do not fit"),
        "head": (tensors | {"language_model.lm_head.weight": torch.ones(WORDS + 3, 24)}, "ties the head"),
        "code": ({norm: Path("a pickled object")}, "cannot be read"),
    }
    for name, (damaged, reason) in damages.items():
        folder = tmp_path / name
        folder.mkdir()
        for path in published.iterdir():
            if path.name != "model.safetensors":
                (folder / path.name).symlink_to(path)
        torch.save(damaged, folder / "pytorch_model.bin")
        assert main(["import", "tinyllava", str(folder), str(folder / "out"), "--encoder", str(encoder)]) == 2
        assert reason in capsys.readouterr().err, name


def test_an_import_goes_into_the_empty_folder_that_one_stands_in(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, here = write_encoder_folder(tmp_path / "encoder"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(["import", "tinyllava", str(published), ".", "--encoder", str(encoder)]) == 0
    assert load_vlm(here).tokenizer.chat_template is not None
    assert Path.cwd() == here
    assert not [path for path in here.iterdir() if path.is_dir()]
