"""What makes a stage's model what it is: the values of its recipe that count, and the content of the files it reads.

Both are kept beside a stage's checkpoints and its model. Whoever comes with a recipe is told what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Callable
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import TrainingArguments

from ..data.conversations import DataError
from ..objectives import build_objective
from ..process.terminal import speaks
from ..recipe.arguments import zero_stage
from ..recipe.recipe import ACCUMULATION, DATA_CHECK, DataRecipe, ModelRecipe, Recipe, StageRecipe, TeacherRecipe
from ..recipe.trainer_keys import MICRO_BATCH, MODEL_KEYS
from ..recipe.values import typed
from .checkpoints import write_atomically
from .digest_memory import DigestMemory
from .model_card import without_places
from .stage_models import stage_objective

DIGESTS = "digests.json"  # beside what was found in the data
LARGE = 2**31  # bytes; reading more than that takes a while, and is announced

Values = dict[str, Any]
Contents = dict[str, list[dict[str, Any]]]

# Fields of a recipe's parts that do not count: the kernels of a model, and how many broken records are let pass.
_NEUTRAL = {ModelRecipe: {"attn_implementation"}, TeacherRecipe: {"attn_implementation"}, DataRecipe: {"max_broken"}}
# A model is its weights, and what turns text and pictures into its input.
_OF_A_MODEL = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json"),
)


def stage_values(recipe: Recipe, last: StageRecipe) -> Values:
    """All that counts for a stage's model, by the key that sets it: start, seed, and every stage up to its own."""
    stages = recipe.stages[: recipe.stages.index(last) + 1]
    values = {"seed": recipe.seed, "stages": [stage.name for stage in stages]} | _fields("model", recipe.model)
    if any(stage_objective(stage).needs_teacher for stage in stages):
        # The teacher counts only where it teaches: arms that differ later share their first stages.
        values |= _fields("teacher", recipe.teacher)
    for stage in stages:
        key = f"stages.{stage.name}"
        values[f"{key}.train"] = list(stage.train)
        values[f"{key}.objective.name"] = stage.objective["name"]
        values |= _fields(f"{key}.objective", stage_objective(stage))
        values |= _fields(f"{key}.data", stage.data)
        values |= {f"{key}.{name}": value for name, value in _batch(stage).items()}
        values |= {f"{key}.training.{name}": value for name, value in _training(stage.training).items()}
    return {key: _plain(value) for key, value in values.items()}


def fingerprints(recipe: Recipe) -> list[str]:
    """A hash of each stage's values: two recipes that give one make the same model of the same files."""
    return [_digest(stage_values(recipe, stage)) for stage in recipe.stages]


def stage_contents(recipe: Recipe, last: StageRecipe, announce: Callable[[str], None]) -> Contents:
    """Name, bytes, time and SHA-256 of every file that a stage's model is made from, by the key that names it.

    Pictures are not among them. What is not on this machine has none. Raises DataError for a file that cannot be read.
    """
    kept = Path(recipe.output) / DATA_CHECK / DIGESTS
    memory = DigestMemory(kept)
    before, contents = memory.text(), {}
    for key, files in _sources(recipe, last).items():
        contents[key] = [_described(path, memory, key, announce) for path in files]
    if memory.text() != before and speaks():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, memory.text())
    return contents


def identity(recipe: Recipe, stage: StageRecipe, contents: Contents) -> dict[str, Any]:
    """What is kept beside a stage to know it again; it may be published with the model."""
    values = stage_values(recipe, stage)
    return {"fingerprint": _digest(values), "values": _known_again(values, recipe), "contents": contents}


