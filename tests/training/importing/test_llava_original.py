"""Checkpoints as LLaVA-1.5's and LLaVA-NeXT's own code writes them: refused as they are, imported tensor for tensor."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from switchkd.cli.main import main
from switchkd.training.models.vlm import ModelError, build_vlm, load_vlm

SIDE = 24  # of the pictures; 4 x 4 patches
QUESTION, ANSWER = "How many circles are there?", "There are three."
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
V1 = f"{SYSTEM}USER: <image>\n{QUESTION} ASSISTANT: {ANSWER}</s>USER: And now? ASSISTANT:"
QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
)
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"image_size": SIDE, "patch_size": 6}


@dataclass
class Original:
    """A tiny LLaVA in parts, and how its own code runs it and names its weights."""

    tower: Any
    projector: nn.Sequential
    language_model: Any
    tokenizer: Any
    siglip: bool

    def forward(self, pixels_1CHW: Tensor, prompt: str) -> Tensor:
        """LLaVA's forward of one row: SigLIP gives every feature of its last layer but one, CLIP all but the class."""
        features = self.tower(pixels_1CHW, output_hidden_states=True).hidden_states[-2]
        seen = self.projector(features if self.siglip else features[:, 1:])[0]
        first, rest = (self.tokenizer(chunk)["input_ids"] for chunk in prompt.split("<image>"))
        rest = rest[1:] if rest[0] == self.tokenizer.bos_token_id else rest
        embed = self.language_model.get_input_embeddings()
        said = [embed(torch.tensor(ids)) for ids in (first, rest)]
        logits: Tensor = self.language_model(inputs_embeds=torch.cat([said[0], seen, said[1]])[None]).logits
        return logits

    def weights(self, *, tower: bool) -> dict[str, Tensor]:
        """All tensors by LLaVA's names, with the vision tower where it was trained too."""
        tensors: dict[str, Tensor] = dict(self.language_model.named_parameters())  # tied: once
        tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in self.projector.named_parameters()}
        if tower:
            for name, tensor in self.tower.named_parameters():
                # LLaVA-NeXT deletes SigLIP's last layer and its head.
                if not self.siglip or not name.startswith(("head.", "encoder.layers.2.")):
                    tensors[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
        return {name: tensor.detach().half() for name, tensor in tensors.items()}

    def standard(self) -> dict[str, Tensor]:
        """The same by the names of llava-hf's folders; the tower as the checkpoint has it, or as a whole."""
        names = {
            "model.vision_tower.vision_tower.vision_model.": "vision_tower.",
            "model.mm_projector.0.": "multi_modal_projector.linear_1.",
            "model.mm_projector.2.": "multi_modal_projector.linear_2.",
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
        renamed = {}
        for name, tensor in self.weights(tower=True).items():
            old = next(old for old in names if name.startswith(old))
            renamed[names[old] + name.removeprefix(old)] = tensor
        return renamed


def tokenizer_of(bos: str | None, eos: str, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([SYSTEM, QUESTION, ANSWER, "USER: ASSISTANT:"] * 3, trainer)
    if bos is not None:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        model_input_names=["input_ids", "attention_mask"],
    )


def llava_15(folder: Path) -> Original:
    """LLaVA-1.5 in small: CLIP, which is not in the checkpoint, and Llama in a pickled file."""
    original = make(
        CLIPVisionModel(CLIPVisionConfig(**SIZES)),
        lambda rows: LlamaForCausalLM(
            LlamaConfig(
                **text(rows),
                num_key_value_heads=4,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
            )
        ),
        tokenizer_of("<s>", "</s>", "<unk>", "<s>", "</s>"),
    )
    flat = flat_config(original, "LlavaLlamaForCausalLM", "llava_llama", "openai/clip-vit-large-patch14-336")
    flat |= {"rope_theta": 20_000.0, "rope_scaling": None, "image_aspect_ratio": "pad", "freeze_mm_mlp_adapter": False}
    folder.mkdir()
    original.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(flat))
    torch.save(original.weights(tower=False), folder / "pytorch_model.bin")
    return original


def llava_next(folder: Path) -> Original:
    """LLaVA-NeXT's code with SigLIP, which was trained too and has lost its last layer, and a tied Qwen2."""
    original = make(
        SiglipVisionModel(SiglipVisionConfig(**SIZES)),
        lambda rows: Qwen2ForCausalLM(Qwen2Config(**text(rows), num_key_value_heads=2, tie_word_embeddings=True)),
        tokenizer_of(None, "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    )
    flat = flat_config(original, "LlavaQwenForCausalLM", "llava", "google/siglip-so400m-patch14-384")
    flat |= {
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "mm_patch_merge_type": "flat",
    }
    flat |= {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "mm_resampler_type": None}
    folder.mkdir()
    original.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(flat))
    weights = original.weights(tower=True) | {"model.image_newline": torch.ones(24).half()}
    save_file(weights, folder / "model.safetensors")
    return original


def text(rows: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {"vocab_size": rows, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return sizes | {"num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.2}


def make(tower: Any, language_model: Any, tokenizer: Any) -> Original:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = (tower, nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24)), language_model(len(tokenizer)))
    for part in parts:
        for parameter in part.parameters():
            parameter.data = parameter.data.half().float()  # as they are stored
    return Original(parts[0].eval(), parts[1], parts[2].eval(), tokenizer, isinstance(tower, SiglipVisionModel))


def flat_config(original: Original, architecture: str, model_type: str, tower: str) -> dict[str, Any]:
    """The language model's config with LLaVA's keys beside, as save_pretrained of its own classes writes it."""
    own = original.language_model.config.to_dict()
    flat = {name: value for name, value in own.items() if name not in ("rope_parameters", "dtype", "layer_types")}
    flat |= {"architectures": [architecture], "model_type": model_type, "torch_dtype": "float16"}
    flat |= {"mm_vision_tower": tower, "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True}
    return flat | {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False}


def write_tower(original: Original, folder: Path) -> Path:
    """The vision encoder's folder as it is on the hub."""
    original.tower.save_pretrained(folder)
    pictures: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    if not original.siglip:
        pictures = {"image_processor_type": "CLIPImageProcessor", "size": SIDE, "crop_size": SIDE}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both checkpoints, and the folders of their vision towers; tests must not write into them."""
    folder = tmp_path_factory.mktemp("published")
    for write in (llava_15, llava_next):
        write_tower(write(folder / write.__name__), folder / f"{write.__name__}-tower")
    return folder


@pytest.mark.parametrize(("name", "prompt"), [("llava_15", V1), ("llava_next", QWEN)])
def test_imports_tensor_for_tensor_and_gives_the_same_logits(
    name: str, prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = {"llava_15": llava_15, "llava_next": llava_next}[name](tmp_path / "checkpoint")
    tower = write_tower(original, tmp_path / "tower")
    out = tmp_path / "out"
    assert main(["import", "llava", str(tmp_path / "checkpoint"), str(out), "--vision-tower", str(tower)]) == 0
    said = capsys.readouterr().err
    assert ("image_aspect_ratio is 'pad': LLaVA pads a picture" in said) == (name == "llava_15")
    assert ("1 tensors, the first is model.image_newline" in said) == (name == "llava_next")

    model: Any = LlavaForConditionalGeneration.from_pretrained(out)
    processor: Any = AutoProcessor.from_pretrained(out, backend="pil")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": "And now?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt
    picture = Image.linear_gradient("L").resize((30, 30)).convert("RGB")
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 16
    with torch.no_grad():
        expected = original.forward(inputs["pixel_values"], prompt)
        logits = model.float()(**inputs).logits
    assert logits.shape[1] == expected.shape[1]
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-5)
    assert model.generation_config.eos_token_id == original.tokenizer.convert_tokens_to_ids(
        {"llava_15": "</s>", "llava_next": "<|im_end|>"}[name]
    )
    # The same bits, and nothing of where it was trained.
    written = {
        key.replace("vision_tower.vision_model.", "vision_tower."): tensor  # an older and a newer name of the same
        for key, tensor in load_file(out / "model.safetensors").items()
    }
    want = original.standard()
    assert written.keys() == want.keys()
    for key, tensor in want.items():
        assert written[key].dtype == torch.float16
        rows = len(tensor)  # `<image>` may need a row more
        assert len(written[key]) == rows or "embed_tokens" in key or "lm_head" in key
        assert torch.equal(written[key][:rows], tensor), key
    assert load_vlm(out).tokens_per_picture == 16
    assert "mm_vision_tower" not in (out / "config.json").read_text()


def change(source: Path, target: Path, **values: Any) -> Path:
    """A checkpoint with other settings, its files linked."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text()) | values
    (target / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "-"}))
    return target


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres', supported is 'square' or 'pad'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9', supported is"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad', supported is 'flat'"),
        ({"mm_projector_type": "-"}, "mm_projector_type is 'linear', supported is 'mlp2x_gelu'"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"architectures": ["LlavaMistralForCausalLM"]}, "architectures is 'LlavaMistralForCausalLM', supported is"),
        ({"vocab_size": 301, "num_hidden_layers": 3}, "9 missing keys, the first is"),
        ({"text_config": {}, "architectures": ["LlavaForConditionalGeneration"], "mm_vision_tower": "-"}, "as it is"),
    ],
)
def test_what_has_no_place_in_the_standard_folder_is_refused_by_name(
    values: dict[str, Any], reason: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = change(published / "llava_15", tmp_path / "checkpoint", **values)
    arguments = [str(checkpoint), str(tmp_path / "out"), "--vision-tower", str(published / "llava_15-tower")]
    assert main(["import", "llava", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("switchkd: error: ")]
    assert reason in line
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there_or_have_no_place_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(published / "llava_next" / "model.safetensors")
    language_model = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    damages: dict[str, tuple[dict[str, Tensor], str]] = {
        "tower": (language_model, "its vision tower was trained too"),
        "unknown": (tensors | {"model.vision_resampler.query": torch.ones(1)}, "model.vision_resampler.query is no"),
        "projector": ({name: t for name, t in tensors.items() if "projector.2" not in name}, "2 missing keys"),
    }
    for name, (damaged, reason) in damages.items():
        checkpoint = change(published / "llava_next", tmp_path / name)
        (checkpoint / "model.safetensors").unlink()
        save_file(damaged, checkpoint / "model.safetensors")
        arguments = [str(checkpoint), str(tmp_path / "out"), "--vision-tower", str(published / "llava_next-tower")]
        assert main(["import", "llava", *arguments]) == 2
        assert reason in capsys.readouterr().err, name
    (checkpoint / "model.safetensors").rename(checkpoint / "mm_projector.bin")
    assert main(["import", "llava", *arguments]) == 2
    assert "the end of a pretraining" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llava_15", "llava_next"])
def test_where_a_standard_folder_is_asked_for_the_way_out_is_named(
    name: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published / name
    way_out = f"{folder}: its config.json is of LLaVA's own code .* `switchkd import llava {folder} OUT` makes"
    for load in (lambda: load_vlm(folder), lambda: build_vlm(folder, published)):
        with pytest.raises(ModelError, match=way_out):
            load()
    assert main(["export", str(folder), str(tmp_path / "bundle")]) == 2
    assert f"`switchkd import llava {folder} OUT` makes a standard folder of it" in capsys.readouterr().err
    assert main(["import", "tinyllava", str(folder), str(tmp_path / "out")]) == 2
    assert "supported is 'tinyllava'" in capsys.readouterr().err


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_read(
    published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    assert main(["import", "llava", str(published / "llava_15"), "."]) == 2
    assert "exists already; remove it or choose another place" in capsys.readouterr().err
