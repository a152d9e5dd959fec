"""Published TinyLLaVA Factory checkpoints → the standard LlavaForConditionalGeneration folder, tensor for tensor.

TinyLLaVA Factory (arXiv 2405.11788) writes two layouts. The end of a fine-tuning, which is also what its authors put on
the hub, is one folder of weights named `language_model.*`, `vision_tower._vision_tower.*` and `connector._connector.*`.
The end of a pretraining has a folder for each of the three, with a `pytorch_model.bin` in it. Both have `config.json`
of model type "tinyllava". Source of the layouts and of the prompt: its public code, read in 2026.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from switchkd.export.out_folder import making
from switchkd.export.pixels import Preprocessing
from switchkd.export.projectors import tokens_per_picture

from .vlm import (
    ENCODERS,
    IMAGE_TOKEN,
    ModelError,
    Vlm,
    add_image_token,
    encoder_config,
    forget_cuts,
    make_processor,
    read_config,
)

LANGUAGE_MODELS = ("qwen2",)  # Qwen2 and Qwen2.5 are of this type
CONNECTOR = "mlp2x_gelu"
# "patch" drops the first feature whatever the encoder: CLIP's class token, and with SigLIP, which has none, a patch.
STRATEGIES: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
# TinyLLaVA's prompts for Qwen2, by what ends an answer: qwen2_base and qwen2_instruct in its code.
PROMPTS = {"base": "<|endoftext|>", "instruct": "<|im_end|>"}
PARTS = ("language_model", "vision_tower", "connector")
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_NAMES = (
    ("vision_tower._vision_tower.", "vision_tower."),
    ("connector._connector.0.", "multi_modal_projector.linear_1."),
    ("connector._connector.2.", "multi_modal_projector.linear_2."),
    ("language_model.", "language_model."),
)
_POOLING = "vision_tower.vision_model.head."  # SigLIP's pooling head, which LLaVA never reads
_COMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")  # buffers that older releases saved too
_TEMPLATE = (
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


@dataclass(frozen=True)
class Sources:
    """Where to look for what a checkpoint lacks, before the hub names in its config: folders or hub ids."""

    language_model: str | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class Imported:
    """What an import wrote: how many tensors, in which type, which were left out, which prompt, tokens a picture."""

    folder: Path
    tensors: int
    dtype: str
    left_out: tuple[str, ...]
    prompt: str
    tokens_per_picture: int


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
    published = _config(checkpoint)
    vision = _vision_config(checkpoint, published, sources)
    text = _text_config(checkpoint, published, sources)
    tokenizer = _tokenizer(checkpoint, published, sources, text)
    prompt = _speak(tokenizer, prompt, checkpoint)
    config = _standard_config(published, vision, text, tokenizer.get_vocab()[IMAGE_TOKEN])
    processor = _processor(checkpoint, published, sources, tokenizer, config)
    # The weights come last: whatever else is in the way is said before gigabytes are read.
    tensors, left_out = standard_names(read_tensors(checkpoint), checkpoint)
    _settle_head(tensors, bool(text.tie_word_embeddings), checkpoint)
    _make_room(tensors, len(tokenizer))
    text.vocab_size = tensors[EMBEDDING].shape[0]
    vlm = Vlm(_model(config, tensors, tokenizer, checkpoint), processor)
    vlm.save(folder)
    dtype = str(vlm.model.dtype).removeprefix("torch.")
    return Imported(folder, len(tensors), dtype, tuple(left_out), prompt, config.image_seq_length)


def _config(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json, refused where it asks for what has no place in LLaVA."""
    published = _json(checkpoint / "config.json")
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
    for name, found, supported in (
        ("model_type", published.get("model_type"), ("tinyllava",)),
        ("connector_type", published.get("connector_type"), (CONNECTOR,)),
        ("vision_feature_select_strategy", published.get("vision_feature_select_strategy", "patch"), tuple(STRATEGIES)),
        # "pad" makes pictures square with a border, "anyres" cuts them up; neither is a setting of the processor.
        ("image_aspect_ratio", published.get("image_aspect_ratio") or "square", ("square",)),
    ):
        if found not in supported:
            raise ModelError(f"{checkpoint}: {name} is {found!r}, supported is {' or '.join(map(repr, supported))}")
    return published


def _standard_config(published: dict[str, Any], vision: Any, text: Any, image_token: int) -> LlavaConfig:
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=published.get("vision_feature_layer", -2),
        vision_feature_select_strategy=STRATEGIES[published.get("vision_feature_select_strategy", "patch")],
        projector_hidden_act="gelu",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.image_seq_length = tokens_per_picture(config)
    return config


