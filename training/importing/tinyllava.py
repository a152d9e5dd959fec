"""Published TinyLLaVA Factory checkpoints → the standard LlavaForConditionalGeneration folder, tensor for tensor.

TinyLLaVA Factory (arXiv 2405.11788) writes two layouts. The end of a fine-tuning, which is also what its authors put on
the hub, is one folder of weights named `language_model.*`, `vision_tower._vision_tower.*` and `connector._connector.*`.
The end of a pretraining has a folder for each of the three, with a `pytorch_model.bin` in it. Both have `config.json`
of model type "tinyllava". Source of the layouts and of the prompt: its public code, read in 2026.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from switchkd.export.folders.lfs_pointers import pointer_fault
from switchkd.export.folders.out_folder import making

from ..models.vlm import ENCODERS, ModelError, encoder_config, read_config
from .standard_folder import (
    STRATEGIES,
    Imported,
    Prompt,
    Sources,
    check_supported,
    checkpoint_tokenizer,
    folder_with,
    own_settings,
    picture_processor,
    read_json,
    read_weights,
    save_standard,
    source_of,
    standard_config,
    standard_names,
)

LANGUAGE_MODELS = ("qwen2",)  # Qwen2 and Qwen2.5 are of this type
CONNECTOR = "mlp2x_gelu"
PARTS = ("language_model", "vision_tower", "connector")
_NAMES = (
    ("vision_tower._vision_tower.", "vision_tower."),
    ("connector._connector.0.", "multi_modal_projector.linear_1."),
    ("connector._connector.2.", "multi_modal_projector.linear_2."),
    ("language_model.", "language_model."),
)
_ALL = "a vision tower, an MLP connector or a language model"
# LLaVA-1.5's prompt, which TinyLLaVA took over; another end of turn is put in its place.
USER_ASSISTANT = (
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- if messages[0]['content'] is string %}{{- messages[0]['content'] }}"
    "{%- else %}{%- for part in messages[0]['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}{{- ' ' }}"
    "{%- else %}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. ' }}"
    "{{- 'The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- set turn = namespace(text='', pictures=0) %}"
    "{%- if message['content'] is string %}{%- set turn.text = message['content'] %}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{%- set turn.pictures = turn.pictures + 1 %}"
    "{%- elif part['type'] == 'text' %}{%- set turn.text = turn.text + part['text'] %}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if turn.pictures %}"
    "{%- set turn.text = (('<image>' * turn.pictures) + '\n' + (turn.text | trim)) | trim %}"
    "{%- endif %}"
    "{{- 'USER: ' + turn.text + ' ' }}"
    "{%- elif message['role'] == 'assistant' %}{{- 'ASSISTANT: ' + turn.text + 'END_OF_TURN' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
)
# TinyLLaVA's prompts for Qwen2: qwen2_base and qwen2_instruct in its code.
PROMPTS = {
    name: Prompt(USER_ASSISTANT.replace("END_OF_TURN", end), end)
    for name, end in (("base", "<|endoftext|>"), ("instruct", "<|im_end|>"))
}


def import_tinyllava(
    checkpoint: Path, folder: Path, sources: Sources | None = None, *, prompt: str | None = None
) -> Imported:
    """Write the standard folder of a TinyLLaVA Factory checkpoint (SigLIP or CLIP, MLP, Qwen2 or Qwen2.5).

    Every tensor that LLaVA reads keeps its bits and its type. `<image>`, which TinyLLaVA has as the index −200 alone,
    becomes a token of the tokenizer, in a spare row of the embedding or in one that is added. `prompt` is one of
    PROMPTS (None: by the tokenizer's end-of-sequence token). Raises ModelError naming what was found, what is
    supported, and the way out.
    """
    with making(folder, ModelError, last="config.json") as made:
        return replace(_import(checkpoint, made, sources or Sources(), prompt), folder=folder)


def _import(checkpoint: Path, folder: Path, sources: Sources, prompt: str | None) -> Imported:
    if fault := pointer_fault(checkpoint, *(checkpoint / part for part in PARTS)):
        raise ModelError(fault)
    published = _config(checkpoint)
    vision = _vision_config(checkpoint, published, sources)
    text = _text_config(checkpoint, published, sources)
    tokenizer = _tokenizer(checkpoint, published, sources, text)
    prompt = _speak(tokenizer, prompt, checkpoint)
    strategy = STRATEGIES[published.get("vision_feature_select_strategy", "patch")]
    config = standard_config(vision, text, tokenizer, published.get("vision_feature_layer", -2), strategy)
    processor = picture_processor(_picture_source(checkpoint, published, sources), tokenizer, config)
    # The weights come last: whatever else is in the way is said before gigabytes are read.
    tensors, left_out = standard_names(read_tensors(checkpoint), _NAMES, checkpoint, _ALL)
    dtype = save_standard(config, tensors, processor, checkpoint, folder)
    return Imported(folder, len(tensors), dtype, tuple(left_out), prompt, config.image_seq_length)


def _config(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json, refused where it asks for what has no place in LLaVA."""
    published = read_json(checkpoint / "config.json")
    if not published:
        raise ModelError(f"{checkpoint}: no config.json there; give the folder of a TinyLLaVA Factory checkpoint")
    if (checkpoint / "adapter_config.json").is_file():
        raise ModelError(
            f"{checkpoint}: has a LoRA adapter (adapter_config.json); load it with TinyLLaVA Factory, which merges it, "
            "and save the merged model"
        )
    encoder, second = published.get("vision_model_name_or_path") or "", published.get("vision_model_name_or_path2")
    if second or encoder.startswith("mof"):
        raise ModelError(
            f"{checkpoint}: vision tower is {encoder!r} with {second!r}, a mixture; supported is one SigLIP or CLIP"
        )
    check_supported(
        checkpoint,
        ("model_type", published.get("model_type"), ("tinyllava",)),
        ("connector_type", published.get("connector_type"), (CONNECTOR,)),
        ("vision_feature_select_strategy", published.get("vision_feature_select_strategy", "patch"), tuple(STRATEGIES)),
        # "pad" makes pictures square with a border, "anyres" cuts them up; neither is a setting of the processor.
        ("image_aspect_ratio", published.get("image_aspect_ratio") or "square", ("square",)),
    )
    return published


def _text_config(checkpoint: Path, published: dict[str, Any], sources: Sources) -> Any:
    given = published.get("text_config") or read_json(checkpoint / "language_model" / "config.json")
    name = published.get("llm_model_name_or_path")
    found = given.get("model_type") if given else None
    if given and found in LANGUAGE_MODELS:
        return AutoConfig.for_model(**own_settings(given))
    if not given:
        config = read_config(source_of(sources.language_model, name, "language model", "--language-model"))
        found = config.model_type
        if found in LANGUAGE_MODELS:
            return config
    raise ModelError(
        f"{checkpoint}: language model is {name!r} of type {found!r}, supported are Qwen2 and Qwen2.5 (qwen2)"
    )


def _vision_config(checkpoint: Path, published: dict[str, Any], sources: Sources) -> Any:
    given = published.get("vision_config") or read_json(checkpoint / "vision_tower" / "config.json")
    name = published.get("vision_model_name_or_path")
    if not given:
        source = source_of(sources.encoder, name, "vision encoder", "--encoder")
        return encoder_config(source, read_config(source))
    if given.get("model_type") not in ENCODERS:
        raise ModelError(
            f"{checkpoint}: vision tower is {name!r} of type {given.get('model_type')!r}, supported are "
            f"{', '.join(ENCODERS)}"
        )
    return encoder_config(checkpoint, AutoConfig.for_model(**own_settings(given)))


def _tokenizer(checkpoint: Path, published: dict[str, Any], sources: Sources, text: Any) -> PreTrainedTokenizerBase:
    source = folder_with("tokenizer_config.json", checkpoint, checkpoint / "language_model")
    if source is None:
        name = published.get("tokenizer_name_or_path") or published.get("llm_model_name_or_path")
        source = source_of(sources.language_model, name, "tokenizer", "--language-model")
    return checkpoint_tokenizer(source, text)


def _speak(tokenizer: PreTrainedTokenizerBase, prompt: str | None, checkpoint: Path) -> str:
    """Give the tokenizer TinyLLaVA's prompt and the token that ends an answer in it; returns the prompt's name."""
    by_end = {form.end: name for name, form in PROMPTS.items()}
    prompt = prompt or by_end.get(str(tokenizer.eos_token))
    if prompt not in PROMPTS or not PROMPTS[prompt].goes_with(tokenizer):
        raise ModelError(
            f"{checkpoint}: prompt {prompt!r} with the end-of-sequence token {tokenizer.eos_token!r} is none of "
            f"TinyLLaVA's for Qwen2; give --prompt {' or '.join(PROMPTS)}, whose answers end with "
            f"{' and '.join(form.end for form in PROMPTS.values())}"
        )
    PROMPTS[prompt].teach(tokenizer)
    return prompt


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by TinyLLaVA's own names, of either layout. Raises ModelError."""
    whole = read_weights(checkpoint)
    if whole is not None:
        return whole
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        weights = read_weights(checkpoint / part)
        if weights is None:
            raise ModelError(
                f"{checkpoint}: neither weights of the whole model nor those of {part} (expected model.safetensors or "
                f"pytorch_model.bin, there or in {part}/); the checkpoint is not complete"
            )
        prefix = "vision_tower._vision_tower." if part == "vision_tower" else f"{part}."
        tensors |= {prefix + name: tensor for name, tensor in weights.items()}
    return tensors


def _picture_source(checkpoint: Path, published: dict[str, Any], sources: Sources) -> str:
    """Where the image processor is: in the checkpoint, or where its config or the person says."""
    found = folder_with("preprocessor_config.json", checkpoint, checkpoint / "vision_tower")
    # TinyLLaVA keeps the name of a mixture's parts behind colons.
    name = str(published.get("vision_model_name_or_path") or "").split(":")[-1]
    return found or source_of(sources.encoder, name, "image processor", "--encoder")
