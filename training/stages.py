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

import yaml
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from .arguments import training_arguments
from .checkpoints import MAKE_ROOM, newest, room_for, sync, sync_tree, write_atomically, writing
from .conversations import collator
from .model_card import RECIPE_FILE, STAGE_FILE, publishable, stage_facts, write_card
from .progress import LOG_NAME, read_log
from .recipe import DATA_CHECK, LOGS, Recipe, StageRecipe
from .stage_data import LostSamples, stage_dataset
from .stage_models import stage_distillation, stage_objective, stage_student
from .stopping import Stopped, StopRequest
from .trainer import ADAPTERS_NAME, DistillationTrainer
from .vlm import train_only


@dataclass(frozen=True)
class StageResult:
    """A finished stage's folder, how long it trained, and whether it was found finished."""

    name: str
    folder: Path
    seconds: float
    reused: bool


def run_recipe(recipe: Recipe, *, announce: Callable[[str], None] = lambda _: None) -> list[StageResult]:
    """Run every stage that is not finished yet; finished ones are reused if made by the same recipe.

    Raises RecipeError, ModelError or DataError where the recipe cannot be run, NonFiniteError or CheckpointError where
    it cannot go on, and Stopped after SIGTERM or Ctrl-C, with the step in progress saved.
    """
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    results: list[StageResult] = []
    with StopRequest() as stop:
        for stage, history in zip(recipe.stages, fingerprints(recipe), strict=True):
            folder = output / stage.name
            seconds = _finished(folder, history)
            reused = seconds is not None
            if seconds is None:
                announce(f"{stage.name}: {stage.objective['name']}, training {', '.join(stage.train)}")
                before = results[-1].folder if results else None
                seconds = run_stage(recipe, stage, before, folder, history, stop=stop, announce=announce)
                stop.check()  # a request in the stage's last step has waited for the stage
            shutil.rmtree(_work(folder), ignore_errors=True)
            results.append(StageResult(stage.name, folder, seconds, reused))
    return results


def finished_stages(recipe: Recipe) -> list[StageResult]:
    """What run_recipe would find finished, from the first stage on."""
    results: list[StageResult] = []
    for stage, history in zip(recipe.stages, fingerprints(recipe), strict=True):
        folder = Path(recipe.output) / stage.name
        seconds = _finished(folder, history)
        if seconds is None:
            break
        results.append(StageResult(stage.name, folder, seconds, reused=True))
    return results


def fingerprints(recipe: Recipe) -> list[str]:
    """What makes each stage's model what it is, as a hash: start, seed, and every stage up to its own."""
    plain = recipe.to_dict()
    histories = [_digest([plain["model"], recipe.seed])]
    for stage, values in zip(recipe.stages, plain["stages"], strict=True):
        # The teacher counts only where it teaches: arms that differ later share their first stages.
        teacher = plain["teacher"] if stage_objective(stage).needs_teacher else None
        histories.append(_digest([histories[-1], values, teacher]))
    return histories[1:]


def run_stage(
    recipe: Recipe,
    stage: StageRecipe,
    before: Path | None,
    folder: Path,
    fingerprint: str,
    *,
    stop: StopRequest,
    announce: Callable[[str], None],
) -> float:
    """Train one stage and save its model under `folder`; returns the seconds it took, all attempts together."""
    work = _work(folder)
    arguments = training_arguments(stage, work, recipe.seed)  # first: this meets the other ranks and takes the device
    set_seed(recipe.seed)
    student = stage_student(recipe, stage, before)
    train_only(student.model, stage.train)
    module = stage_distillation(recipe, stage, student)
    dataset = stage_dataset(stage, *student.inputs(stage.data.max_length), folder.parent / DATA_CHECK, announce)
    trainer = DistillationTrainer(
        module,
        student,
        title=stage.name,
        logs=folder.parent / LOGS / stage.name,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator(student.tokenizer.pad_token_id or 0),
        callbacks=[LostSamples(dataset, announce)],
        stop=stop,
        announce=announce,
    )
    checkpoint = _open(trainer, work, fingerprint, announce)
    with stop.held(), room_for(folder):
        trainer.train(resume_from_checkpoint=checkpoint)
        step, last = trainer.state.global_step, trainer.state.max_steps
        if trainer.stopped:
            raise Stopped(f"{stage.name}: stopped, step {step} of {last} is saved; run the same command to go on")
        seconds = _seconds(work)
        with writing(folder, MAKE_ROOM):
            facts = stage_facts(recipe, stage, module, trainer.args, len(dataset)) | dataset.left_out()
            kept = {"fingerprint": fingerprint, "seconds": seconds, "steps": step, "facts": facts}
            _save(trainer, recipe, folder, kept)
    return seconds


def _open(trainer: DistillationTrainer, work: Path, fingerprint: str, announce: Callable[[str], None]) -> str | None:
    """The checkpoint to go on from, found by one rank for all; what another recipe left in `work` goes."""
    found: list[str | None] = [None]
    if trainer.is_world_process_zero():
        if _read(work / STAGE_FILE).get("fingerprint") != fingerprint:
            if (work / STAGE_FILE).exists():
                announce(f"{work} is of another recipe than this one; the stage starts anew")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True, exist_ok=True)
            write_atomically(work / STAGE_FILE, json.dumps({"fingerprint": fingerprint}))
        checkpoint = newest(work, announce)
        found = [str(checkpoint) if checkpoint is not None else None]
    return broadcast_object_list(found)[0]  # type: ignore[no-any-return]


def _work(folder: Path) -> Path:
    """Where a stage's checkpoints are until it is finished."""
    return folder.with_name(f".{folder.name}.checkpoints")


def _save(trainer: DistillationTrainer, recipe: Recipe, folder: Path, stage: dict[str, Any]) -> None:
    """Write beside, then rename: the final name exists only when everything under it is on the disk."""
    partial = folder.with_name(f".{folder.name}.partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        _finish(trainer, recipe, partial, stage)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(folder.parent)
    trainer.accelerator.wait_for_everyone()  # the next stage starts from the folder


def _finish(trainer: DistillationTrainer, recipe: Recipe, partial: Path, stage: dict[str, Any]) -> None:
    """Put beside a stage's model what tells how it was made, and all of it on the disk."""
    (partial / ADAPTERS_NAME).unlink(missing_ok=True)  # of no use without the teacher
    log = Path(str(trainer.args.output_dir)) / LOG_NAME
    if log.is_file():
        shutil.copy(log, partial / LOG_NAME)
    (partial / RECIPE_FILE).write_text(yaml.safe_dump(publishable(recipe), sort_keys=False), encoding="utf-8")
    (partial / STAGE_FILE).write_text(json.dumps(stage, indent=1) + "\n")
    write_card(partial)
    sync_tree(partial)


def _finished(folder: Path, fingerprint: str) -> float | None:
    stage = _read(folder / STAGE_FILE)
    return float(stage["seconds"]) if stage.get("fingerprint") == fingerprint else None


def _seconds(work: Path) -> float:
    """Seconds of training over all attempts, each from its beginning to its last log."""
    total, began, last = 0.0, 0.0, 0.0
    for row in read_log(work / LOG_NAME):
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
