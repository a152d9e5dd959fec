"""A run as data: the student, the teacher, and stages with objective, data and training arguments; YAML in and out."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self, get_type_hints

import yaml
from transformers import TrainingArguments

from switchkd.export.llava.projectors import GRID, LDPV2, MLP, PROJECTORS

from ..models.vlm import PARTS
from ..objectives import OBJECTIVES, build_objective
from .trainer_keys import ACCUMULATION as ACCUMULATION
from .trainer_keys import MICRO_BATCH, check_training
from .values import RecipeError as RecipeError
from .values import check_keys as check_keys
from .values import expanded, takes_null, typed_fields

DTYPES = ("bfloat16", "float16", "float32")
QUANTIZATIONS = ("8bit", "4bit")
CHECKS = ("full", "headers")  # of the pictures, before training
DATA_CHECK = "data-check"  # beside the stages' folders: what was found in the data
LOGS = "logs"  # beside the stages' folders: what TensorBoard reads


@dataclass(frozen=True)
class ModelRecipe:
    """Where a model comes from: a whole checkpoint (`checkpoint`), or an encoder and a language model.

    Each is a folder or a hub id. The rest applies when it is put together: `vision_feature_layer`, `drop_first_patch`,
    and `projector`, LLaVA's "mlp" or "ldpv2", which pools the visual tokens to `projector_grid` on a side.
    `attn_implementation` is transformers' name of the attention kernels: "sdpa" (also null), "flash_attention_2", …
    """

    checkpoint: str | None = None
    encoder: str | None = None
    language_model: str | None = None
    vision_feature_layer: int = -2
    drop_first_patch: bool = False
    projector: str = MLP
    projector_grid: int = GRID
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        _expand(self, "model", "checkpoint", "encoder", "language_model")
        pair = self.encoder is not None and self.language_model is not None
        if (self.checkpoint is not None) == pair:
            raise RecipeError(
                f"model: checkpoint is {self.checkpoint!r}, encoder {self.encoder!r}, language_model "
                f"{self.language_model!r}; give either a checkpoint, or an encoder and a language model"
            )
        if self.projector not in PROJECTORS:
            near = difflib.get_close_matches(str(self.projector), PROJECTORS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known projectors: {', '.join(PROJECTORS)}"
            raise RecipeError(f"model: unknown projector {self.projector!r}; {hint}")
        if self.checkpoint is not None and self.projector != MLP:
            raise RecipeError(
                f"model: projector is {self.projector!r} and checkpoint {self.checkpoint!r}, which brings a projector "
                "of its own; leave projector out, or give an encoder and a language model"
            )
        if not isinstance(self.projector_grid, int) or self.projector_grid < 1:
            raise RecipeError(
                f"model: projector_grid is {self.projector_grid!r}, expected 1 or more: {LDPV2} pools the visual "
                f"tokens to that many on a side; {GRID} is MobileVLM V2's"
            )


@dataclass(frozen=True)
class TeacherRecipe:
    """The frozen teacher, a LLaVA folder or hub id, and how it is held. A recipe may give the name alone.

    `dtype` is one of DTYPES (null: bfloat16 where the stage trains in it, else float32: a copy in float32 is of no use
    to a model that never moves). `quantization`, "8bit" or "4bit" (NF4), holds its language model in bitsandbytes'
    weights; the gradient of the switch pass still flows through them.
    """

    checkpoint: str
    dtype: str | None = None
    quantization: str | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        _expand(self, "teacher", "checkpoint")
        for name, known in (("dtype", DTYPES), ("quantization", QUANTIZATIONS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise RecipeError(f"teacher: {name} is {value!r}, expected one of {', '.join(known)}, or null")

    @classmethod
    def from_plain(cls, given: Any) -> Self | None:
        """From a recipe's value: a checkpoint's name, or keys and values, or null. Raises RecipeError."""
        if given is None or isinstance(given, cls):
            return given
        teacher: Self = build(cls, {"checkpoint": given} if isinstance(given, str) else given, "teacher")
        return teacher

    def to_plain(self) -> str | dict[str, Any]:
        """As a recipe gives it: the name alone where there is nothing else to say."""
        return self.checkpoint if self == type(self)(self.checkpoint) else dataclasses.asdict(self)


@dataclass(frozen=True)
class DataRecipe:
    """LLaVA-format records (JSON or JSONL files), the folder their pictures are in, and what counts as broken.

    Before the first step every record is checked; broken ones are left out, and above the share `max_broken` the run
    stops. `check` "full" decodes every picture; "headers" reads the beginning and the end of JPEG and PNG files, and so
    misses damage in between. A picture is broken with more than `max_pixels` (25 million are 75 MB in each worker, and
    170 times what a model of 384 pixels sees), with a side below `min_side` (placeholders for missing pictures), or
    with one side above `max_aspect` times the other. `follow_links` takes pictures that symbolic links lead to outside
    the folder.
    """

    records: list[str]
    pictures: str | None = None
    max_length: int | None = None
    check: str = "full"
    max_broken: float = 0.01
    max_pixels: int = 25_000_000
    min_side: int = 8
    max_aspect: float = 200.0
    follow_links: bool = False

    def __post_init__(self) -> None:
        records = [self.records] if isinstance(self.records, str) else self.records
        object.__setattr__(self, "records", [expanded(path, "data: records") for path in records])
        _expand(self, "data", "pictures")
        if self.check not in CHECKS:
            raise RecipeError(f"data: check is {self.check!r}, expected {' or '.join(CHECKS)}")
        if not 0 <= self.max_broken <= 1:
            raise RecipeError(f"data: max_broken is {self.max_broken!r}, expected a share of 0 to 1; 0.01 is 1 %")
        for name in ("max_pixels", "min_side", "max_aspect", *(("max_length",) if self.max_length is not None else ())):
            if not getattr(self, name) >= 1:
                raise RecipeError(f"data: {name} is {getattr(self, name)!r}, expected 1 or more")


@dataclass(frozen=True)
class StageRecipe:
    """One stage: which parts train, with which objective, on which data, and `transformers.TrainingArguments`.

    With `global_batch`, the samples of an optimizer step over all processes, gradient accumulation follows from it.
    """

    name: str
    train: tuple[str, ...]
    objective: dict[str, Any]
    data: DataRecipe
    global_batch: int | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", tuple(self.train))
        for part in self.train:
            if part not in PARTS:
                raise RecipeError(f"stage {self.name}: train names {part!r}; the parts are {', '.join(PARTS)}")
        if not self.train:
            raise RecipeError(f"stage {self.name}: train is empty; name at least one of {', '.join(PARTS)}")
        if "name" not in self.objective:
            raise RecipeError(f"stage {self.name}: objective has no name; give for example name: switch_kd")
        if os.sep in self.name or self.name in ("", ".", "..", LOGS, DATA_CHECK):
            raise RecipeError(f"stage name {self.name!r} cannot be a folder name")
        object.__setattr__(self, "training", self._training())
        object.__setattr__(self, "objective", self._objective())
        if self.global_batch is not None:
            self._check_global_batch(self.global_batch)

    def _training(self) -> dict[str, Any]:
        training = check_training(self.training, f"stage {self.name}: training")
        if isinstance(training.get("deepspeed"), str):
            training["deepspeed"] = expanded(training["deepspeed"], f"stage {self.name}: training: deepspeed")
        return training

    def _objective(self) -> dict[str, Any]:
        """The objective's settings, each as its field takes it."""
        given, where = self.objective, f"stage {self.name}: objective"
        kind = OBJECTIVES.get(str(given["name"]))
        known = getattr(kind, "__dataclass_fields__", {})
        if kind is not None:
            given = given | typed_fields(kind, {key: value for key, value in given.items() if key in known}, where)
        try:
            build_objective(**given)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where}: {error}") from None
        return given

    def _check_global_batch(self, size: int) -> None:
        if not isinstance(size, int) or size < 1:
            raise RecipeError(f"stage {self.name}: global_batch is {size!r}, expected samples a step, such as 128")
        if self.training.get(ACCUMULATION) is not None:
            raise RecipeError(
                f"stage {self.name}: global_batch is {size} and training has {ACCUMULATION}, which follows from it; "
                "leave one of them out (null takes a value away that the recipe's base has)"
            )

    def training_on(self, processes: int) -> dict[str, Any]:
        """`training` for so many processes, accumulation filled in from `global_batch`. Raises RecipeError.

        The product of batch a device, processes and accumulation is the batch of an optimizer step.
        """
        if self.global_batch is None:
            return self.training
        device = int(self.training.get(MICRO_BATCH, TrainingArguments.per_device_train_batch_size))
        accumulation, left = divmod(self.global_batch, device * processes)
        if left or not accumulation:
            raise RecipeError(
                f"stage {self.name}: global_batch {self.global_batch} is no multiple of {device * processes}, "
                f"per_device_train_batch_size {device} × {processes} processes; choose a batch a device that divides "
                f"{self.global_batch / processes:g}"
            )
        return self.training | {ACCUMULATION: accumulation}


