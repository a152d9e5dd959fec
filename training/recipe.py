"""A run as data: the student, the teacher, and stages with objective, data and training arguments; YAML in and out."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml

from switchkd.export.projectors import GRID, LDPV2, MLP, PROJECTORS

from .vlm import PARTS


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key, the value, the reason and the remedy."""


def check_keys(given: dict[str, Any], known: list[str], where: str) -> None:
    """Refuse unknown keys with the nearest known one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise RecipeError(f"{where}: unknown key {key!r}; {hint}")


@dataclass(frozen=True)
class ModelRecipe:
    """Where a model comes from: a whole checkpoint (`checkpoint`), or an encoder and a language model.

    Each is a folder or a hub id. The rest applies when it is put together: `vision_feature_layer`, `drop_first_patch`,
    and `projector`, LLaVA's "mlp" or "ldpv2", which pools the visual tokens to `projector_grid` on a side.
    """

    checkpoint: str | None = None
    encoder: str | None = None
    language_model: str | None = None
    vision_feature_layer: int = -2
    drop_first_patch: bool = False
    projector: str = MLP
    projector_grid: int = GRID

    def __post_init__(self) -> None:
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
class DataRecipe:
    """LLaVA-format records (JSON or JSONL files) and the folder their pictures are in."""

    records: list[str]
    pictures: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.records, str):
            object.__setattr__(self, "records", [self.records])


@dataclass(frozen=True)
class StageRecipe:
    """One stage: which parts train, with which objective, on which data, and `transformers.TrainingArguments`."""

    name: str
    train: tuple[str, ...]
    objective: dict[str, Any]
    data: DataRecipe
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
        if os.sep in self.name or self.name in ("", ".", ".."):
            raise RecipeError(f"stage name {self.name!r} cannot be a folder name")


@dataclass(frozen=True)
class Recipe:
    """A whole run: stages in order, each starting from the one before, each saved under `output`/its name.

    `{root}` in any text of the recipe stands for `root`, so that one value moves a whole run.
    """

    output: str
    model: ModelRecipe
    stages: tuple[StageRecipe, ...]
    teacher: str | None = None
    root: str = "."
    seed: int = 0

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise RecipeError(f"stages are {names}; give at least one, each with a name of its own")

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """Build and check a recipe; unknown keys are refused with the nearest known one. Raises RecipeError."""
        check_keys(given, _fields(cls), "recipe")
        values = _fill_root(given, str(given.get("root", ".")))
        values["model"] = _build(ModelRecipe, values.get("model"), "model")
        values["stages"] = tuple(_stage(stage, index) for index, stage in enumerate(values.get("stages") or []))
        recipe: Self = _build(cls, values, "recipe")
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
        plain["stages"] = [stage | {"train": list(stage["train"])} for stage in plain["stages"]]
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, or one that comes with switchkd by its name, and apply `key.sub=value` overrides.

    A stage's keys are reached by its name: `stages.pt.training.learning_rate=1e-3`. Raises RecipeError.
    """
    path = find_recipe(source)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: expected keys and values at the top, got {type(given).__name__}")
    # YAML anchors make two stages share one object; copied apart, an override changes the one that it names.
    given = _fill_root(given, "{root}")
    for override in overrides or []:
        _override(given, override)
    return Recipe.from_dict(given)


def find_recipe(source: str | Path) -> Path:
    """A recipe's path: the file itself, or the shipped recipe of that name. Raises RecipeError listing those."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = Path(str(resources.files("switchkd.recipes")))
    name = str(source).removeprefix("recipes/").removesuffix(".yaml") + ".yaml"
    if (shipped / name).is_file():
        return shipped / name
    names = sorted(str(found.relative_to(shipped)).removesuffix(".yaml") for found in shipped.rglob("*.yaml"))
    raise RecipeError(f"{source}: no such recipe file, and none of the shipped ones: {', '.join(names)}")


def _override(given: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r} is not key=value, such as stages.pt.training.max_steps=10")
    value = yaml.safe_load(text)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-3 as text
    place: Any = given
    *path, last = key.split(".")
    for step in path:
        if isinstance(place, list):
            found = [stage for stage in place if stage.get("name") == step]
            if not found:
                raise RecipeError(
                    f"override {override!r}: no stage {step!r}; there are {[s.get('name') for s in place]}"
                )
            place = found[0]
        else:
            place = place.setdefault(step, {})
        if not isinstance(place, (dict, list)):
            raise RecipeError(f"override {override!r}: {step!r} holds {place!r}, which has no keys of its own")
    if isinstance(place, list):
        raise RecipeError(f"override {override!r}: name a key of a stage, such as stages.pt.training.max_steps")
    place[last] = value


def _stage(given: Any, index: int) -> StageRecipe:
    where = f"stages[{index}]"
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: expected keys and values, got {given!r}")
    values = dict(given)
    values["data"] = _build(DataRecipe, values.get("data"), f"{where}.data")
    stage: StageRecipe = _build(StageRecipe, values, where)
    return stage


def _fill_root(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill_root(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_root(item, root) for item in value]
    return value.replace("{root}", root) if isinstance(value, str) else value


def _fields(kind: type) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


def _build(kind: Any, given: Any, where: str) -> Any:
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: expected keys and values ({', '.join(_fields(kind))}), got {given!r}")
    check_keys(given, _fields(kind), where)
    missing = [
        item.name
        for item in dataclasses.fields(kind)
        if item.name not in given
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{where}: missing {', '.join(missing)}")
    return kind(**given)
