"""Runs a recipe's stages in order, each starting from the one before.

A stage is resumed where it was stopped, and is saved as a standard checkpoint folder only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .arguments import training_arguments
from .conversations import ConversationDataset, collator, read_records
from .progress import LOG_NAME
from .recipe import Recipe, StageRecipe
from .stage_models import stage_distillation, stage_objective, stage_student
from .trainer import ADAPTERS_NAME, DistillationTrainer
from .vlm import Vlm, train_only

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
        teacher = recipe.teacher if stage_objective(stage).needs_teacher else None
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
    student = stage_student(recipe, before)
    train_only(student.model, stage.train)
    module = stage_distillation(recipe, stage, student)
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
