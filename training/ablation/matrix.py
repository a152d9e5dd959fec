"""An ablation as data: arms, each a recipe or a finished checkpoint, over what they share; YAML in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from ..recipe.recipe import (
    Recipe,
    RecipeError,
    build,
    build_on,
    check_keys,
    fill_root,
    find_recipe,
    merge,
    override,
    read_yaml,
    root_of,
)
from ..runs.stage_identity import fingerprints
from ..runs.stages import check_kept
from ..world.dataset import WorldSettings


@dataclass(frozen=True)
class Arm:
    """One row of the table: a recipe to run, or a `checkpoint` that is there and is only scored.

    `seeds` is how often it runs if not as often as the matrix says; `paper` holds the paper's numbers by benchmark.
    """

    name: str
    recipe: Recipe | None = None
    checkpoint: str | None = None
    seeds: int | None = None
    paper: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.checkpoint is None):
            raise RecipeError(f"arm {self.name}: give either a recipe, or the checkpoint of a finished model")
        _check_seeds(self.seeds, f"arm {self.name}: ")

    def run(self, seed: int) -> Recipe | None:
        """The recipe of a seed: the first in its own folder, each other one in a folder below; None if none is run."""
        if self.recipe is None or seed == 0:
            return self.recipe
        return dataclasses.replace(
            self.recipe, seed=self.recipe.seed + seed, output=str(Path(self.recipe.output) / f"seed{seed}")
        )

    def folder(self, seed: int) -> Path:
        """Where a seed's finished model is, or will be."""
        recipe = self.run(seed)
        return Path(str(self.checkpoint)) if recipe is None else Path(recipe.output) / recipe.stages[-1].name


@dataclass(frozen=True)
class Matrix:
    """Arms, and the folder `output` of their report.

    With `world`, the settings of the built-in picture world, that world and the stored parts are put under `root` and
    every arm answers its test questions. `source` says where the arms' `paper` numbers are from.
    """

    output: str
    arms: tuple[Arm, ...]
    title: str = "Ablation"
    root: str = "."
    seeds: int = 1
    world: WorldSettings | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        _check_seeds(self.seeds, "")
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) != len(names):
            raise RecipeError(f"arms are {names}; give at least one, each with a name of its own")
        self._check_folders()

    @classmethod
    def from_dict(cls, given: dict[str, Any], changes: list[str] | None = None) -> Self:
        """Build and check a matrix; `changes` are overrides for the arms' recipes. Raises RecipeError."""
        known = [item.name for item in dataclasses.fields(cls)]
        check_keys(given, [*known, "recipe"], "matrix")
        root = root_of(given, "matrix")
        values = fill_root(given, root) | {"root": root}
        shared = {"root": root} | (values.pop("recipe", None) or {})
        arms = [_resolve(arm, index, shared) for index, arm in enumerate(values.get("arms") or [])]
        _change([arm["recipe"] for arm in arms if arm.get("recipe") is not None], changes or [])
        values["arms"] = tuple(_arm(arm) for arm in arms)
        values["world"] = _world(values.get("world"))
        matrix: Self = build(cls, values, "matrix")
        return matrix

    def seeds_of(self, arm: Arm) -> range:
        """The seeds that an arm runs with; what is not trained here is there once."""
        return range(1 if arm.recipe is None else arm.seeds or self.seeds)

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every arm with its first seed, then every arm with its second: a whole table comes early."""
        most = max(len(self.seeds_of(arm)) for arm in self.arms)
        return ((arm, seed) for seed in range(most) for arm in self.arms if seed in self.seeds_of(arm))

    def with_max_steps(self, steps: int) -> Self:
        """The same matrix with every stage of every arm ended after `steps` steps. Raises RecipeError."""
        arms = (
            arm if arm.recipe is None else dataclasses.replace(arm, recipe=arm.recipe.with_max_steps(steps))
            for arm in self.arms
        )
        return dataclasses.replace(self, arms=tuple(arms))

    def check_finished(self) -> None:
        """Refuse to write over finished stages that another recipe made, maybe in days. Raises RecipeError."""
        for arm, seed in self.runs():
            recipe = arm.run(seed)
            try:
                if recipe is not None:
                    check_kept(recipe)
            except RecipeError as error:
                hint = "for a matrix that is root=FOLDER, or recipe.output=FOLDER"
                raise RecipeError(f"arm {arm.name}: {error} ({hint})") from None

    def to_yaml(self) -> str:
        """The matrix with every arm's recipe resolved, as YAML; it can be read again."""
        plain = dataclasses.asdict(self)
        plain["arms"] = [
            {
                "name": arm.name,
                **({"checkpoint": arm.checkpoint} if arm.recipe is None else {"recipe": arm.recipe.to_dict()}),
                **({"seeds": arm.seeds} if arm.seeds is not None else {}),
                **({"paper": arm.paper} if arm.paper else {}),
            }
            for arm in self.arms
        ]
        return yaml.safe_dump(plain, sort_keys=False)

    def _stages(self) -> Iterator[tuple[Arm, str, Path, str]]:
        for arm, seed in self.runs():
            recipe = arm.run(seed)
            if recipe is not None:
                for stage, fingerprint in zip(recipe.stages, fingerprints(recipe), strict=True):
                    yield arm, stage.name, Path(recipe.output) / stage.name, fingerprint

    def _check_folders(self) -> None:
        """Stages of one folder have to be one stage: then it is trained once, else each would write over the other."""
        kept: dict[Path, tuple[str, str]] = {}
        for arm, name, folder, fingerprint in self._stages():
            other, made = kept.setdefault(folder, (arm.name, fingerprint))
            if made != fingerprint:
                raise RecipeError(
                    f"arms {other!r} and {arm.name!r} both keep a stage {name!r} in {folder}, and the two differ; "
                    f"give one of them a name of its own, such as {{name: other-{name}, like: {name}}}"
                )