def _text_config(checkpoint: Path, published: dict[str, Any], sources: Sources) -> Any:
    given = published.get("text_config") or _json(checkpoint / "language_model" / "config.json")
    name = published.get("llm_model_name_or_path")
    found = given.get("model_type") if given else None
    if given and found in LANGUAGE_MODELS:
        return AutoConfig.for_model(**_own(given))
    if not given:
        config = read_config(_source(sources.language_model, name, "language model", "--language-model"))
        found = config.model_type
        if found in LANGUAGE_MODELS:
            return config
    raise ModelError(
        f"{checkpoint}: language model is {name!r} of type {found!r}, supported are Qwen2 and Qwen2.5 (qwen2)"
    )


def _vision_config(checkpoint: Path, published: dict[str, Any], sources: Sources) -> Any:
    given = published.get("vision_config") or _json(checkpoint / "vision_tower" / "config.json")
    name = published.get("vision_model_name_or_path")
    if not given:
        source = _source(sources.encoder, name, "vision encoder", "--encoder")
        return encoder_config(source, read_config(source))
    if given.get("model_type") not in ENCODERS:
        raise ModelError(
            f"{checkpoint}: vision tower is {name!r} of type {given.get('model_type')!r}, supported are "
            f"{', '.join(ENCODERS)}"
        )
    return encoder_config(checkpoint, AutoConfig.for_model(**_own(given)))


def _own(given: dict[str, Any]) -> dict[str, Any]:
    """A part's config without what says where it lay on its maker's machine, and without a type of its own."""
    foreign = ("_name_or_path", "model_name_or_path", "model_name_or_path2", "torch_dtype", "dtype")
    return {key: value for key, value in given.items() if key not in foreign}


def _tokenizer(checkpoint: Path, published: dict[str, Any], sources: Sources, text: Any) -> PreTrainedTokenizerBase:
    source = _folder_with("tokenizer_config.json", checkpoint, checkpoint / "language_model")
    if source is None:
        name = published.get("tokenizer_name_or_path") or published.get("llm_model_name_or_path")
        source = _source(sources.language_model, name, "tokenizer", "--language-model")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, config=text, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: its tokenizer cannot be loaded ({str(error).splitlines()[0]}); give the folder of the language "
            "model that it was trained from: --language-model FOLDER"
        ) from None
    forget_cuts(tokenizer)
    return tokenizer


def _speak(tokenizer: PreTrainedTokenizerBase, prompt: str | None, checkpoint: Path) -> str:
    """Give the tokenizer TinyLLaVA's prompt and the token that ends an answer in it; returns the prompt's name."""
    by_end = {end: name for name, end in PROMPTS.items()}
    prompt = prompt or by_end.get(str(tokenizer.eos_token))
    end = PROMPTS.get(str(prompt))
    if prompt is None or end not in tokenizer.get_vocab():
        raise ModelError(
            f"{checkpoint}: prompt {prompt!r} with the end-of-sequence token {tokenizer.eos_token!r} is none of "
            f"TinyLLaVA's for Qwen2; give --prompt {' or '.join(PROMPTS)}, whose answers end with "
            f"{' and '.join(PROMPTS.values())}"
        )
    add_image_token(tokenizer)
    tokenizer.eos_token = end
    tokenizer.pad_token = tokenizer.pad_token or end
    tokenizer.chat_template = _TEMPLATE.replace("END_OF_TURN", end)
    return prompt


def _processor(
    checkpoint: Path, published: dict[str, Any], sources: Sources, tokenizer: PreTrainedTokenizerBase, config: Any
) -> Any:
    source = _folder_with("preprocessor_config.json", checkpoint, checkpoint / "vision_tower")
    if source is None:
        # TinyLLaVA keeps the name of a mixture's parts behind colons.
        name = str(published.get("vision_model_name_or_path") or "").split(":")[-1]
        source = _source(sources.encoder, name, "image processor", "--encoder")
    try:
        if not Path(source).is_dir():  # asked for by its name once, where AutoImageProcessor tries several
            source = str(Path(hf_hub_download(source, "preprocessor_config.json")).parent)
        processor = make_processor(source, tokenizer, config)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: its image processor cannot be loaded ({str(error).splitlines()[0]}); give the folder of the "
            "vision encoder with its preprocessor_config.json: --encoder FOLDER"
        ) from None
    side = config.vision_config.image_size
    size = Preprocessing.from_config(processor.image_processor.to_dict()).output_size
    if size != (side, side):
        raise ModelError(
            f"{source}: prepares pictures as {size}, the vision encoder takes ({side}, {side}); give the folder of the "
            "encoder that it was trained from: --encoder FOLDER"
        )
    return processor


