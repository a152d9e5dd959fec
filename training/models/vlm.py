"""Vision-language models: put together from an encoder and a language model, loaded from and saved to folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from switchkd.export.contract.pixels import Preprocessing
from switchkd.export.contract.prompt import SAVED_CUTS, PromptError, default_template, end_of_turn
from switchkd.export.folders.lfs_pointers import pointer_fault
from switchkd.export.llava.projectors import (
    GRID,
    MLP,
    Ldpv2Projector,
    ProjectorError,
    check_projector,
    llava_class,
    tokens_per_picture,
)
from switchkd.export.llava.weights import IMPORT_LLAVA, is_llavas_own, misfit, without_pooling_head

from .chat_templates import reading_parts

IMAGE_TOKEN = "<image>"
ENCODERS = ("siglip_vision_model", "clip_vision_model")  # a SigLIP 2 of fixed resolution is a siglip_vision_model
PARTS = ("encoder", "projector", "language_model")
PICTURE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class ModelError(ValueError):
    """A model that cannot be loaded or put together; the message says what was found and the way out."""


@dataclass(frozen=True)
class Vlm:
    """A model and the processor that belongs to it."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.processor.tokenizer  # type: ignore[no-any-return]

    @property
    def tokens_per_picture(self) -> int:
        """How many positions of the sequence one picture takes."""
        return int(self.model.config.image_seq_length)

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become this model's pixels."""
        return Preprocessing.from_config(self.processor.image_processor.to_dict())

    def save(self, folder: Path) -> None:
        """Write the standard folder: weights, tokenizer, template, processor; plain transformers loads one with an MLP.

        An LDPv2 folder needs `load_vlm`, or the class of switchkd.export.llava.projectors.
        """
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def load_vlm(source: str | Path, *, dtype: torch.dtype | None = None, **loading: Any) -> Vlm:
    """Load a LlavaForConditionalGeneration folder or hub id, ours or llava-hf's. Raises ModelError with the remedy.

    `loading` is handed to `from_pretrained`.
    What older llava-hf folders leave out of the processor (its patch size, the count of image tokens, the tokenizer's
    chat template) is filled in from the rest of the folder.
    """
    config = read_config(source)
    if config.model_type != "llava":
        raise ModelError(
            f"{source}: model type is {config.model_type!r}, expected 'llava' (a checkpoint folder of ours)"
        )
    try:
        kind = llava_class(config)
    except ProjectorError as error:
        raise ModelError(f"{source}: {error}") from None
    with _reading(source):
        processor = LlavaProcessor.from_pretrained(source, backend="pil")  # before the weights, which take longer
    model = _load(kind, source, config=config, dtype=dtype or torch.float32, use_safetensors=True, **loading)
    model.config.image_seq_length = tokens_per_picture(model.config)
    complete_processor(processor, model.config)
    return Vlm(model, processor)


def _load(kind: Any, source: str | Path, *, encoder: bool = False, **loading: Any) -> Any:
    """A model of a class from a folder or hub id, all of its weights read and none made up. Raises ModelError."""
    with _reading(source):
        model, info = kind.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **loading
        )
    if reason := misfit(info, encoder=encoder):
        raise ModelError(f"{source}: {reason}")
    return model


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """Raise ModelError, in one line with the way out, for what goes wrong while a folder or a hub id is read."""
    if fault := pointer_fault(Path(source)):
        raise ModelError(fault)
    try:
        yield
    except ModelError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise _cannot_load(source, error) from None


def _cannot_load(source: str | Path, error: Exception) -> ModelError:
    way_out = "" if isinstance(error, ValueError) else "; fetch or save it again"
    if not Path(source).is_dir():
        way_out = "; check its name, or give the folder of a copy where this machine has no way to the hub"
    return ModelError(f"{source}: cannot be loaded: {str(error).splitlines()[0].rstrip('.')}{way_out}")


def complete_processor(processor: LlavaProcessor, config: LlavaConfig) -> None:
    """Fill in what llava-hf folders of before transformers 4.47 leave out; one chat template, and no text cut."""
    if processor.patch_size is None:
        for name, value in _image_token_settings(config).items():
            setattr(processor, name, value)
    tokenizer = processor.tokenizer
    forget_cuts(tokenizer)
    try:
        template = default_template(processor.chat_template) or default_template(tokenizer.chat_template)
    except PromptError as error:
        raise ModelError(f"{tokenizer.name_or_path}: {error}") from None
    if template is not None:
        template = reading_parts(template, tokenizer.special_tokens_map, processor.image_token)
        processor.chat_template = tokenizer.chat_template = template


