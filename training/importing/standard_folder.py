"""What every import of another project's checkpoint does: find its parts, read its tensors, write a standard folder."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from switchkd.export.contract.pixels import Preprocessing
from switchkd.export.llava.projectors import tokens_per_picture
from switchkd.export.llava.weights import is_unread

from ..models.vlm import IMAGE_TOKEN, ModelError, Vlm, add_image_token, forget_cuts, make_processor

# "patch" drops the first feature whatever the encoder: CLIP's class token, and with SigLIP, which has none, a patch.
STRATEGIES: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


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
    notes: tuple[str, ...] = ()  # on what is not as the other project has it


@dataclass(frozen=True)
class Prompt:
    """A conversation's form: the chat template, and the token that ends an answer."""

    template: str
    end: str

    def goes_with(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the tokenizer has the token that ends an answer."""
        return self.end in tokenizer.get_vocab()

    def teach(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the tokenizer the template, the end of an answer, and a token for a picture."""
        add_image_token(tokenizer)
        tokenizer.eos_token = self.end
        tokenizer.pad_token = tokenizer.pad_token or self.end
        tokenizer.chat_template = self.template


def check_supported(where: Path, *settings: tuple[str, Any, Sequence[Any]]) -> None:
    """Raise ModelError for the first (name, value found, values supported) of a config that is not supported."""
    for name, found, supported in settings:
        if found not in supported:
            raise ModelError(f"{where}: {name} is {found!r}, supported is {' or '.join(map(repr, supported))}")


def standard_config(
    vision: Any, text: Any, tokenizer: PreTrainedTokenizerBase, layer: Any, strategy: Literal["default", "full"]
) -> LlavaConfig:
    """The config of a LLaVA with a GELU MLP that takes its features from this layer of the vision encoder."""
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.image_seq_length = tokens_per_picture(config)
    return config


def checkpoint_tokenizer(source: str, text: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id for a language model's config, without cuts of its own. Raises ModelError."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, config=text, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:  # of a package that reads older forms, say
        raise ModelError(
            f"{source}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]}); give a folder that has "
            "it as tokenizer.json, such as that of the language model it was trained from: --language-model FOLDER"
        ) from None
    forget_cuts(tokenizer)
    return tokenizer


def own_settings(given: dict[str, Any]) -> dict[str, Any]:
    """A part's config without what says where it lay on its maker's machine, and without a type of its own."""
    foreign = ("_name_or_path", "model_name_or_path", "model_name_or_path2", "torch_dtype", "dtype")
    return {key: value for key, value in given.items() if key not in foreign}


def picture_processor(
    source: str, tokenizer: PreTrainedTokenizerBase, config: Any, option: str = "--encoder"
) -> LlavaProcessor:
    """The processor of a folder or hub id that has the image processor. Raises ModelError naming the `option`."""
    try:
        if not Path(source).is_dir():  # asked for by its name once, where AutoImageProcessor tries several
            source = str(Path(hf_hub_download(source, "preprocessor_config.json")).parent)
        pictures = AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: its image processor cannot be loaded ({str(error).splitlines()[0]}); give the folder of the "
            f"vision encoder with its preprocessor_config.json: {option} FOLDER"
        ) from None
    side = config.vision_config.image_size
    size = Preprocessing.from_config(pictures.to_dict()).output_size
    if size != (side, side):
        raise ModelError(
            f"{source}: prepares pictures as {size}, the vision encoder takes ({side}, {side}); give the folder of the "
            f"encoder that it was trained from: {option} FOLDER"
        )
    return make_processor(pictures, tokenizer, config)


def folder_with(name: str, *folders: Path) -> str | None:
    """The first of these folders that has a file of this name."""
    return next((str(folder) for folder in folders if (folder / name).is_file()), None)


def source_of(given: str | None, named: str | None, what: str, option: str) -> str:
    """The folder or hub id of what the checkpoint lacks: as given, or as its config names it."""
    source = given or named
    # A name from the machine where it was trained, such as /data/models/qwen2, leads nowhere here.
    if not source or (Path(source).is_absolute() and not Path(source).is_dir()):
        raise ModelError(f"the checkpoint has no {what}, and its config names {named!r}; give it by {option} FOLDER")
    return source


def read_weights(folder: Path) -> dict[str, Tensor] | None:
    """The weights in a folder, in one file or several; None where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = read_json(folder / f"{name}.index.json")
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


def standard_names(
    published: dict[str, Tensor], names: Sequence[tuple[str, str]], where: Path, parts: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by the names of llava-hf's folders, and the names of those that LLaVA has no use for.

    `names` pairs how another project's names begin with how ours do, an empty text where LLaVA does not read them.
    Raises ModelError for a name that is none of them; `parts` says what there should be.
    """
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, tensor in published.items():
        found = next(((old, new) for old, new in names if name.startswith(old)), None)
        if found is None:
            raise ModelError(f"{where}: {name} is no weight of {parts}")
        standard = found[1] + name.removeprefix(found[0])
        if not found[1] or is_unread(standard):
            left_out.append(name)
        else:
            tensors[standard] = tensor
    return tensors, left_out


def save_standard(
    config: LlavaConfig, tensors: dict[str, Tensor], processor: LlavaProcessor, checkpoint: Path, folder: Path
) -> str:
    """Write the folder of a config with exactly these tensors, which it settles; returns their type's name.

    Raises ModelError, naming the `checkpoint`, where the two do not fit.
    """
    text: Any = config.text_config
    _settle_head(tensors, bool(text.tie_word_embeddings), checkpoint)
    _make_room(tensors, len(processor.tokenizer))
    text.vocab_size = tensors[EMBEDDING].shape[0]
    vlm = Vlm(_put_together(config, tensors, processor.tokenizer, checkpoint), processor)
    vlm.save(folder)
    return str(vlm.model.dtype).removeprefix("torch.")


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


def _put_together(
    config: LlavaConfig, tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, where: Path
) -> LlavaForConditionalGeneration:
    """The model of a config with exactly these tensors. Raises ModelError."""
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content, nothing where there is no file. Raises ModelError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); fetch it again") from None
