"""Folders as llava-hf publishes them, written here in that layout: they load as teachers as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from switchkd.cli.main import main
from switchkd.training.data.conversations import BrokenRecord
from switchkd.training.data.label_mask import ConversationEncoder, model_inputs
from switchkd.training.models.alignment import IGNORED
from switchkd.training.models.vlm import ModelError, build_vlm, load_vlm, train_only
from switchkd.training.world.dataset import WorldSettings, write_world

# LLaVA-1.5's prompt in the manner of its folder: parts and nothing else, pictures first, no end of sequence.
USER_ASSISTANT = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' 'END }}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_15 = USER_ASSISTANT.replace("END", "")
ENDING = USER_ASSISTANT.replace("END", " + eos_token")
# Qwen2.5's own, in short: it adds strings and knows no parts.
TEXT_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"image_size": 24, "patch_size": 6}


def tokenizer_of(*special: str, bos: str | None, eos: str, pad: str, template: str | None) -> PreTrainedTokenizerFast:
    """A small tokenizer that puts its BOS token in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["USER: What is it? ASSISTANT: A red circle."], trainer)
    if bos is not None:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=["<image>"],
        chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
    )


def write_llava_15(folder: Path, *, old: bool) -> None:
    """LLaVA-1.5's folder in small: CLIP and Llama; `old`: as it was before the processor had a config of its own."""
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer = tokenizer_of(*special, bos="<s>", eos="</s>", pad="<pad>", template=None)
    rows = len(tokenizer) + 5  # llava-hf rounds up to a multiple of 64
    text: dict[str, Any] = {"vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": tokenizer.get_vocab()["<image>"],
        "model_type": "llava",
        "pad_token_id": tokenizer.pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": text
        | {"model_type": "llama", "torch_dtype": "float16", "_name_or_path": "lmsys/vicuna-7b-v1.5"},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": SIZES | {"model_type": "clip_vision_model", "projection_dim": 16, "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": rows,
    }
    tower, language_model = CLIPVisionModel(CLIPVisionConfig(**SIZES)), LlamaForCausalLM(LlamaConfig(**text))
    pictures: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 24},
        "do_resize": True,
    }
    pictures |= {"crop_size": {"height": 24, "width": 24}, "do_center_crop": True, "resample": 3}
    write_folder(folder, tower, language_model, tokenizer, config, pictures)
    if old:
        (folder / "tokenizer_config.json").write_text(
            json.dumps(json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": LLAVA_15})
        )
    else:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA_15}))
        settings: dict[str, Any] = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 6}
        settings |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"}
        (folder / "processor_config.json").write_text(json.dumps(settings))