def build_vlm(
    encoder: str | Path,
    language_model: str | Path,
    *,
    vision_feature_layer: int = -2,
    drop_first_patch: bool = False,
    projector: str = MLP,
    projector_grid: int = GRID,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Vlm:
    """Put a vision encoder, or that of a LLaVA checkpoint, and a language model together with a fresh projector.

    The features are those of `vision_feature_layer`; CLIP's class token is dropped. `drop_first_patch` drops
    SigLIP's first patch too, which TinyLLaVA Factory's published models expect (728 tokens instead of 729).
    `projector` is LLaVA's 2-layer GELU "mlp", or "ldpv2", which pools the tokens to `projector_grid` on a side.
    Raises ModelError for an encoder, a projector or a language model that does not fit.
    """
    tower = load_encoder(encoder, dtype or torch.float32)
    sight = visual_settings(tower.config, vision_feature_layer, drop_first_patch, projector, projector_grid)
    try:
        check_projector(LlavaConfig(**sight))  # before the larger model is loaded
    except ProjectorError as error:
        raise ModelError(f"{encoder}: {error}") from None
    pictures = _image_processor(encoder)
    read_config(language_model)
    tokenizer = load_tokenizer(language_model)
    causal = _load(AutoModelForCausalLM, language_model, dtype=dtype or torch.float32)
    if len(tokenizer) > causal.config.vocab_size:
        causal.resize_token_embeddings(len(tokenizer))
    for part, source in ((tower, encoder), (causal, language_model)):
        if Path(source).exists():
            part.config._name_or_path = (
                ""  # a hub id says where a part is from, a folder only what this machine is like
            )
    config = LlavaConfig(
        **sight,
        text_config=causal.config,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        tie_word_embeddings=causal.config.tie_word_embeddings,
    )
    config.image_seq_length = tokens_per_picture(config)
    model = _assemble(config, tower, causal, seed)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return Vlm(model, make_processor(pictures, tokenizer, config))


def visual_settings(
    vision: Any, vision_feature_layer: int, drop_first_patch: bool, projector: str, projector_grid: int
) -> dict[str, Any]:
    """What a `LlavaConfig` says of the encoder, whose config is `vision`, and of the projector."""
    drop_first = drop_first_patch or vision.model_type == "clip_vision_model"
    settings: dict[str, Any] = {
        "vision_config": vision,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": "default" if drop_first else "full",
        "projector_hidden_act": "gelu",
    }
    # A config that names no projector is plain LLaVA's.
    return settings if projector == MLP else settings | {"projector_type": projector, "projector_grid": projector_grid}


def _assemble(
    config: LlavaConfig, tower: PreTrainedModel, causal: PreTrainedModel, seed: int
) -> LlavaForConditionalGeneration:
    # Built without memory and then given the loaded parts, so that a 7B model is never held twice.
    with torch.device("meta"):
        model = llava_class(config)(config)
    model.model.vision_tower = tower
    model.model.language_model = causal.model
    model.lm_head = causal.lm_head
    _initialise(model.model.multi_modal_projector.to_empty(device="cpu").to(causal.dtype), seed)
    model.tie_weights()
    return model


def _initialise(projector: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in (projector.linear_1, projector.linear_2):
        # As transformers has it: SigLIP's features are not normalised, so a wider start enters far above the words.
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
        nn.init.zeros_(layer.bias)
    if isinstance(projector, Ldpv2Projector):
        # As torch starts a convolution, and with it MobileVLM V2's public code: uniform within 1/√fan-in.
        bound = projector.peg.weight[0].numel() ** -0.5
        for parameter in projector.peg.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


def parts(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules of each of PARTS; the language model's includes its head."""
    inner = model.model
    return {
        "encoder": [inner.vision_tower],
        "projector": [inner.multi_modal_projector],
        "language_model": [inner.language_model, model.lm_head],
    }


def train_only(model: LlavaForConditionalGeneration, names: tuple[str, ...]) -> None:
    """Let the named PARTS take gradients and freeze the rest, among it the encoder's layers that LLaVA never reads."""
    model.requires_grad_(False)
    for name in names:
        for module in parts(model)[name]:
            module.requires_grad_(True)
    if "encoder" in names:
        tower = model.model.vision_tower
        layers = tower.encoder.layers
        chosen: Any = model.config.vision_feature_layer
        states = [chosen] if isinstance(chosen, int) else chosen
        # Hidden state 0 is what goes into the first layer, and the last one has not passed the norm behind the layers.
        read = max(state % (len(layers) + 1) for state in states)
        for unread in (*layers[read:], tower.post_layernorm, getattr(tower, "head", None)):
            if unread is not None:
                unread.requires_grad_(False)


def read_config(source: str | Path) -> Any:
    """The config of a checkpoint folder or hub id. Raises ModelError."""
    folder = Path(source)
    # What has the form of a hub id (at most one slash, not starting at the root or here) is asked of the hub.
    is_path = isinstance(source, Path) or folder.is_dir() or folder.is_absolute() or len(folder.parts) > 2
    if is_path and not (folder / "config.json").is_file():
        raise ModelError(f"{source}: no config.json there; expected a Hugging Face checkpoint folder")
    try:
        # Looked at before transformers makes a model's config of it, whatever that would be.
        given, _ = PreTrainedConfig.get_config_dict(source)
        # Left unset, transformers asks at the terminal whether to run the code that came with the weights.
        config = None if is_llavas_own(given) else AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:  # a model type that is not transformers' own
        raise ModelError(
            f"{source}: cannot be loaded without code of its own: {str(error).splitlines()[0]}; `switchkd import "
            "tinyllava` turns a TinyLLaVA Factory checkpoint into a standard folder"
        ) from None
    except OSError as error:
        raise _cannot_load(source, error) from None
    if config is None:
        raise ModelError(f"{source}: {IMPORT_LLAVA.format(source)}")
    if config.model_type == "llava":
        without_pooling_head(config)
    return config


def load_encoder(source: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A SigLIP's or CLIP's vision tower, or the one of a LLaVA checkpoint, as in the paper's table 3."""
    config = read_config(source)
    tower: PreTrainedModel
    if config.model_type == "llava":
        tower = load_vlm(source, dtype=dtype).model.model.vision_tower
        return tower
    tower = _load(AutoModel, source, encoder=True, config=encoder_config(source, config), dtype=dtype)
    return tower


def encoder_config(source: str | Path, config: Any) -> Any:
    """The vision encoder's config in that of a model, without SigLIP's pooling head. Raises ModelError."""
    vision = getattr(config, "vision_config", config)  # a whole SigLIP or CLIP has both towers
    if vision.model_type == "siglip2_vision_model":
        raise ModelError(
            f"{source}: encoder type is {vision.model_type!r}, a SigLIP 2 for pictures of any shape (NaFlex), expected "
            "one of fixed resolution, whose tokens are a square grid; take the variant with a resolution in its name, "
            "such as google/siglip2-so400m-patch14-384"
        )
    if vision.model_type not in ENCODERS:
        raise ModelError(f"{source}: encoder type is {vision.model_type!r}; supported are {', '.join(ENCODERS)}")
    without_pooling_head(vision)
    return vision


def load_tokenizer(language_model: str | Path) -> PreTrainedTokenizerBase:
    """A language model's tokenizer with the image token, and its template reading pictures. Raises ModelError."""
    folder = Path(language_model)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make an empty one.
        raise ModelError(f"{language_model}: no tokenizer there; put tokenizer.json and tokenizer_config.json into it")
    with _reading(language_model):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(language_model)
        template = default_template(tokenizer.chat_template)
    if template is None:
        raise ModelError(f"{language_model}: its tokenizer has no chat template; use an instruct model")
    forget_cuts(tokenizer)
    add_image_token(tokenizer)
    names = tokenizer.special_tokens_map
    tokenizer.chat_template = reading_parts(template, names, IMAGE_TOKEN)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # A base model's tokenizer ends documents; what ends an answer is for the template to say.
    tokenizer.eos_token = end_of_turn(tokenizer.chat_template, names, special) or tokenizer.eos_token
    return tokenizer


def forget_cuts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop the padding and truncation that tokenizer.json came with; a processor obeys them, and saves them again."""
    backend: Any = tokenizer
    backend.backend_tokenizer.no_padding()
    backend.backend_tokenizer.no_truncation()
    for key in SAVED_CUTS:
        tokenizer.init_kwargs.pop(key, None)


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a language model's tokenizer the token that stands for a picture, beside the special tokens it has."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)


def _image_token_settings(config: LlavaConfig) -> dict[str, Any]:
    vision: Any = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    drops_one = config.vision_feature_select_strategy == "default"
    return {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        # The processor counts patches, less one under "default". This is the difference to what the model gives: a
        # class token, or, below zero, the tokens that ldpv2 pools away.
        "num_additional_image_tokens": tokens_per_picture(config) - (patches - drops_one),
    }


def _image_processor(encoder: str | Path) -> Any:
    """How an encoder's pictures are prepared."""
    folder = Path(encoder)
    if folder.is_dir() and not any((folder / name).is_file() for name in PICTURE_SETTINGS):
        raise ModelError(
            f"{encoder}: no {PICTURE_SETTINGS[0]} there, which says how its pictures are prepared; copy it from where "
            "the encoder is from"
        )
    with _reading(encoder):
        # The PIL processors need no torchvision and are what the exported preprocessing is compared with.
        return AutoImageProcessor.from_pretrained(encoder, backend="pil")


def make_processor(pictures: Any, tokenizer: PreTrainedTokenizerBase, config: LlavaConfig) -> LlavaProcessor:
    """The processor of a model put together: the encoder's image processor, the tokenizer and its chat template."""
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
        **_image_token_settings(config),
    )
