"""Reads a LLaVA checkpoint folder for export, and refuses in one line what cannot become a bundle."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from ..contract.bundle import CacheShape, ModelFacts
from ..contract.generation_settings import GenerationError, GenerationSettings, not_obeyed
from ..contract.pixels import PictureError, Preprocessing, complete
from ..contract.prompt import PromptError, TokenizerError, default_template, read_tokenizer, special_tokens
from ..folders.lfs_pointers import pointer_fault
from ..llava.projectors import ProjectorError, check_projector, llava_class, projector_type
from ..llava.weights import IMPORT_LLAVA, is_llavas_own, misfit, without_pooling_head
from .answer_ends import AnswerEnds
from .fused_decoder import ROTARY_TYPES
from .tracing import ExportError, quiet

VISION_TYPES = ("siglip_vision_model", "clip_vision_model")
LANGUAGE_TYPES = ("qwen2", "llama")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the float32 model on the CPU, and the files beside it as they were read."""

    path: Path
    model: LlavaForConditionalGeneration
    tokenizer: Tokenizer
    tokenizer_config: dict[str, Any]
    processor_config: dict[str, Any]
    image_processor: dict[str, Any]
    generation_config: dict[str, Any]
    chat_template: str
    ends: AnswerEnds

    def release(self) -> None:
        """Give the weights' memory back; the model cannot run any more.

        Dropping the model is not enough: torch's exporter holds on to parameters that it has traced.
        """
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.new_empty(0)

    @property
    def config(self) -> Any:
        """The model's LlavaConfig; transformers types its two parts as optional, `open_checkpoint` has seen them."""
        return self.model.config

    def facts(self) -> ModelFacts:
        """What the bundle's manifest says about the model; raises ExportError where the checkpoint is silent."""
        text, vision = self.config.text_config, self.config.vision_config
        picture_shape = (vision.num_channels, vision.image_size, vision.image_size)
        with torch.no_grad():
            features = self.model.get_image_features(torch.zeros(1, *picture_shape)).pooler_output[0]
        return ModelFacts(
            image_token=self.image_token,
            image_token_id=self.config.image_token_id,
            tokens_per_picture=features.shape[0],
            picture_shape=picture_shape,
            eos_token_ids=self.ends.ids,
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            max_positions=text.max_position_embeddings,
            cache=CacheShape(
                layers=text.num_hidden_layers,
                kv_heads=text.num_key_value_heads,
                head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            ),
        )

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type that config.json gives the weights, whatever they were loaded as; float32 if it is silent."""
        config = _read_json(self.path / "config.json")
        name = config.get("dtype") or config.get("torch_dtype")
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name), torch.float32)

    @property
    def projector(self) -> str:
        """The projector between its two parts, as export/llava/projectors.py names it."""
        return projector_type(self.config)

    @property
    def image_token(self) -> str:
        """The text of the token that stands for a picture; raises ExportError if the tokenizer lacks it."""
        token = self.tokenizer.id_to_token(self.config.image_token_id)
        if token is None:
            raise ExportError(
                f"{self.path}: image_token_index is {self.config.image_token_id}, which tokenizer.json does not have; "
                "add the token or correct config.json"
            )
        return str(token)

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever exports should know of the answers, a line for each."""
        left = not_obeyed(self.generation_config)
        rest = ", ".join(f"{name} {json.dumps(value)}" for name, value in left.items())
        asked = f"generation_config.json asks for {rest}: switchkd.serve does not do that" if left else None
        return tuple(note for note in (self.ends.note, asked) if note is not None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Load a LlavaForConditionalGeneration folder from disk alone; raises ExportError naming file, reason, remedy."""
    if not path.is_dir():
        raise ExportError(f"{path}: no such checkpoint folder; give a folder written by `save_pretrained`")
    if fault := pointer_fault(path):
        raise ExportError(fault)
    _check_architecture(path)
    config = _read_config(path)
    _check_weights(path)
    processor_config = _read_json(path / "processor_config.json", optional=True)
    # transformers 4 wrote the picture settings into a file of their own.
    image_processor = complete(processor_config.get("image_processor") or _read_json(path / "preprocessor_config.json"))
    try:
        preprocessing = Preprocessing.from_config(image_processor)
    except PictureError as error:
        raise ExportError(f"{path}: {error}") from error
    tokenizer_config = _read_json(path / "tokenizer_config.json")
    tokenizer = _load_tokenizer(path / "tokenizer.json")
    template = _chat_template(path, processor_config, tokenizer_config)
    processor_config.pop("chat_template", None)  # a bundle has it in a file of its own
    generation_config = _read_generation_config(path / "generation_config.json")
    text: Any = config.text_config
    ends = AnswerEnds.of(path, generation_config, text, tokenizer, template, special_tokens(tokenizer_config))
    checkpoint = Checkpoint(
        path=path,
        model=_load_model(path, config),
        tokenizer=tokenizer,
        tokenizer_config=tokenizer_config,
        processor_config=processor_config,
        image_processor=image_processor,
        generation_config=generation_config,
        chat_template=template,
        ends=ends,
    )
    _check_sizes(checkpoint, preprocessing)
    return checkpoint


def _check_architecture(path: Path) -> None:
    config = _read_json(path / "config.json")
    if is_llavas_own(config):
        raise ExportError(f"{path}: {IMPORT_LLAVA.format(path)}")
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    for name, found, known in (
        ("model_type", config.get("model_type"), ("llava",)),
        ("vision_config.model_type", vision.get("model_type"), VISION_TYPES),
        ("text_config.model_type", text.get("model_type"), LANGUAGE_TYPES),
    ):
        if found not in known:
            raise ExportError(f"{path / 'config.json'}: {name} is {found!r}, switchkd exports {' or '.join(known)}")
    if quantized := config.get("quantization_config"):
        raise ExportError(
            f"{path / 'config.json'}: its weights are quantised ({quantized.get('quant_method', 'unknown method')}); "
            "export the checkpoint they were made from, in float32, float16 or bfloat16"
        )


def _read_config(path: Path) -> LlavaConfig:
    """Read config.json as transformers understands it; raises ExportError for what would become a wrong graph."""
    try:
        config: Any = LlavaConfig.from_pretrained(path, local_files_only=True)
        check_projector(config)
    except (StrictDataclassError, ProjectorError) as error:
        raise ExportError(f"{path / 'config.json'}: {_one_line(error)}") from None
    without_pooling_head(config)
    text, vision = config.text_config, config.vision_config
    rotary = text.rope_parameters.get("rope_type", "default")
    chosen = config.vision_feature_layer
    layers, count = [chosen] if isinstance(chosen, int) else chosen, vision.num_hidden_layers
    for wrong, reason in (
        (
            set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"},
            "the language model uses sliding windows, which cannot be exported",
        ),
        (
            rotary not in ROTARY_TYPES,
            f"rope_type is {rotary!r}, switchkd exports {', '.join(ROTARY_TYPES)}: other angles change with the "
            "length of the prompt, which a graph cannot",
        ),
        (
            any(not -count - 1 <= layer <= count for layer in layers),
            f"vision_feature_layer is {chosen}, the vision encoder has {count} layers; correct it",
        ),
    ):
        if wrong:
            raise ExportError(f"{path / 'config.json'}: {reason}")
    return config  # type: ignore[no-any-return]


def _check_weights(path: Path) -> None:
    """Find every file of the weights whole before any is read."""
    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ExportError(f"{index}: names no weights; save the checkpoint again")
        names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        file = path / name
        if Path(name).name != name:
            raise ExportError(f"{index}: names {name!r}, which is no file of this folder; save the checkpoint again")
        if not file.is_file():
            pickled = sorted(other.name for other in path.iterdir() if other.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            if pickled and not index.is_file():
                raise ExportError(
                    f"{path / pickled[0]}: pickled weights can hold code and are never loaded; save the checkpoint "
                    "again with transformers 5, which writes safetensors"
                )
            raise ExportError(f"{file}: missing, the weights are incomplete; copy or save the checkpoint again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ExportError(f"{file}: not whole ({error}); copy or save the checkpoint again") from error


def _load_model(path: Path, config: LlavaConfig) -> LlavaForConditionalGeneration:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with quiet():
            loaded: Any = llava_class(config).from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                # Written out step by step it makes the smaller graph, and the fused kernels change nothing here.
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # told, and refused below
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = _one_line(error)[:300]
        raise ExportError(f"{path}: the weights cannot be loaded ({reason}); save the checkpoint again") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model: LlavaForConditionalGeneration
    model, loading = loaded
    if unused := sorted(key for key in loading["unexpected_keys"] if "multi_modal_projector" in key):
        raise ExportError(
            f"{path}: {unused[0]} is no weight of the projector that config.json asks for "
            f"({projector_type(model.config)!r}); correct projector_type or multimodal_projector_bias"
        )
    if unfit := misfit(loading):
        raise ExportError(f"{path}: {unfit}")
    model.eval().requires_grad_(False)
    return model


def _load_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise ExportError(f"{file}: missing; save the tokenizer in its fast form")
    try:
        return read_tokenizer(file)
    except TokenizerError as error:
        raise ExportError(f"{error}; save the tokenizer again") from error


def _read_generation_config(file: Path) -> dict[str, Any]:
    config = _read_json(file, optional=True)
    try:
        GenerationSettings.from_config(config)
    except GenerationError as error:
        raise ExportError(f"{file}: {error}") from error
    return config


def _chat_template(path: Path, processor_config: dict[str, Any], tokenizer_config: dict[str, Any]) -> str:
    """The template where transformers looks for it, in its order; raises ExportError where no file has one."""
    # Until its release 4.44, transformers kept a processor's template among the processor's settings.
    files: tuple[tuple[str, Any], ...] = (
        ("processor_config.json", processor_config.get("chat_template")),
        ("chat_template.json", _read_json(path / "chat_template.json", optional=True).get("chat_template")),
        ("chat_template.jinja", _read_text(path / "chat_template.jinja")),
        ("tokenizer_config.json", tokenizer_config.get("chat_template")),
    )
    for name, content in files:
        try:
            if template := default_template(content):
                return template
        except PromptError as error:
            raise ExportError(f"{path / name}: {error}") from error
    raise ExportError(
        f"{path / 'chat_template.jinja'}: missing, and no other file holds a chat template; save the processor with one"
    )


def _read_text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _check_sizes(checkpoint: Checkpoint, preprocessing: Preprocessing) -> None:
    side = checkpoint.config.vision_config.image_size
    if preprocessing.output_size != (side, side):
        raise ExportError(
            f"{checkpoint.path}: pictures are prepared as {preprocessing.output_size}, the vision encoder takes "
            f"({side}, {side}); make size or crop_size of the image processor fit"
        )
    have, rows = checkpoint.tokenizer.get_vocab_size(), checkpoint.config.text_config.vocab_size
    if have > rows:
        raise ExportError(f"{checkpoint.path}: the tokenizer has {have} tokens, the language model only {rows}")


def _read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    if not file.is_file():
        if optional:
            return {}
        raise ExportError(f"{file}: missing; save the checkpoint and its processor again")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ExportError(f"{file}: not a JSON object")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
