"""Runs a recipe's stages in order, each starting from the one before.

A stage is resumed where it was stopped, and is saved as a standard checkpoint folder only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.dataset import collator
from ..data.label_mask import model_inputs
from ..data.sampler import step_batch
from ..data.stage_data import LostSamples, on_one_rank, stage_dataset
from ..models.vlm import train_only
from ..process.stopping import Stopped, StopRequest
from ..recipe.arguments import idle_gpus, training_arguments
from ..recipe.recipe import DATA_CHECK, LOGS, Recipe, RecipeError, StageRecipe
from .checkpoints import MAKE_ROOM, newest, room_for, sync, sync_tree, write_atomically, writing
from .model_card import RECIPE_FILE, STAGE_FILE, publishable, stage_facts, write_card
from .progress import LOG_NAME, read_log
from .saving_trainer import ADAPTERS_NAME
from .stage_identity import differences, held, identity, stage_contents
from .stage_models import stage_distillation, stage_student
from .trainer import DistillationTrainer


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
    it cannot go on, and Stopped after SIGTERM or Ctrl-C, with the step in progress saved. What another recipe has made
    is never removed: RecipeError names what differs, before any work.
    """
    output = Path(recipe.output)
    with writing(output, "choose another output"):
        output.mkdir(parents=True, exist_ok=True)
    results: list[StageResult] = []
    note = idle_gpus()
    with StopRequest() as stop:
        check_kept(recipe, announce)
        for stage in recipe.stages:
            folder = output / stage.name
            seconds = _finished(folder)
            reused = seconds is not None
            if seconds is None:
                if note is not None:
                    announce(note)
                    note = None
                announce(f"{stage.name}: {stage.objective['name']}, training {', '.join(stage.train)}")
                before = results[-1].folder if results else None
                seconds = run_stage(recipe, stage, before, folder, stop=stop, announce=announce)
                stop.check()  # a request in the stage's last step has waited for the stage
            shutil.rmtree(_work(folder), ignore_errors=True)
            results.append(StageResult(stage.name, folder, seconds, reused))
    return results


def finished_stages(recipe: Recipe) -> list[StageResult]:
    """What run_recipe would find finished, from the first stage on."""
    results: list[StageResult] = []
    for stage in recipe.stages:
        folder = Path(recipe.output) / stage.name
        seconds = _finished(folder)
        if seconds is None or _of_another(recipe, stage, folder, lambda _: None):
            break
        results.append(StageResult(stage.name, folder, seconds, reused=True))
    return results


def _holds_something(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def check_kept(recipe: Recipe, announce: Callable[[str], None] = lambda _: None) -> None:
    """Refuse to touch finished or begun stages that another recipe, or other files, have made. Raises RecipeError."""
    found = []
    for stage in recipe.stages:
        folder = Path(recipe.output) / stage.name
        # What is left of the checkpoints of a finished stage is of no use any more.
        kept = folder if _holds_something(folder) else _work(folder)
        found += [f"{kept} {reason}" for reason in _of_another(recipe, stage, kept, announce)]
    if found:
        raise RecipeError(
            f"{'; '.join(found)}. Nothing was touched: put the old values back, choose another folder (output=FOLDER), "
            "or remove what is to be trained anew yourself"
        )


def _of_another(recipe: Recipe, stage: StageRecipe, kept: Path, announce: Callable[[str], None]) -> list[str]:
    """What forbids to take the folder for this stage's, finished or begun; nothing where there is none."""
    facts = _read(kept / STAGE_FILE)
    begun = kept == _work(kept.with_name(stage.name))
    if not facts:
        alien = any(kept.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) if begun else _holds_something(kept)
        return [f"is there and no stage of switchkd's ({STAGE_FILE} is missing or damaged)"] if alien else []
    reasons = differences(facts, recipe, stage, announce)
    if begun:
        now, was = held(stage), facts.get("held", {})
        reasons += [f"{key} was {was[key]} and is {now.get(key)}" for key in was if was[key] != now.get(key)]
    if "values" not in facts and not reasons:
        announce(f"{kept} is of an older version, which kept nothing to tell whether data and models are the same")
    state = "is begun" if begun else "is finished"
    return [f"{state}, and not by this recipe: {', '.join(reasons)}"] if reasons else []


def run_stage(
    recipe: Recipe,
    stage: StageRecipe,
    before: Path | None,
    folder: Path,
    *,
    stop: StopRequest,
    announce: Callable[[str], None],
) -> float:
    """Train one stage and save its model under `folder`; returns the seconds it took, all attempts together."""
    work = _work(folder)
    arguments = training_arguments(stage, work, recipe.seed)  # first: this meets the other ranks and takes the device
    kept = on_one_rank(lambda: identity(recipe, stage, stage_contents(recipe, stage, announce)))
    set_seed(recipe.seed)
    student = stage_student(recipe, stage, before)
    train_only(student.model, stage.train)
    module = stage_distillation(recipe, stage, student, announce)
    dataset = stage_dataset(stage, *model_inputs(student, stage.data.max_length), folder.parent / DATA_CHECK, announce)
    _check_whole_steps(stage, arguments, len(dataset))
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
    checkpoint = _open(trainer, work, kept | {"held": held(stage)}, announce)
    with stop.held(), room_for(folder):
        trainer.train(resume_from_checkpoint=checkpoint)
        step, last = trainer.state.global_step, trainer.state.max_steps
        if trainer.stopped:
            raise Stopped(f"{stage.name}: stopped, step {step} of {last} is saved; run the same command to go on")
        seconds = _seconds(work)
        with writing(folder, MAKE_ROOM):
            facts = stage_facts(recipe, stage, module, trainer.args, len(dataset)) | dataset.left_out()
            _save(trainer, recipe, folder, {"seconds": seconds, "steps": step, "facts": facts} | kept)
    return seconds


def _check_whole_steps(stage: StageRecipe, arguments: TrainingArguments, records: int) -> None:
    if arguments.dataloader_drop_last and records < step_batch(arguments):
        raise RecipeError(
            f"stage {stage.name}: dataloader_drop_last is true, and {records} records are fewer than the "
            f"{step_batch(arguments)} of a step, so that no step is left; leave it out, or choose a smaller batch"
        )


def _open(
    trainer: DistillationTrainer, work: Path, kept: dict[str, Any], announce: Callable[[str], None]
) -> str | None:
    """The checkpoint to go on from, found by one rank for all; what is `kept` of the stage is written beside it."""
    found: list[str | None] = [None]
    if trainer.is_world_process_zero():
        if "values" not in _read(work / STAGE_FILE):
            work.mkdir(parents=True, exist_ok=True)
            write_atomically(work / STAGE_FILE, json.dumps(kept, indent=1) + "\n")
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


def _finished(folder: Path) -> float | None:
    """The seconds that a finished stage took, None where there is none."""
    stage = _read(folder / STAGE_FILE)
    return float(stage["seconds"]) if stage else None


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
    """What is kept beside a stage; nothing where there is no such file, or a damaged one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and "fingerprint" in kept else {}
