"""Checkpoints as LLaVA's own code writes them → the standard LlavaForConditionalGeneration folder, tensor for tensor.

LLaVA-1.5's (arXiv 2310.03744) and LLaVA-NeXT's code has one class around the language model, LlavaLlamaForCausalLM or
LlavaQwenForCausalLM. Its config.json is the language model's with keys `mm_*` beside; its weights are named
`model.layers.*`, `model.mm_projector.*` and, where the vision tower was trained too,
`model.vision_tower.vision_tower.*`; else the tower is the one that `mm_vision_tower` names. Source of the layout and of
the prompts: their public code, read in 2026.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, PreTrainedTokenizerBase

from switchkd.export.folders.lfs_pointers import pointer_fault
from switchkd.export.folders.out_folder import making
from switchkd.export.llava.weights import is_llavas_own

from ..models.vlm import ModelError, encoder_config, load_encoder, read_config
from .standard_folder import (
    EMBEDDING,
    STRATEGIES,
    Imported,
    Prompt,
    Sources,
    check_supported,
    checkpoint_tokenizer,
    folder_with,
    picture_processor,
    read_json,
    read_weights,
    save_standard,
    source_of,
    standard_config,
    standard_names,
)
from .tinyllava import USER_ASSISTANT

PROJECTOR = "mlp2x_gelu"
# The language model's type in transformers, by LLaVA's class.
LANGUAGE_MODELS = {"LlavaLlamaForCausalLM": "llama", "LlavaQwenForCausalLM": "qwen2"}
_TOWER = "model.vision_tower.vision_tower."
_NAMES = (
    (_TOWER, "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", ""),  # between the parts of a picture that is cut up, which is refused
    ("model.faster_token", ""),  # of videos
    ("model.layers.", "language_model.model.layers."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
_ALL = "a LLaVA of one vision tower, an MLP projector and a language model"
_CHATML = (
    "{%- if not messages or messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- set turn = namespace(text='', pictures=0) %}"
    "{%- if message['content'] is string %}{%- set turn.text = message['content'] %}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{%- set turn.pictures = turn.pictures + 1 %}"
    "{%- elif part['type'] == 'text' %}{%- set turn.text = turn.text + part['text'] %}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{%- if turn.pictures %}"
    "{%- set turn.text = (('<image>' * turn.pictures) + '\n' + (turn.text | trim)) | trim %}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + turn.text + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


# By the names in LLaVA's code; which one goes with a language model is nowhere in a checkpoint.
PROMPTS = {
    "v1": Prompt(USER_ASSISTANT.replace("END_OF_TURN", "</s>"), "</s>"),
    "qwen": Prompt(_CHATML, "<|im_end|>"),
}
_USUAL = {"llama": "v1", "qwen2": "qwen"}


def import_llava(
    checkpoint: Path, folder: Path, sources: Sources | None = None, *, prompt: str | None = None
) -> Imported:
    """Write the standard folder of a checkpoint of LLaVA's own (SigLIP or CLIP, MLP, Llama or Qwen2).

    Every tensor that is read keeps its bits; a tower that is not in the checkpoint gets the checkpoint's type, as LLaVA
    loads it. `<image>`, which LLaVA has as the index −200 alone, becomes a token. `prompt` is one of PROMPTS (None: the
    usual one of the language model). Raises ModelError naming what was found, what is supported, and the way out.
    """
    with making(folder, ModelError, last="config.json") as made:
        return replace(_import(checkpoint, made, sources or Sources(), prompt), folder=folder)


def _import(checkpoint: Path, folder: Path, sources: Sources, prompt: str | None) -> Imported:
    if fault := pointer_fault(checkpoint):
        raise ModelError(fault)
    published = _config(checkpoint)
    named = published.get("mm_vision_tower")
    source = source_of(sources.encoder, named, "vision encoder's config", "--vision-tower")
    vision = encoder_config(source, read_config(source))
    text = _text_config(published)
    tokenizer = checkpoint_tokenizer(sources.language_model or str(checkpoint), text)
    prompt = _speak(tokenizer, prompt, text.model_type, checkpoint)
    config = _standard_config(published, vision, text, tokenizer)
    processor = picture_processor(
        folder_with("preprocessor_config.json", checkpoint) or source, tokenizer, config, "--vision-tower"
    )
    # The weights come last: whatever else is in the way is said before gigabytes are read.
    weights = read_weights(checkpoint)
    if weights is None:
        raise ModelError(
            f"{checkpoint}: no weights of a whole model (model.safetensors or pytorch_model.bin); a folder with "
            "mm_projector.bin alone is the end of a pretraining, give that of the fine-tuning"
        )
    tensors, left_out = standard_names(weights, _NAMES, checkpoint, _ALL)
    _settle_tower(tensors, config, published, source, checkpoint)
    dtype = save_standard(config, tensors, processor, checkpoint, folder)
    notes = _notes(published)
    return Imported(folder, len(tensors), dtype, tuple(left_out), prompt, config.image_seq_length, notes)


def _config(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json, refused where it asks for what has no place in a standard folder."""
    published = read_json(checkpoint / "config.json")
    if not published:
        raise ModelError(f"{checkpoint}: no config.json there; give the folder of a checkpoint of LLaVA's own code")
    if not is_llavas_own(published):
        raise ModelError(
            f"{checkpoint}: config.json is not of LLaVA's own code (model_type {published.get('model_type')!r}); a "
            "folder of llava-hf is used as it is, and `switchkd import tinyllava` takes those of TinyLLaVA Factory"
        )
    if (checkpoint / "adapter_config.json").is_file():
        raise ModelError(
            f"{checkpoint}: has a LoRA adapter (adapter_config.json); merge it with LLaVA's merge_lora_weights.py, and "
            "give the folder that it saves"
        )
    (architecture, *_) = published.get("architectures") or [None]
    aspect = published.get("image_aspect_ratio") or "square"
    check_supported(
        checkpoint,
        ("architectures", architecture, tuple(LANGUAGE_MODELS)),
        ("mm_projector_type", published.get("mm_projector_type", "linear"), (PROJECTOR,)),
        ("mm_vision_select_feature", published.get("mm_vision_select_feature", "patch"), tuple(STRATEGIES)),
        # "anyres" cuts a picture into parts of its own number; a standard LLaVA reads one part, the whole.
        ("image_aspect_ratio", aspect, ("square", "pad")),
        ("mm_patch_merge_type", published.get("mm_patch_merge_type") or "flat", ("flat",)),
        ("mm_resampler_type", published.get("mm_resampler_type") or "none", ("none",)),
        ("mm_use_im_start_end", bool(published.get("mm_use_im_start_end")), (False,)),
        ("s2", bool(published.get("s2")), (False,)),
    )
    return published