@dataclass(frozen=True)
class Recipe:
    """A whole run: stages in order, each starting from the one before, each saved under `output`/its name.

    `{root}` in any text of the recipe stands for `root`, so that one value moves a whole run.
    """

    output: str
    model: ModelRecipe
    stages: tuple[StageRecipe, ...]
    teacher: TeacherRecipe | None = None
    root: str = "."
    seed: int = 0

    def __post_init__(self) -> None:
        _expand(self, "recipe", "output", "root")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise RecipeError(f"stages are {names}; give at least one, each with a name of its own")
        for stage in self.stages:
            if self.teacher is None and build_objective(**stage.objective).needs_teacher:
                needy = stage.objective["name"]
                raise RecipeError(f"stage {stage.name}: {needy} needs a teacher; give teacher: FOLDER")

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """Build and check a recipe; unknown keys are refused with the nearest known one. Raises RecipeError."""
        check_keys(given, _fields(cls), "recipe")
        root = root_of(given, "recipe")
        values = fill_root(given, root) | {"root": root}
        values["model"] = build(ModelRecipe, values.get("model"), "model")
        values["teacher"] = TeacherRecipe.from_plain(values.get("teacher"))
        values["stages"] = tuple(_stage(stage, index) for index, stage in enumerate(values.get("stages") or []))
        recipe: Self = build(cls, values, "recipe")
        return recipe

    def with_max_steps(self, steps: int) -> Self:
        """The same recipe with every stage ended after `steps` steps, to try it or to time it. Raises RecipeError."""
        if steps < 1:
            raise RecipeError(f"max_steps is {steps}, expected 1 or more; a stage without a step has nothing to save")
        return dataclasses.replace(
            self,
            stages=tuple(
                dataclasses.replace(stage, training=stage.training | {"max_steps": steps}) for stage in self.stages
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML takes them."""
        plain = dataclasses.asdict(self)
        plain["teacher"] = None if self.teacher is None else self.teacher.to_plain()
        plain["stages"] = [stage | {"train": list(stage["train"])} for stage in plain["stages"]]
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, or one that comes with switchkd by its name, and apply `key.sub=value` overrides.

    A stage's keys are reached by its name: `stages.pt.training.learning_rate=1e-3`. Raises RecipeError.
    """
    given = build_on(read_yaml(find_recipe(source)))
    for key, what in _NO_RECIPE.items():
        if key in given:
            raise RecipeError(f"{source} is no recipe but {what.format(source)}")
    for text in overrides or []:
        override(given, text)
    if given.get("output") is None:
        raise RecipeError(
            f"{source} says no output, so it is no run by itself; give output=FOLDER, or build a recipe on it "
            f"(base: {source})"
        )
    return Recipe.from_dict(given)


# What else is YAML here, by a key that tells it.
_NO_RECIPE = {
    "arms": "a matrix of them; `switchkd ablate {}` runs it",
    "zero_optimization": "a configuration of DeepSpeed; a stage's training names it, as in deepspeed: zero2",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's keys and values, with the full path of every `base` that lies beside the file. Raises RecipeError."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: expected keys and values at the top, got {type(given).__name__}")
    return _locate_bases(given, path.parent)  # type: ignore[no-any-return]


def _locate_bases(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_locate_bases(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    located = {key: _locate_bases(item, folder) for key, item in value.items()}
    if (folder / str(value.get("base"))).is_file():
        located["base"] = str(folder / str(value["base"]))
    return located


def build_on(given: dict[str, Any], chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's values over those of its `base`, whose own base comes first; all of it copied. Raises RecipeError."""
    base: dict[str, Any] = {}
    if given.get("base") is not None:
        path = find_recipe(given["base"])
        if path in chain:
            raise RecipeError(f"recipes are built on each other: {' → '.join(str(step) for step in (*chain, path))}")
        base = build_on(read_yaml(path), (*chain, path))
    values: dict[str, Any] = merge(base, {key: value for key, value in given.items() if key != "base"})
    if isinstance(values.get("teacher"), str):
        values["teacher"] = {"checkpoint": values["teacher"]}  # so that what is built on it can change one key of it
    return values


def merge(base: Any, changes: Any) -> Any:
    """`changes` over `base`: key by key, stages by their names, anything else replaced. Raises RecipeError."""
    if not isinstance(changes, dict):
        # YAML anchors make two stages share one object; copied apart, an override changes the one that it names.
        return copy.deepcopy(changes)
    merged: dict[str, Any] = copy.deepcopy(base) if isinstance(base, dict) else {}
    for key, value in changes.items():
        if key == "stages" and isinstance(value, list):
            merged[key] = _merge_stages(merged.get(key) or [], value)
        elif key == "objective" and isinstance(value, dict) and "name" in value:
            merged[key] = dict(value)  # settings belong to the objective that is named with them
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def _merge_stages(base: list[Any], given: list[Any]) -> list[Any]:
    """The stages that are given, in their order: each over the base's of its name, or over the one that it is `like`.

    A name alone takes the base's as it is; `like` may also name an earlier stage of the same list.
    """
    of_base = _by_name(base)
    stages: list[Any] = []
    for entry in given:
        if not isinstance(entry, (str, dict)):
            stages.append(entry)  # Recipe.from_dict says what is wrong with it
        elif isinstance(entry, str):
            stages.append(merge(_start(entry, of_base), {}))
        elif "like" in entry:
            start = _start(entry["like"], of_base | _by_name(stages))
            stages.append(merge(start, {key: value for key, value in entry.items() if key != "like"}))
        else:
            stages.append(merge(of_base.get(entry.get("name")), entry))
    return stages


def _by_name(stages: list[Any]) -> dict[Any, Any]:
    return {stage["name"]: stage for stage in stages if isinstance(stage, dict) and "name" in stage}


def _start(name: Any, known: dict[Any, Any]) -> Any:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"
    raise RecipeError(f"stages: there is no stage {name!r} to start from; {hint}")


def find_recipe(source: str | Path) -> Path:
    """A recipe's path: the file itself, or the shipped recipe of that name. Raises RecipeError listing those."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    shipped = Path(str(resources.files("switchkd.recipes")))
    name = str(source).removeprefix("recipes/").removesuffix(".yaml") + ".yaml"
    if (shipped / name).is_file():
        return shipped / name
    names = sorted(str(found.relative_to(shipped)).removesuffix(".yaml") for found in shipped.rglob("*.yaml"))
    # Matrices and DeepSpeed's configurations are files of other kinds, of use only where one of them was asked for.
    kind = name.partition("/")[0]
    asked = (kind,) if kind in ("ablation", "deepspeed") else ("paper", "world")
    names = [found for found in names if found.partition("/")[0] in asked]
    raise RecipeError(f"{source}: no such recipe file, and none of the shipped ones: {', '.join(names)}")


def override(given: dict[str, Any], change: str) -> None:
    """Set the value that `key.sub=value` names; a stage is reached by its name. Raises RecipeError."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {change!r} is not key=value, such as stages.pt.training.max_steps=10")
    value = yaml.safe_load(text)
    place: Any = given
    *path, last = key.split(".")
    for step in path:
        if isinstance(place, list):
            found = [stage for stage in place if isinstance(stage, dict) and stage.get("name") == step]
            if not found:
                raise RecipeError(f"override {change!r}: no stage {step!r}; there are {list(_by_name(place))}")
            place = found[0]
        else:
            place = place.setdefault(step, {})
        if not isinstance(place, (dict, list)):
            raise RecipeError(f"override {change!r}: {step!r} holds {place!r}, which has no keys of its own")
    if isinstance(place, list):
        raise RecipeError(f"override {change!r}: name a key of a stage, such as stages.pt.training.max_steps")
    place[last] = value


def _stage(given: Any, index: int) -> StageRecipe:
    where = f"stages[{index}]"
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: expected keys and values, got {given!r}")
    values = dict(given)
    values["data"] = build(DataRecipe, values.get("data"), f"{where}.data")
    stage: StageRecipe = build(StageRecipe, values, where)
    return stage


def root_of(given: dict[str, Any], where: str) -> str:
    """What takes the place of `{root}`; a lone `~` is null in YAML, and no folder. Raises RecipeError."""
    root = given.get("root")
    return "." if root is None else expanded(str(root), f"{where}: root")


def fill_root(value: Any, root: str) -> Any:
    """The same values, `root` in the place of every `{root}` in a text."""
    if isinstance(value, dict):
        return {key: fill_root(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [fill_root(item, root) for item in value]
    return value.replace("{root}", root) if isinstance(value, str) else value


def _fields(kind: type) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


def build(kind: Any, given: Any, where: str) -> Any:
    """A dataclass from keys and values; unknown and missing keys are refused. Raises RecipeError."""
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: expected keys and values ({', '.join(_fields(kind))}), got {given!r}")
    check_keys(given, _fields(kind), where)
    needed = {
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    hints = get_type_hints(kind)
    # null takes a value away that the recipe's base has.
    given = {key: value for key, value in given.items() if value is not None or key in needed or takes_null(hints[key])}
    missing = [item for item in _fields(kind) if item in needed and item not in given]
    if missing:
        raise RecipeError(f"{where}: missing {', '.join(missing)}")
    return kind(**typed_fields(kind, given, where))


def _expand(recipe: Any, where: str, *names: str) -> None:
    """Expand the paths that these fields of a frozen dataclass hold, once for all who read them."""
    for name in names:
        value = getattr(recipe, name)
        if isinstance(value, str):
            object.__setattr__(recipe, name, expanded(value, f"{where}: {name}"))