def held(stage: StageRecipe) -> dict[str, Any]:
    """What a stage that is begun has to be ended with: its checkpoints are of this form. Raises RecipeError."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    training = stage.training_on(processes)
    zero = zero_stage(training)
    batch = _of(training, MICRO_BATCH) * _of(training, ACCUMULATION) * processes
    return {"samples of a step": batch, "ZeRO stage": zero} | ({"processes": processes} if zero else {})


def differences(kept: dict[str, Any], recipe: Recipe, stage: StageRecipe, announce: Callable[[str], None]) -> list[str]:
    """How what is `kept` beside a stage differs from what the recipe would make now, each with both values.

    What an older version has kept without values is known by its fingerprint alone. Raises DataError.
    """
    values = stage_values(recipe, stage)
    if "values" not in kept:
        if kept.get("fingerprint") in (_digest(values), _old_fingerprint(recipe, stage)):
            return []
        return ["an older version of switchkd made it and kept no values to name what differs (recipe.yaml has them)"]
    of_files, same = _different_files(kept.get("contents", {}), recipe, stage, announce)
    if kept["fingerprint"] == _digest(values):
        return of_files
    now, defaults = _known_again(values, recipe), _defaults(recipe, stage)
    of_values = []
    for key in dict.fromkeys([*kept["values"], *now]):
        # A key that one of two versions does not have yet is at its default there.
        was, value = kept["values"].get(key, defaults.get(key)), now.get(key, defaults.get(key))
        if was != value and key not in same and not _follows(key, kept["values"], now):
            of_values.append(f"{key} was {_shown(was)} and is {_shown(value)}")
    return of_values + of_files


def _follows(key: str, was: Values, now: Values) -> bool:
    """Whether a difference is said by another one: the settings of another objective, the keys of another stage."""
    stage, _, rest = key.removeprefix("stages.").partition(".")
    if not key.startswith("stages."):
        return False
    name = f"stages.{stage}.objective.name"
    other = rest.startswith("objective.") and key != name and was.get(name) != now.get(name)
    return other or not (stage in was["stages"] and stage in now["stages"])


def _different_files(
    kept: Contents, recipe: Recipe, stage: StageRecipe, announce: Callable[[str], None]
) -> tuple[list[str], set[str]]:
    """What has changed in the files, and the keys whose files are the same, wherever they are now."""
    contents = stage_contents(recipe, stage, announce) if kept else {}
    found, same = [], set()
    for key, was in kept.items():
        now = contents.get(key)
        if not now:
            continue  # it is not here any more, and a finished stage has no need of it
        changed = next((pair for pair in zip_longest(was, now) if _sha(pair[0]) != _sha(pair[1])), None)
        if changed is None:
            same.add(key)
        else:
            found.append(f"{key}: {_file(changed[0])}, and now {_file(changed[1])}")
    return found, same


def _sha(file: dict[str, Any] | None) -> str | None:
    return None if file is None else str(file["sha256"])


def _file(file: dict[str, Any] | None) -> str:
    if file is None:
        return "no such file"
    return f"{file['file']} had {file['bytes']:,} bytes of {file['changed']} with SHA-256 {file['sha256'][:12]}…"


def _described(path: Path, memory: DigestMemory, key: str, announce: Callable[[str], None]) -> dict[str, Any]:
    try:
        facts = path.stat()
        if facts.st_size > LARGE and not memory.knows(path):
            announce(f"{key}: {path} is read once, to know it again")
        digest = memory.sha256(path)
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read ({error.strerror}); see to it, then run again") from None
    changed = datetime.fromtimestamp(facts.st_mtime).astimezone().isoformat(" ", "seconds")
    return {"file": path.name, "bytes": facts.st_size, "changed": changed, "sha256": digest}


def _sources(recipe: Recipe, last: StageRecipe) -> dict[str, list[Path]]:
    """The files that are on this machine, by the key that names them or their folder."""
    values = stage_values(recipe, last)
    models = ("model.checkpoint", "model.encoder", "model.language_model", "teacher.checkpoint")
    sources = {key: _model_files(values[key]) for key in models if values.get(key) is not None}
    for key in values:
        if key.endswith(".data.records"):
            sources[key] = [Path(path) for path in values[key]]
    return {key: files for key, files in sources.items() if files and all(path.is_file() for path in files)}


def _model_files(name: str) -> list[Path]:
    folder = Path(name)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name that a hub has
            return []
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    return [*sorted(folder.glob("*.safetensors")), *(folder / one for one in _OF_A_MODEL if (folder / one).is_file())]


def _fields(key: str, part: Any) -> Values:
    """A part's fields that count, by their keys."""
    neutral = _NEUTRAL.get(type(part), set())
    return {
        f"{key}.{field.name}": getattr(part, field.name)
        for field in dataclasses.fields(part)
        if field.name not in neutral
    }


def _batch(stage: StageRecipe) -> Values:
    """The batch of a step: a micro-batch and how often it is accumulated count as their product alone."""
    if stage.global_batch is not None:
        return {"global_batch": stage.global_batch}
    return {"batch of a process": _of(stage.training, MICRO_BATCH) * _of(stage.training, ACCUMULATION)}


def _of(training: dict[str, Any], key: str) -> int:
    value = training.get(key)
    return int(getattr(TrainingArguments, key) if value is None else value)


def _training(given: dict[str, Any]) -> Values:
    kinds = typing.get_type_hints(TrainingArguments)
    known = TrainingArguments.__dataclass_fields__
    values = {key: typed(given.get(key, known[key].default), kinds[key], key) for key in MODEL_KEYS if key in known}
    if values["max_steps"] > 0:
        values["num_train_epochs"] = None  # does not count then
    return values


def _defaults(recipe: Recipe, last: StageRecipe) -> Values:
    """What each key of `stage_values` is where nothing is said; keys without a default are left out."""
    parts: dict[str, Any] = {"model": recipe.model, "teacher": recipe.teacher}
    defaults: Values = {}
    for stage in recipe.stages[: recipe.stages.index(last) + 1]:
        key = f"stages.{stage.name}"
        parts |= {f"{key}.data": stage.data, f"{key}.objective": build_objective(stage.objective["name"])}
        defaults |= {f"{key}.training.{name}": value for name, value in _training({}).items()}
    for key, part in parts.items():
        for field in dataclasses.fields(part) if part is not None else ():
            if field.default is not dataclasses.MISSING:
                defaults[f"{key}.{field.name}"] = field.default
    return {key: _plain(value) for key, value in defaults.items()}


def _plain(value: Any) -> Any:
    """As JSON has it: one number has one form."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _known_again(values: Values, recipe: Recipe) -> Values:
    """The values without places of this machine, and the same wherever `root` is."""
    return {key: _below(without_places(value, recipe.root)) for key, value in values.items()}


def _below(value: Any) -> Any:
    if isinstance(value, list):
        return [_below(item) for item in value]
    return value.removeprefix("{root}/") if isinstance(value, str) else value


def _shown(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Keys of `data` when the fingerprint was all that was kept.
_OLD_DATA = (
    *("records", "pictures", "max_length", "check", "max_broken", "max_pixels"),
    *("min_side", "max_aspect", "follow_links"),
)


def _old_fingerprint(recipe: Recipe, last: StageRecipe) -> str:
    """A stage's fingerprint of the versions that kept no values: of everything in the recipe, as it was written."""
    plain = recipe.to_dict()
    history = _digest([plain["model"], recipe.seed])
    for stage, values in zip(recipe.stages, plain["stages"], strict=True):
        values["data"] = {key: values["data"][key] for key in _OLD_DATA}
        history = _digest([history, values, plain["teacher"] if stage_objective(stage).needs_teacher else None])
        if stage is last:
            break
    return history