def _text_config(published: dict[str, Any]) -> Any:
    """The language model's config, which lies flat among LLaVA's keys."""
    kind = LANGUAGE_MODELS[published["architectures"][0]]
    plain = AutoConfig.for_model(kind)
    known = {*plain.to_dict(), "rope_theta", "rope_scaling"} - {
        "model_type",
        "architectures",
        "dtype",
        "rope_parameters",
    }
    given = {name: value for name, value in published.items() if name in known}
    if kind == "qwen2":
        given.pop("rope_scaling", None)  # LLaVA's class of it sets none, whatever the file says
    return AutoConfig.for_model(kind, **given)


def _standard_config(
    published: dict[str, Any], vision: Any, text: Any, tokenizer: PreTrainedTokenizerBase
) -> LlavaConfig:
    # LLaVA-NeXT takes SigLIP's last layer but one whatever the config says, and no feature is dropped: none is a class.
    siglip = vision.model_type == "siglip_vision_model"
    if siglip:
        return standard_config(vision, text, tokenizer, -2, "full")
    strategy = STRATEGIES[published.get("mm_vision_select_feature", "patch")]
    return standard_config(vision, text, tokenizer, published.get("mm_vision_select_layer", -2), strategy)


def _speak(tokenizer: PreTrainedTokenizerBase, prompt: str | None, kind: str, checkpoint: Path) -> str:
    """Give the tokenizer LLaVA's prompt and the token that ends an answer in it; returns the prompt's name."""
    prompt = prompt or _USUAL[kind]
    if prompt not in PROMPTS or not PROMPTS[prompt].goes_with(tokenizer):
        raise ModelError(
            f"{checkpoint}: prompt {prompt!r} does not go with its tokenizer; give --prompt {' or '.join(PROMPTS)}, "
            f"whose answers end with {' and '.join(form.end for form in PROMPTS.values())}"
        )
    PROMPTS[prompt].teach(tokenizer)
    return prompt


def _settle_tower(
    tensors: dict[str, Tensor], config: LlavaConfig, published: dict[str, Any], source: str, where: Path
) -> None:
    """Add the vision tower that a checkpoint lacks; let the config have as many layers as one that it has.

    Raises ModelError where the tower was trained and is not there.
    """
    vision: Any = config.vision_config
    layers = {
        int(name.split(".layers.")[1].split(".")[0])
        for name in tensors
        if name.startswith("vision_tower.vision_model.encoder.layers.")
    }
    if layers:
        # LLaVA-NeXT removes SigLIP's last layer, behind the one that is read.
        removed = vision.num_hidden_layers - len(layers)
        if removed and isinstance(config.vision_feature_layer, int) and config.vision_feature_layer < 0:
            config.vision_feature_layer += removed
        vision.num_hidden_layers = len(layers)
        return
    trained = published.get("unfreeze_mm_vision_tower") or "mm_vision_tower" in str(published.get("mm_tunable_parts"))
    if trained:
        raise ModelError(
            f"{where}: its vision tower was trained too (unfreeze_mm_vision_tower or mm_tunable_parts), and weights "
            f"{_TOWER}* are not there; the checkpoint is not complete"
        )
    tower = load_encoder(source, tensors[EMBEDDING].dtype if EMBEDDING in tensors else torch.float32)
    tensors |= {f"vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}


def _notes(published: dict[str, Any]) -> tuple[str, ...]:
    if published.get("image_aspect_ratio") != "pad":
        return ()
    return (
        "image_aspect_ratio is 'pad': LLaVA pads a picture to a square with its mean colour first. The folder prepares "
        "pictures as the vision encoder's own processor does, as llava-hf's folders do: square ones alike, others not",
    )
