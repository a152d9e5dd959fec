"""Runs a recipe's stages in order, each starting from the one before.

A stage is resumed where it was stopped, and is saved as a standard checkpoint folder only when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .conversations import ConversationDataset, collator, read_records
from .distillation import Distillation
from .objectives import Objective, build_objective
from .recipe import Recipe, RecipeError, StageRecipe, check_keys, find_recipe
from .switch import check_tokenizers
from .trainer import ADAPTERS_NAME, LOG_NAME, DistillationTrainer
from .vlm import Vlm, build_vlm, load_vlm, train_only

STAGE_FILE = "stage.json"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class StageResult:
    """A finished stage's folder, how long it trained, and whether it was found finished."""

    name: str
    folder: Path
    seconds: float
    reused: bool


def run_recipe(recipe: Recipe, *, announce: Callable[[str], None] = lambda _: None) -> list[StageResult]:
    """Run every stage that is not finished yet; finished ones are reused if made by the same recipe.

    Raises RecipeError, ModelError or DataError where the recipe cannot be run.
    """
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    results: list[StageResult] = []
    plain = recipe.to_dict()
    history = _digest([plain["model"], recipe.seed])
    for number, stage in enumerate(recipe.stages):
        # The teacher counts only where it teaches: arms that differ later share their first stages.
        teacher = recipe.teacher if _objective(stage).needs_teacher else None
        history = _digest([history, plain["stages"][number], teacher])
        folder = output / stage.name
        seconds = _finished(folder, history)
        reused = seconds is not None
        if seconds is None:
            announce(f"{stage.name}: {stage.objective['name']}, training {', '.join(stage.train)}")
            before = results[-1].folder if results else None
            seconds = run_stage(recipe, stage, before, folder, history)
        results.append(StageResult(stage.name, folder, seconds, reused))
    return results


def run_stage(recipe: Recipe, stage: StageRecipe, before: Path | None, folder: Path, fingerprint: str) -> float:
    """Train one stage and save its model under `folder`; returns the seconds it took, all attempts together."""
    set_seed(recipe.seed)
    student = _student(recipe, before)
    train_only(student.model, stage.train)
    module = _distillation(recipe, stage, student)
    work = folder.parent / f".{stage.name}.checkpoints"
    if _read(work / STAGE_FILE).get("fingerprint") != fingerprint:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / STAGE_FILE).write_text(json.dumps({"fingerprint": fingerprint}))
    trainer = DistillationTrainer(
        module,
        student,
        title=f"{folder.parent.name}/{stage.name}",
        args=training_arguments(stage, work, recipe.seed),
        train_dataset=_dataset(stage, student),
        data_collator=collator(student.tokenizer.pad_token_id or 0),
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    seconds = _seconds(work)
    _save(trainer, recipe, folder, {"fingerprint": fingerprint, "seconds": seconds, "steps": trainer.state.global_step})
    shutil.rmtree(work)
    return seconds


def training_arguments(stage: StageRecipe, work: Path, seed: int) -> TrainingArguments:
    """The stage's `transformers.TrainingArguments`; keys of `training:` are its names. Raises RecipeError."""
    try:
        return plain_arguments(stage.training | {"seed": seed}, work)
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: training: {error}") from None


def plain_arguments(training: dict[str, Any], work: Path) -> TrainingArguments:
    """`transformers.TrainingArguments` from their names, with what every run here shares. Raises ValueError."""
    check_keys(training, list(TrainingArguments.__dataclass_fields__), "training")
    shared: dict[str, Any] = {
        "output_dir": str(work),
        "remove_unused_columns": False,  # the collator takes samples, not columns
        "disable_tqdm": True,  # our own bar
        "save_total_limit": 2,
        "report_to": "none",
        # Memory pinning is for a GPU, and warns without one.
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    given = dict(training)
    if isinstance(given.get("deepspeed"), str) and not Path(given["deepspeed"]).is_file():
        given["deepspeed"] = yaml.safe_load(find_recipe(f"deepspeed/{given['deepspeed']}").read_text(encoding="utf-8"))
    return TrainingArguments(**(shared | given))


def _student(recipe: Recipe, before: Path | None) -> Vlm:
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


def _objective(stage: StageRecipe) -> Objective:
    try:
        return build_objective(**stage.objective)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"stage {stage.name}: objective: {error}") from None


def _distillation(recipe: Recipe, stage: StageRecipe, student: Vlm) -> Distillation:
    objective = _objective(stage)
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


def _dataset(stage: StageRecipe, student: Vlm) -> ConversationDataset:
    records: list[dict[str, Any]] = []
    for path in stage.data.records:
        records += read_records(Path(path))
    return ConversationDataset(records, Path(stage.data.pictures or "."), *student.inputs(stage.data.max_length))


def _save(trainer: DistillationTrainer, recipe: Recipe, folder: Path, stage: dict[str, Any]) -> None:
    """Write beside, then rename: the final name exists only when everything under it does."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.save_model(str(partial))
    if not trainer.is_world_process_zero():
        return
    (partial / ADAPTERS_NAME).unlink(missing_ok=True)  # of no use without the teacher
    log = Path(str(trainer.args.output_dir)) / LOG_NAME
    if log.is_file():
        shutil.copy(log, partial / LOG_NAME)
    (partial / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    (partial / STAGE_FILE).write_text(json.dumps(stage, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _finished(folder: Path, fingerprint: str) -> float | None:
    stage = _read(folder / STAGE_FILE)
    return float(stage["seconds"]) if stage.get("fingerprint") == fingerprint else None


def _last_checkpoint(work: Path) -> str | None:
    """The newest complete checkpoint; the Trainer writes its state last, so one without it was cut off and goes."""
    for checkpoint in sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)
        else:
            return str(checkpoint)
    return None


def _seconds(work: Path) -> float:
    """Seconds of training over all attempts, each from its beginning to its last log."""
    total, began, last = 0.0, 0.0, 0.0
    for line in (work / LOG_NAME).read_text().splitlines():
        row = json.loads(line)
        if "began" in row:
            total += last - began
            began = row["time"]
        last = row["time"]
    return total + last - began


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