def write_interleave(folder: Path) -> None:
    """llava-interleave-qwen's folder in small: SigLIP and Qwen2, every feature of the last layer."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = tokenizer_of(*special, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=None)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    vision = SIZES | {"vision_use_head": False}
    config = {
        "image_token_index": tokenizer.get_vocab()["<image>"],
        "model_type": "llava",
        "text_config": text | {"model_type": "qwen2"},
        "vision_config": vision | {"model_type": "siglip_vision_model"},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    tower, language_model = SiglipVisionModel(SiglipVisionConfig(**vision)), Qwen2ForCausalLM(Qwen2Config(**text))
    pictures: dict[str, Any] = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 24, "width": 24},
        "resample": 3,
    }
    write_folder(folder, tower, language_model, tokenizer, config, pictures)
    settings: dict[str, Any] = {"image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": 6}
    settings |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "full"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEXT_ONLY}))


def write_folder(
    folder: Path, tower: Any, language_model: Any, tokenizer: Any, config: dict[str, Any], pictures: dict[str, Any]
) -> None:
    """Weights by the names of transformers 4, and the JSON files beside them."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(pictures | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True})
    )
    tied = config["text_config"].get("tie_word_embeddings", False)
    tensors = {f"vision_tower.vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    tensors |= {
        f"language_model.{name}": tensor
        for name, tensor in language_model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    for layer in ("linear_1", "linear_2"):  # here the encoder and the language model have one width
        tensors |= {f"multi_modal_projector.{layer}.weight": 0.2 * torch.randn(32, 32)}
        tensors |= {f"multi_modal_projector.{layer}.bias": 0.2 * torch.randn(32)}
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("old", [False, True])
def test_llava_15_loads_as_it_is(old: bool, tmp_path: Path) -> None:
    write_llava_15(tmp_path, old=old)
    vlm = load_vlm(tmp_path)
    assert vlm.tokens_per_picture == 16  # the class token dropped
    tensors = load_file(tmp_path / "model.safetensors")
    state = vlm.model.state_dict()
    for name, there in (
        ("language_model.model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ):
        assert torch.equal(state[there], tensors[name].float())
    processor: Any = vlm.processor
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (6, "default")
    assert processor.num_additional_image_tokens == 1
    # Saved again it is whole, for plain transformers too.
    vlm.save(tmp_path / "again")
    model: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again")
    processor = LlavaProcessor.from_pretrained(tmp_path / "again", backend="pil")
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat is it? ASSISTANT:"
    inputs = processor(text=prompt, images=Image.new("RGB", (30, 40), "red"), return_tensors="pt")
    # Training spells the prompt as transformers does: BOS, and the image token once for every visual token.
    assert model_inputs(vlm)[0].encode_prompt(question) == inputs["input_ids"][0].tolist()
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_turns_in_bare_text_reach_a_template_that_reads_parts_alone(tmp_path: Path) -> None:
    write_llava_15(tmp_path, old=False)
    tokenizer: Any = load_vlm(tmp_path).tokenizer
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Gone."},
    ]
    with pytest.raises(BrokenRecord, match="never learn to stop"):
        ConversationEncoder(tokenizer, "<image>", 2).encode(messages)
    tokenizer.chat_template = ENDING
    ids, labels = ConversationEncoder(tokenizer, "<image>", 2).encode(messages)
    text = "<s>USER: <image><image>\nWhat is it? ASSISTANT: A red circle. </s>USER: And now? ASSISTANT: Gone. </s>"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == " A red circle. </s> Gone. </s>"


def test_interleave_reads_its_last_layer_and_every_feature(tmp_path: Path) -> None:
    write_interleave(tmp_path)
    vlm = load_vlm(tmp_path)
    assert vlm.tokens_per_picture == 16
    # A template of strings alone is led by lines that make strings of parts, for plain transformers too.
    question: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert vlm.processor.apply_chat_template(question, add_generation_prompt=True) == prompt
    assert vlm.processor.apply_chat_template([{"role": "user", "content": "<image>\nWhat?"}]) in prompt
    # The norm behind the last layer is not read, and so takes no gradient: DDP would wait for it.
    train_only(vlm.model, ("encoder",))
    ids = torch.tensor([model_inputs(vlm)[0].encode_prompt(question)])
    vlm.model(input_ids=ids, pixel_values=torch.randn(1, 3, 24, 24)).logits.sum().backward()
    for name, parameter in vlm.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_weights_that_are_missing_are_no_random_numbers(tmp_path: Path) -> None:
    write_interleave(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["multi_modal_projector.linear_1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 weights are missing, the first is .*linear_1\.weight"):
        load_vlm(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")  # never read, whatever is in it
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_vlm(tmp_path)


def test_llava_15_teaches_a_student_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tmp_path / "teacher"
    write_llava_15(teacher, old=False)
    before = (teacher / "model.safetensors").read_bytes()
    tokenizer: Any = load_vlm(teacher).tokenizer
    tokenizer.chat_template = ENDING
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"vocab_size": len(tokenizer), "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(tmp_path / "language_model")
    tokenizer.save_pretrained(tmp_path / "language_model")
    CLIPVisionModel(CLIPVisionConfig(**SIZES)).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").write_bytes((teacher / "preprocessor_config.json").read_bytes())
    assert build_vlm(tmp_path / "encoder", tmp_path / "language_model").tokenizer.eos_token == "</s>"
    world = write_world(tmp_path / "world", WorldSettings(8, 7, 7))
    stage = {
        "train": ["encoder", "projector", "language_model"],
        "data": {"records": [str(world / "train.json")], "pictures": str(world / "pictures")},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True},
    }
    recipe = {
        "output": str(tmp_path / "out"),
        "teacher": str(teacher),
        "model": {"encoder": str(tmp_path / "encoder"), "language_model": str(tmp_path / "language_model")},
        "stages": [stage | {"name": name, "objective": {"name": name}} for name in ("sft", "switch_kd")],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "switch_kd" / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["dbild"] > 0
        assert row["vsd"] > 0
    assert (teacher / "model.safetensors").read_bytes() == before
