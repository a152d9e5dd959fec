"""How large a recipe's models are: their configs from folders, from the hub, or from what is published of them.

Parameters are counted on the classes that training uses, built without memory.
"""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2Config,
    SiglipVisionConfig,
)

from switchkd.export.llava.projectors import ProjectorError, llava_class, tokens_per_picture

from ..models.vlm import ModelError, encoder_config, load_tokenizer, read_config, visual_settings
from .recipe import ModelRecipe, Recipe, RecipeError, load_recipe

_QWEN = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SIGHT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
# From the models' own config.json on the hub, so that the shipped recipes are estimated without a network.
PUBLISHED: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": dict(zip(_SIGHT, (1152, 4304, 27, 16, 384, 14), strict=True)),
    "google/siglip2-base-patch16-384": dict(zip(_SIGHT, (768, 3072, 12, 12, 384, 16), strict=True)),
    "google/siglip2-large-patch16-384": dict(zip(_SIGHT, (1024, 4096, 24, 16, 384, 16), strict=True)),
    "google/siglip2-so400m-patch16-384": dict(zip(_SIGHT, (1152, 4304, 27, 16, 384, 16), strict=True)),
    "openai/clip-vit-large-patch14-336": dict(zip(_SIGHT, (1024, 4096, 24, 16, 336, 14), strict=True)),
    "Qwen/Qwen2.5-0.5B-Instruct": dict(zip(_QWEN, (896, 4864, 24, 14, 2), strict=True)),
    "Qwen/Qwen2.5-1.5B-Instruct": dict(zip(_QWEN, (1536, 8960, 28, 12, 2), strict=True)),
    "Qwen/Qwen2.5-3B-Instruct": dict(zip(_QWEN, (2048, 11008, 36, 16, 2), strict=True)),
    "Qwen/Qwen2.5-7B-Instruct": dict(zip(_QWEN, (3584, 18944, 28, 28, 4), strict=True))
    | {"vocab_size": 152_064, "tie_word_embeddings": False},
}


def student_config(recipe: Recipe) -> LlavaConfig:
    """The config of the model that a recipe trains. Raises ModelError, RecipeError."""
    return _model_config(recipe.model, recipe.root)


def teacher_config(recipe: Recipe, language_model: str | None = None) -> LlavaConfig:
    """The config of a recipe's teacher: of its folder, or of the shipped recipe that makes that folder.

    `language_model` stands in where there is neither: the teacher is then the student with that language model. Raises
    ModelError, RecipeError.
    """
    assert recipe.teacher is not None
    if language_model is None:
        return _checkpoint_config(recipe.teacher.checkpoint, recipe.root)
    encoder = recipe.model.encoder
    if encoder is None:
        raise RecipeError(
            f"--teacher-language-model is {language_model!r} and the student is a checkpoint, so the teacher's encoder "
            "is unknown; give teacher= the folder of a teacher, or of one that a shipped recipe makes"
        )
    model = ModelRecipe(
        encoder=encoder,
        language_model=language_model,
        vision_feature_layer=recipe.model.vision_feature_layer,
        drop_first_patch=recipe.model.drop_first_patch,
    )
    return _model_config(model, recipe.root)


def build_without_memory(config: LlavaConfig, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """The model of a config on the meta device: every shape and no number. Raises ModelError."""
    try:
        kind = llava_class(config)
    except ProjectorError as error:
        raise ModelError(str(error)) from None
    # A config remembers the model it was built for; two models of one estimate must not share it.
    with torch.device("meta"):
        model: Any = kind(copy.deepcopy(config))
    return model.to(dtype)  # type: ignore[no-any-return]


def local_tokenizer(model: ModelRecipe) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that is a folder here, as training reads it; None for anything else.

    Raises ModelError for one that training refuses.
    """
    source = model.checkpoint or model.language_model
    if source is None or not (Path(source) / "tokenizer_config.json").is_file():
        return None
    return load_tokenizer(source)


def _model_config(model: ModelRecipe, root: str) -> LlavaConfig:
    if model.checkpoint is not None:
        return _checkpoint_config(model.checkpoint, root)
    vision, text = _vision_config(str(model.encoder), root), _text_config(str(model.language_model))
    tokenizer = local_tokenizer(model)
    if tokenizer is not None:
        text.vocab_size = max(text.vocab_size, len(tokenizer))
    settings = visual_settings(
        vision, model.vision_feature_layer, model.drop_first_patch, model.projector, model.projector_grid
    )
    config = LlavaConfig(
        **settings,
        text_config=text,
        image_token_index=text.vocab_size - 1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.image_seq_length = tokens_per_picture(config)
    return config


def _checkpoint_config(source: str, root: str) -> LlavaConfig:
    if not (Path(source) / "config.json").is_file():
        maker = _made_by(source, root)
        if maker is not None:
            return _model_config(maker.model, maker.root)
        if Path(source).is_absolute() or source.count("/") != 1:  # no hub id
            raise ModelError(
                f"{source}: there is no such model yet, and no shipped recipe makes it, so its size is unknown; give "
                "its folder, or --teacher-language-model, such as Qwen/Qwen2.5-3B-Instruct"
            )
    config = read_config(source)
    if config.model_type != "llava":
        raise ModelError(f"{source}: model type is {config.model_type!r}, expected 'llava'")
    return config  # type: ignore[no-any-return]


def _made_by(folder: str, root: str) -> Recipe | None:
    """The shipped recipe that has a stage saved as `folder`, if there is one."""
    shipped = Path(str(resources.files("switchkd.recipes")))
    for path in sorted(shipped.rglob("*.yaml")):
        try:
            recipe = load_recipe(path, [f"root={root}"])
        except (RecipeError, AttributeError, TypeError):
            continue  # another kind of file than a recipe: DeepSpeed's settings, an ablation's matrix
        if any(Path(recipe.output) / stage.name == Path(folder) for stage in recipe.stages):
            return recipe
    return None


def _vision_config(source: str, root: str) -> Any:
    if source in PUBLISHED:
        kind = CLIPVisionConfig if "clip-" in source else SiglipVisionConfig
        return encoder_config(source, kind(**PUBLISHED[source]))
    if not Path(source).is_dir():
        maker = _made_by(source, root)
        if maker is not None:  # a student that starts from the teacher's encoder
            return _model_config(maker.model, maker.root).vision_config
    return encoder_config(source, read_config(source))


def _text_config(source: str) -> Any:
    if source in PUBLISHED:
        return Qwen2Config(**({"vocab_size": 151_936, "tie_word_embeddings": True} | PUBLISHED[source]))
    return read_config(source)
