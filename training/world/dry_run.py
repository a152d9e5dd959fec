"""Shrinks a recipe to what runs anywhere in seconds: the same classes and stages, tiny random models and data.

A dry run proves that a recipe is complete and that its stages fit together, before a GPU is paid for.
Sizes, hardware settings (DeepSpeed, bf16, attention kernels) and data are replaced, and nothing else.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ..models.vlm import build_vlm
from ..recipe.recipe import DataRecipe, ModelRecipe, Recipe, StageRecipe, TeacherRecipe
from .dataset import WorldSettings, write_world
from .encoder_pretraining import write_image_processor
from .scenes import PICTURE_SIDE
from .vocabulary import train_tokenizer, world_texts

STEPS = 2
PATCHES = 3  # of the tiny encoders, on a side
ENCODER_WIDTH = 32
# What only makes sense on the machine and the data that the recipe is for.
_FULL_SIZE_ONLY = ("deepspeed", "bf16", "fp16", "tf32", "optim", "use_liger_kernel", "gradient_accumulation_steps")


def shrink(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with tiny random models and a tiny picture world under `folder`, two steps a stage."""
    world = write_world(folder / "world", WorldSettings(train_pictures=16, validation_questions=7, test_questions=7))
    model = _tiny_model(recipe.model, folder / "student", width=32)
    teacher = None
    if recipe.teacher is not None:
        # A teacher is wider than its student in the language model, and in the encoder where the recipe bridges that.
        adapts = any(stage.objective.get("encoder_adapter") for stage in recipe.stages)
        parts = _tiny_model(
            ModelRecipe(**_parts(recipe), drop_first_patch=recipe.model.drop_first_patch),
            folder / "teacher-parts",
            width=64,
            encoder_width=48 if adapts else ENCODER_WIDTH,
        )
        assert parts.encoder is not None
        assert parts.language_model is not None
        vlm = build_vlm(parts.encoder, parts.language_model, drop_first_patch=parts.drop_first_patch)
        vlm.save(folder / "teacher")
        teacher = TeacherRecipe(str(folder / "teacher"))
        # A student that starts from the teacher's encoder still does.
        if recipe.model.encoder == recipe.teacher.checkpoint:
            model = dataclasses.replace(model, encoder=teacher.checkpoint)
    stages = tuple(_tiny_stage(stage, world) for stage in recipe.stages)
    return dataclasses.replace(recipe, output=str(folder / "output"), model=model, teacher=teacher, stages=stages)


def _parts(recipe: Recipe) -> dict[str, Any]:
    return {
        "encoder": recipe.model.encoder or "siglip",
        "language_model": recipe.model.language_model or "qwen2",
    }


def _tiny_model(model: ModelRecipe, folder: Path, width: int, encoder_width: int = ENCODER_WIDTH) -> ModelRecipe:
    encoder = _tiny_encoder(str(model.encoder or model.checkpoint).lower(), encoder_width)
    encoder.save_pretrained(folder / "encoder")
    write_image_processor(folder / "encoder")
    tokenizer = train_tokenizer(world_texts(random.Random(0), 50))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    return dataclasses.replace(
        model,
        checkpoint=None,
        attn_implementation=None,
        encoder=str(folder / "encoder"),
        language_model=str(folder / "language_model"),
        # Smaller than the encoder's grid, so that it pools, and no divisor of it, as 12 is none of SigLIP's 27.
        projector_grid=min(model.projector_grid, PATCHES - 1),
    )


def _tiny_encoder(name: str, width: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": PICTURE_SIDE,
        "patch_size": PICTURE_SIDE // PATCHES,
    }
    torch.manual_seed(0)
    if "clip" in name and "siglip" not in name:
        return CLIPVisionModel(CLIPVisionConfig(**sizes))
    return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))


def _tiny_stage(stage: StageRecipe, world: Path) -> StageRecipe:
    training = {key: value for key, value in stage.training.items() if key not in _FULL_SIZE_ONLY}
    training |= {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    data = DataRecipe(records=[str(world / "train.json")], pictures=str(world / "pictures"))
    return dataclasses.replace(stage, data=data, global_batch=None, training=training)