def load_matrix(source: str | Path, overrides: list[str] | None = None) -> Matrix:
    """Read a matrix file, or one that comes with switchkd by its name, and apply `key=value` overrides.

    `recipe.key=value` changes every arm's recipe that has the stage it names. Raises RecipeError.
    """
    given = read_yaml(find_recipe(source))
    if "arms" not in given:
        raise RecipeError(f"{source}: has no arms, so it is no ablation; `switchkd train` runs a recipe")
    changes: list[str] = []
    for text in overrides or []:
        if text.startswith("recipe."):
            changes.append(text.removeprefix("recipe."))
        else:
            override(given, text)
    return Matrix.from_dict(given, changes)


def _world(given: Any) -> WorldSettings | None:
    try:
        return None if given is None else build(WorldSettings, given, "world")
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"world: {error}") from None


def _resolve(given: Any, index: int, shared: dict[str, Any]) -> dict[str, Any]:
    """An arm's values, its recipe over what all arms share; a base of its own takes the place of theirs."""
    where = f"arms[{index}]"
    if not isinstance(given, dict) or "name" not in given:
        raise RecipeError(f"{where}: expected keys and values with a name, got {given!r}")
    check_keys(given, [item.name for item in dataclasses.fields(Arm)], f"arm {given['name']}")
    own = given.get("recipe")
    if own is None:
        return given
    if not isinstance(own, dict):
        raise RecipeError(f"arm {given['name']}: recipe: expected keys and values, got {own!r}")
    base = build_on(shared | {key: value for key, value in own.items() if key == "base"})
    return given | {"recipe": merge(base, {key: value for key, value in own.items() if key != "base"})}


def _arm(given: dict[str, Any]) -> Arm:
    try:
        recipe = None if given.get("recipe") is None else Recipe.from_dict(given["recipe"])
    except RecipeError as error:
        raise RecipeError(f"arm {given['name']}: {error}") from None
    return Arm(**given | {"recipe": recipe})


def _change(recipes: list[dict[str, Any]], changes: list[str]) -> None:
    """Apply each override wherever it can be applied; arms need not have the stage that it names."""
    for change in changes:
        refused = []
        for recipe in recipes:
            try:
                override(recipe, change)
            except RecipeError as error:
                refused.append(error)
        if len(refused) == len(recipes):
            raise refused[0] if refused else RecipeError(f"recipe.{change}: no arm has a recipe to change")


def _check_seeds(seeds: Any, where: str) -> None:
    if seeds is not None and (not isinstance(seeds, int) or seeds < 1):
        raise RecipeError(f"{where}seeds is {seeds!r}, expected 1 or more: each arm runs once for every seed")
