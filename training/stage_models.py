"""What a stage trains: its student, its objective, and the teacher that goes with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .distillation import Distillation
from .objectives import Objective, build_objective
from .recipe import Recipe, RecipeError, StageRecipe
from .switch import check_tokenizers
from .vlm import Vlm, build_vlm, load_vlm


def stage_student(recipe: Recipe, before: Path | None) -> Vlm:
    """The model that a stage starts from: the one of the stage `before`, else the recipe's. Raises ModelError."""
    if before is not None:
        return load_vlm(before)
    model = recipe.model
    if model.checkpoint is not None:
        return load_vlm(model.checkpoint)
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
    )


def stage_objective(stage: StageRecipe) -> Objective:
    """The stage's objective with its settings. Raises RecipeError."""
    try:
        return build_objective(**stage.objective)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"stage {stage.name}: objective: {error}") from None


def stage_distillation(recipe: Recipe, stage: StageRecipe, student: Vlm) -> Distillation:
    """Student, objective and, if it asks for one, the recipe's teacher; checked to fit. Raises RecipeError."""
    objective = stage_objective(stage)
    if not objective.needs_teacher:
        return Distillation(student.model, None, objective)
    if recipe.teacher is None:
        raise RecipeError(f"stage {stage.name}: {stage.objective['name']} needs a teacher; give teacher: FOLDER")
    teacher = load_vlm(recipe.teacher)
    try:
        check_tokenizers(student.tokenizer, teacher.tokenizer)
        _check_pixels(student, teacher)
        return Distillation(student.model, teacher.model, objective)
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: student and teacher do not fit: {error}") from None


def _check_pixels(student: Vlm, teacher: Vlm) -> None:
    """Both are given the student's pixels, so the teacher must have been trained on pictures prepared the same way."""
    ours, theirs = (dataclasses.asdict(vlm.inputs()[1]) for vlm in (student, teacher))
    for name, value in ours.items():
        if value != theirs[name]:
            raise ValueError(
                f"pictures are prepared with {name} {value} for the student and {theirs[name]} for the teacher, and "
                "both are given the same pixels; choose encoders of one family"
            )
