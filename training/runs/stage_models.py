"""What a stage trains: its student, its objective, and the teacher that goes with them."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers.integrations.liger import apply_liger_kernel

from ..models.chat_templates import difference
from ..models.distillation import Distillation
from ..models.switch import check_tokenizers
from ..models.vlm import Vlm, build_vlm, load_vlm
from ..objectives import Objective, build_objective
from ..process.terminal import say
from ..recipe.arguments import deepspeed_config, zero_stage
from ..recipe.recipe import Recipe, RecipeError, StageRecipe, TeacherRecipe


def stage_student(recipe: Recipe, stage: StageRecipe, before: Path | None) -> Vlm:
    """The model that a stage starts from: the one of the stage `before`, else the recipe's.

    Its weights are float32, and the stage computes in bfloat16 under autocast; but DeepSpeed casts them at once and
    keeps a float32 copy of its own, so that for it they are loaded in bfloat16. Raises ModelError or RecipeError.
    """
    casts = stage.training.get("bf16") and deepspeed_config(stage.training) is not None
    dtype = torch.bfloat16 if casts else torch.float32
    student = _start(recipe, dtype) if before is None else load_vlm(before, dtype=dtype)
    _choose_attention(student.model, recipe.model.attn_implementation, "model")
    return student


def _start(recipe: Recipe, dtype: torch.dtype) -> Vlm:
    model = recipe.model
    if model.checkpoint is not None:
        return load_vlm(model.checkpoint, dtype=dtype)
    assert model.encoder is not None  # checked by ModelRecipe
    assert model.language_model is not None
    return build_vlm(
        model.encoder,
        model.language_model,
        vision_feature_layer=model.vision_feature_layer,
        drop_first_patch=model.drop_first_patch,
        projector=model.projector,
        projector_grid=model.projector_grid,
        seed=recipe.seed,
        dtype=dtype,
    )


def stage_objective(stage: StageRecipe) -> Objective:
    """The stage's objective with its settings, which StageRecipe has checked."""
    return build_objective(**stage.objective)


def stage_distillation(
    recipe: Recipe, stage: StageRecipe, student: Vlm, announce: Callable[[str], None] = say
) -> Distillation:
    """Student, objective and, if it asks for one, the recipe's teacher; checked to fit. Raises RecipeError.

    Announced is a teacher that was taught another prompt: it is given the student's.
    """
    objective = stage_objective(stage)
    _choose_kernels(student.model, stage)
    if not objective.needs_teacher:
        return Distillation(student.model, None, objective)
    if recipe.teacher is None:
        raise RecipeError(f"stage {stage.name}: {stage.objective['name']} needs a teacher; give teacher: FOLDER")
    teacher = load_teacher(recipe.teacher, stage)
    _choose_kernels(teacher.model, stage)
    try:
        check_tokenizers(student.tokenizer, teacher.tokenizer)
        _check_pixels(student, teacher)
        module = Distillation(student.model, teacher.model, objective)
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: student and teacher do not fit: {error}") from None
    _compare_prompts(student, teacher, lambda said: announce(f"{stage.name}: {said}"))
    return module


def _compare_prompts(student: Vlm, teacher: Vlm, announce: Callable[[str], None]) -> None:
    ours, theirs = (vlm.processor.chat_template for vlm in (student, teacher))
    if not (isinstance(ours, str) and isinstance(theirs, str)):
        return  # a folder without one is refused where conversations are encoded
    found = difference(ours, theirs, student.tokenizer.special_tokens_map)
    if found is not None:
        announce(
            f"the teacher has another prompt than the student, whose prompt it is given: the student's reads "
            f"{found[0]!r} where the teacher's reads {found[1]!r}. It may answer worse than it can; to train with the "
            "teacher's, put its chat_template.jinja into the folder that the student starts from"
        )


def load_teacher(teacher: TeacherRecipe, stage: StageRecipe) -> Vlm:
    """The recipe's teacher, in the stage's precision and held as the recipe says. Raises ModelError or RecipeError."""
    training = stage.training
    dtype = teacher.dtype or ("bfloat16" if training.get("bf16") else "float16" if training.get("fp16") else "float32")
    loading: dict[str, Any] = {}
    if teacher.quantization is not None:
        loading["quantization_config"] = _quantization(teacher, stage, getattr(torch, dtype))
    vlm = load_vlm(teacher.checkpoint, dtype=getattr(torch, dtype), **loading)
    parts: Any = vlm.model.modules()
    for part in parts:
        if hasattr(part, "support_avx512bf16_for_cpu"):
            # bitsandbytes packs 4-bit weights for inference on such CPUs, and then no gradient flows through them.
            part.support_avx512bf16_for_cpu = False
    _choose_attention(vlm.model, teacher.attn_implementation, "teacher")
    return vlm


def _quantization(teacher: TeacherRecipe, stage: StageRecipe, dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"teacher: quantization is {teacher.quantization!r} and bitsandbytes is not installed; install it "
            "(pip install bitsandbytes), or leave quantization out"
        )
    if zero_stage(stage.training) == 3:
        raise RecipeError(
            f"stage {stage.name}: teacher.quantization is {teacher.quantization!r} and ZeRO-3 cannot share out "
            "quantised weights; choose deepspeed: zero2, which leaves them whole, or no quantization"
        )
    return BitsAndBytesConfig(
        load_in_8bit=teacher.quantization == "8bit",
        load_in_4bit=teacher.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        # The language model's layers are where the memory is. Names are matched from their start.
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )


def _choose_attention(model: LlavaForConditionalGeneration, name: str | None, where: str) -> None:
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise RecipeError(
            f"{where}: attn_implementation is {name!r}: {error} Install what it needs (flash_attention_2: pip install "
            "flash-attn, on a CUDA machine), or leave it out for sdpa"
        ) from None


def _choose_kernels(model: LlavaForConditionalGeneration, stage: StageRecipe) -> None:
    """Put Liger's kernels into the language model if the stage asks for them, all but the loss, which is ours."""
    if not stage.training.get("use_liger_kernel"):
        return
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        lack = "there is no CUDA device" if not torch.cuda.is_available() else "liger-kernel is not installed"
        raise RecipeError(
            f"stage {stage.name}: use_liger_kernel is true and {lack}; install it (pip install liger-kernel) on a CUDA "
            "machine, or leave use_liger_kernel out"
        )
    chosen = stage.training.get("liger_kernel_config") or {}
    ours = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    apply_liger_kernel(model.model.language_model, chosen | ours)


def _check_pixels(student: Vlm, teacher: Vlm) -> None:
    """Both are given the student's pixels, so the teacher must have been trained on pictures prepared the same way."""
    ours, theirs = (dataclasses.asdict(vlm.preprocessing) for vlm in (student, teacher))
    for name, value in ours.items():
        if value != theirs[name]:
            raise ValueError(
                f"pictures are prepared with {name} {value} for the student and {theirs[name]} for the teacher, and "
                "both are given the same pixels; choose encoders of one family"
            )
