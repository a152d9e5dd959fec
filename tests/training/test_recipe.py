"""Recipes: read, overridden, checked; every shipped one is complete, and table 2 of the paper is in it."""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from switchkd.training.arguments import training_arguments
from switchkd.training.objectives import build_objective
from switchkd.training.recipe import Recipe, RecipeError, find_recipe, load_recipe

RECIPES = Path(str(resources.files("switchkd.recipes")))
SHIPPED = sorted(
    str(path.relative_to(RECIPES).with_suffix(""))
    for path in RECIPES.rglob("*.yaml")
    if path.parent.name != "deepspeed" and path.stem != "encoder"
)

PIECES = {"encoder": "x", "language_model": "y"}


def plain() -> dict[str, Any]:
    """A small recipe."""
    return {
        "output": "runs/x",
        "model": {"checkpoint": "here"},
        "stages": [
            {"name": "pt", "train": ["projector"], "objective": {"name": "sft"}, "data": {"records": "a.json"}},
        ],
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_complete(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    for stage in recipe.stages:
        assert build_objective(**stage.objective).needs_teacher <= (recipe.teacher is not None)
        # bf16 and DeepSpeed need their hardware to be built; their keys are checked all the same.
        training = {key: value for key, value in stage.training.items() if key not in ("bf16", "deepspeed")}
        assert training_arguments(_with(stage, training), tmp_path, recipe.seed).learning_rate > 0


def _with(stage: Any, training: dict[str, Any]) -> Any:
    return dataclasses.replace(stage, training=training)


@pytest.mark.parametrize(("stage", "rate", "batch"), [("pt", 1e-3, 256), ("dft", 2e-5, 128)])
def test_paper_student_has_table_2(stage: str, rate: float, batch: int) -> None:
    recipe = load_recipe("paper/qwen2.5-0.5b-switch-kd")
    (found,) = [item for item in recipe.stages if item.name == stage]
    training = found.training
    assert training["learning_rate"] == rate
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * 8 == batch
    assert training["lr_scheduler_type"] == "cosine"
    assert training["warmup_steps"] == 0.03
    assert training["num_train_epochs"] == 1
    assert training["deepspeed"] == "zero2"
    assert found.train == (("projector",) if stage == "pt" else ("encoder", "projector", "language_model"))
    zero2 = yaml.safe_load(find_recipe("deepspeed/zero2").read_text())
    assert zero2["zero_optimization"]["stage"] == 2


def test_arms_of_the_comparison_differ_in_objective_and_teacher_alone() -> None:
    sft, kd = (load_recipe(f"world/student_{arm}") for arm in ("sft", "switch_kd"))
    assert kd.stages[0] == sft.stages[0]
    assert kd.model == sft.model
    assert kd.stages[1].training == sft.stages[1].training
    assert kd.stages[1].data == sft.stages[1].data
    assert kd.stages[1].train == sft.stages[1].train
    assert (sft.stages[1].objective["name"], kd.stages[1].objective["name"]) == ("sft", "switch_kd")


def test_edge_student_differs_from_the_papers_in_its_projector_alone() -> None:
    edge, paper = (load_recipe(f"paper/qwen2.5-0.5b-{name}") for name in ("ldpv2-edge", "switch-kd"))
    assert dataclasses.replace(edge.model, projector="mlp") == paper.model
    assert (edge.model.projector, edge.model.projector_grid) == ("ldpv2", 12)
    assert (edge.stages, edge.teacher, edge.seed) == (paper.stages, paper.teacher, paper.seed)


def test_max_steps_reach_every_stage_of_a_copy() -> None:
    recipe = load_recipe("world/student_sft")
    before = recipe.to_dict()
    short = recipe.with_max_steps(3)
    assert len(short.stages) == len(recipe.stages) == 2
    for stage, whole in zip(short.stages, recipe.stages, strict=True):
        assert stage.training == whole.training | {"max_steps": 3}
        assert dataclasses.replace(stage, training=whole.training) == whole
    assert dataclasses.replace(short, stages=recipe.stages) == recipe
    assert recipe.to_dict() == before
    with pytest.raises(RecipeError, match="max_steps is 0, expected 1 or more"):
        recipe.with_max_steps(0)


@pytest.mark.parametrize("name", ["world/student_switch_kd", "paper/qwen2.5-0.5b-ldpv2-edge"])
def test_yaml_comes_back_as_it_went(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_overrides_reach_stages_by_name_and_root_fills_every_path(tmp_path: Path) -> None:
    recipe = load_recipe(
        "world/student_sft", [f"root={tmp_path}", "stages.student_pt.training.learning_rate=1e-4", "seed=7"]
    )
    assert recipe.stages[0].training["learning_rate"] == 1e-4
    assert recipe.stages[1].training["learning_rate"] != 1e-4
    assert recipe.seed == 7
    assert recipe.output == str(tmp_path)
    assert recipe.stages[0].data.records == [f"{tmp_path}/world/captions.json"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"teachr": "x"}, "unknown key 'teachr'; did you mean 'teacher'"),
        ({"model": {"encoder": "x"}}, "either a checkpoint, or an encoder and a language model"),
        ({"model": {"chekpoint": "x"}}, "model: unknown key 'chekpoint'; did you mean 'checkpoint'"),
        ({"model": PIECES | {"projektor": "ldpv2"}}, "model: unknown key 'projektor'; did you mean 'projector'"),
        ({"model": PIECES | {"projector": "ldp2"}}, "unknown projector 'ldp2'; did you mean 'ldpv2'"),
        ({"model": PIECES | {"projector": "qformer"}}, "unknown projector 'qformer'; known projectors: mlp, ldpv2"),
        ({"model": PIECES | {"projector_grid": 0}}, "projector_grid is 0, expected 1 or more"),
        ({"model": PIECES | {"projector_grid": "12x12"}}, "projector_grid is '12x12', expected 1 or more"),
        ({"model": {"checkpoint": "x", "projector": "ldpv2"}}, "checkpoint 'x', which brings a projector of its own"),
        ({"stages": []}, "at least one"),
        ({"stages": [{"name": "pt"}]}, "stages\\[0\\].data: expected keys"),
        ({"output": None, "stages": [{"name": "pt", "data": {"records": "a"}}]}, "missing train, objective"),
    ],
)
def test_mistakes_are_named_with_the_nearest_key(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Recipe.from_dict(plain() | change)


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"train": ["encodr"]}, "names 'encodr'"),
        ({"train": []}, "train is empty"),
        ({"objective": {}}, "no name"),
        ({"name": "../up"}, "cannot be a folder name"),
    ],
)
def test_stage_mistakes_are_named(stage: dict[str, Any], reason: str) -> None:
    given = plain()
    given["stages"][0] |= stage
    with pytest.raises(RecipeError, match=reason):
        Recipe.from_dict(given)


def test_unknown_training_argument_names_the_nearest(tmp_path: Path) -> None:
    given = plain()
    given["stages"][0]["training"] = {"learning_rat": 1}
    with pytest.raises(RecipeError, match=r"stage pt: training: .*'learning_rat'; did you mean 'learning_rate'"):
        training_arguments(Recipe.from_dict(given).stages[0], tmp_path, 0)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("nonsense", "not key=value"),
        ("stages.ptt.training.max_steps=1", "no stage 'ptt'"),
        ("stages.student_pt=1", "name a key of a stage"),
        ("seed.deep=1", "'seed' holds 0"),
    ],
)
def test_override_mistakes_are_named(override: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe("world/student_sft", [override])


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"paper/qwen2.5-0.5b-switch-kd"):
        load_recipe("no/such")


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match=r"r.yaml: not valid YAML"):
        load_recipe(tmp_path / "r.yaml")