def _folder_with(name: str, *folders: Path) -> str | None:
    return next((str(folder) for folder in folders if (folder / name).is_file()), None)


def _source(given: str | None, named: str | None, what: str, option: str) -> str:
    """The folder or hub id of what the checkpoint lacks: as given, or as its config names it."""
    source = given or named
    # A name from the machine where it was trained, such as /data/models/qwen2, leads nowhere here.
    if not source or (Path(source).is_absolute() and not Path(source).is_dir()):
        raise ModelError(f"the checkpoint has no {what}, and its config names {named!r}; give it by {option} FOLDER")
    return source


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by TinyLLaVA's own names, of either layout. Raises ModelError."""
    whole = _weights(checkpoint)
    if whole is not None:
        return whole
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        weights = _weights(checkpoint / part)
        if weights is None:
            raise ModelError(
                f"{checkpoint}: neither weights of the whole model nor those of {part} (expected model.safetensors or "
                f"pytorch_model.bin, there or in {part}/); the checkpoint is not complete"
            )
        prefix = "vision_tower._vision_tower." if part == "vision_tower" else f"{part}."
        tensors |= {prefix + name: tensor for name, tensor in weights.items()}
    return tensors


def _weights(folder: Path) -> dict[str, Tensor] | None:
    """The weights in a folder, in one file or several; None where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = _json(folder / f"{name}.index.json")
        files = sorted(set(index["weight_map"].values())) if index else [name]
        if not index and not (folder / name).is_file():
            continue
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _read(folder / Path(file).name)
        return tensors
    return None


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # weights_only reads tensors and nothing that could run; TinyLLaVA pickles its weights.
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(f"{file}: cannot be read ({str(error).splitlines()[0][:200]}); fetch it again") from None
    return loaded


def standard_names(published: dict[str, Tensor], where: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by the names of llava-hf's folders, and the names of those that LLaVA has no use for.

    Raises ModelError for a name that is none of TinyLLaVA's.
    """
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, tensor in published.items():
        standard = next((new + name.removeprefix(old) for old, new in _NAMES if name.startswith(old)), None)
        if standard is None:
            raise ModelError(f"{where}: {name} is no weight of a vision tower, an MLP connector or a language model")
        if standard.startswith(_POOLING) or standard.endswith(_COMPUTED):
            left_out.append(name)
        else:
            tensors[standard] = tensor
    return tensors, left_out


def _settle_head(tensors: dict[str, Tensor], tied: bool, where: Path) -> None:
    """A tied head is written once, under the embedding's name, whichever of the two names the checkpoint has."""
    if tied and HEAD in tensors:
        head = tensors.pop(HEAD)
        if not torch.equal(tensors.setdefault(EMBEDDING, head), head):
            raise ModelError(
                f"{where}: the config ties the head to the embedding, and the weights of the two differ; correct "
                "tie_word_embeddings in text_config"
            )
    if EMBEDDING not in tensors:
        raise ModelError(f"{where}: {EMBEDDING} is missing; the checkpoint is not complete")


def _make_room(tensors: dict[str, Tensor], tokens: int) -> None:
    """Add rows to the embedding and the head where the tokenizer, which now has `<image>`, needs more of them."""
    for name in (EMBEDDING, HEAD):
        table_VD = tensors.get(name)
        if table_VD is not None and tokens > table_VD.shape[0]:
            # The mean row: as a logit it is the mean of all others, and so never the greatest.
            more_VD = table_VD.float().mean(0, keepdim=True).expand(tokens - table_VD.shape[0], -1)
            tensors[name] = torch.cat([table_VD, more_VD.to(table_VD.dtype)])


def _model(
    config: LlavaConfig, tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, where: Path
) -> LlavaForConditionalGeneration:
    types = {tensor.dtype for tensor in tensors.values()}
    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            # float32 holds every number of the shorter types.
            dtype=types.pop() if len(types) == 1 else torch.float32,
            output_loading_info=True,
        )
    except RuntimeError as error:  # shapes that the config does not have
        raise ModelError(f"{where}: weights and config.json do not fit: {' '.join(str(error).split())[:300]}") from None
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info[problem])):
            raise ModelError(
                f"{where}: weights and config.json do not fit: {len(found)} {problem.replace('_', ' ')}, the first is "
                f"{found[0]}"
            )
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model  # type: ignore[no-any-return]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); fetch it again") from None
