"""Recipes: read, overridden, checked; every shipped one is complete."""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from switchkd.cli.main import main
from switchkd.training.objectives import build_objective
from switchkd.training.recipe.arguments import training_arguments
from switchkd.training.recipe.model_sizes import PUBLISHED
from switchkd.training.recipe.recipe import Recipe, RecipeError, TeacherRecipe, load_recipe

RECIPES = Path(str(resources.files("switchkd.recipes")))
SHIPPED = sorted(
    str(path.relative_to(RECIPES).with_suffix(""))
    for path in RECIPES.rglob("*.yaml")
    if path.parent.name not in ("deepspeed", "ablation") and path.stem != "table2"
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
        built = training_arguments(dataclasses.replace(stage, training=training), tmp_path, recipe.seed)
        assert built.learning_rate > 0
        if stage.global_batch is not None:
            assert built.train_batch_size * built.gradient_accumulation_steps == stage.global_batch


@pytest.mark.parametrize(
    ("name", "teacher", "stages"),
    [
        ("qwen2.5-3b-teacher", None, "pt sft"),
        ("qwen2.5-7b-teacher", None, "pt sft"),
        ("qwen2.5-0.5b-sft", None, "pt sft"),
        ("qwen2.5-1.5b-sft", None, "pt sft"),
        ("qwen2.5-0.5b-switch-kd", "3b", "pt dft"),
        ("qwen2.5-1.5b-switch-kd", "3b", "pt dft"),
        ("qwen2.5-0.5b-switch-kd-from-7b", "7b", "pt dft"),
        ("qwen2.5-1.5b-switch-kd-from-7b", "7b", "pt dft"),
        ("qwen2.5-0.5b-llava-kd", "3b", "dpt sft dft"),
        ("qwen2.5-0.5b-align-kd", "3b", "pt dft"),
    ],
)
def test_paper_recipes_are_what_their_names_say(name: str, teacher: str | None, stages: str) -> None:
    recipe = load_recipe(f"paper/{name}", ["root=here"])
    assert [stage.name for stage in recipe.stages] == stages.split()
    assert recipe.model.language_model == f"Qwen/Qwen2.5-{name.split('-')[1].upper()}-Instruct"
    assert recipe.output == f"here/runs/{name}"
    if teacher is None:
        assert recipe.teacher is None
    else:
        assert recipe.teacher is not None
        # The very folder that the teacher's recipe ends in.
        made = load_recipe(f"paper/qwen2.5-{teacher}-teacher", ["root=here"])
        assert recipe.teacher.checkpoint == f"{made.output}/{made.stages[-1].name}"
    distilled = {"switch": "switch_kd", "llava": "llava_kd", "align": "align_kd"}.get(name.split("-")[2])
    for stage in recipe.stages:
        assert stage.objective["name"] == (distilled if stage.name in ("dpt", "dft") else "sft")


@pytest.mark.parametrize("name", ["qwen2.5-7b-teacher", "clip-qwen2.5-1.5b-switch-kd", "qwen2.5-0.5b-llava-kd"])
def test_dry_run_takes_two_steps_of_every_stage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"paper/{name}", "--dry-run"]) == 0
    err = capsys.readouterr().err
    for stage in load_recipe(f"paper/{name}").stages:
        assert f"{stage.name}: {stage.objective['name']}" in err
    assert "every stage took two steps" in err


def write(path: Path, given: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(given))
    return path


def test_a_recipe_is_built_on_its_base(tmp_path: Path) -> None:
    data = {"records": "a.json"}
    first = {"name": "one", "train": ["projector"], "objective": {"name": "kd", "temperature": 2.0}, "data": data}
    first["training"] = {"learning_rate": 0.1, "save_steps": 7}
    model = {"encoder": "v", "language_model": "small"}
    base: dict[str, Any] = {
        "root": "r",
        "output": "{root}/base",
        "teacher": "{root}/t",
        "model": model,
        "stages": [first, {"like": "one"}],
    }
    base["stages"][1] |= {"name": "two", "train": ["encoder"]}
    write(tmp_path / "base.yaml", base)
    changes: dict[str, Any] = {
        "base": "base.yaml",
        "root": "s",
        "model": {"language_model": "large"},
        "teacher": {"dtype": "bfloat16"},
    }
    changes["stages"] = [
        "two",
        {"name": "one", "training": {"learning_rate": 0.2}, "objective": {"temperature": 4.0}},
        {"name": "three", "like": "one", "objective": {"name": "sft"}},
    ]
    recipe = load_recipe(write(tmp_path / "derived.yaml", changes), ["stages.three.data.max_length=9"])
    assert recipe.output == "s/base"  # found beside the file, and filled with the last root
    assert dataclasses.astuple(recipe.model)[:3] == (None, "v", "large")
    assert recipe.teacher == TeacherRecipe("s/t", dtype="bfloat16")
    two, one, three = recipe.stages
    assert (two.name, two.train, two.objective["temperature"]) == ("two", ("encoder",), 2.0)
    assert one.training == {"learning_rate": 0.2, "save_steps": 7}
    assert one.objective == {"name": "kd", "temperature": 4.0}
    assert three.training == one.training  # like the stage before it in the same list
    assert three.objective == {"name": "sft"}  # another objective brings its own settings
    assert [stage.data.max_length for stage in recipe.stages] == [None, None, 9]
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": "paper/no-such"}, "paper/no-such: no such recipe file"),
        ({"base": "b.yaml"}, "built on each other: .*a.yaml → .*b.yaml"),
        ({"base": "world/student_stages", "stages": ["ptt"]}, "no stage 'ptt' to start from; did you mean 'pt'"),
        (
            {"base": "world/student_stages", "stages": [{"name": "x", "like": "y"}]},
            "'y' .*there are: pt, dpt, sft, dft",
        ),
    ],
)
def test_bases_that_cannot_be_built_on_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", {"base": "a.yaml"})
    with pytest.raises(RecipeError, match=reason):
        load_recipe(write(tmp_path / "a.yaml", changes))


@pytest.mark.parametrize(
    ("change", "processes", "reason"),
    [
        ({"global_batch": 0}, 1, "global_batch is 0"),
        ({"global_batch": 8, "training": {"gradient_accumulation_steps": 2}}, 1, "gradient_accumulation_steps, which"),
        ({"global_batch": 24, "training": {"per_device_train_batch_size": 4}}, 4, "24 is no multiple of 16"),
        ({"global_batch": 8, "training": {"per_device_train_batch_size": 4}}, 4, "that divides 2"),
    ],
)
def test_global_batches_that_do_not_come_out_are_refused(change: dict[str, Any], processes: int, reason: str) -> None:
    given = plain()
    given["stages"][0] |= change
    with pytest.raises(RecipeError, match=reason):
        Recipe.from_dict(given).stages[0].training_on(processes)


def test_launchers_processes_share_the_global_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = plain()
    given["stages"][0] |= {"global_batch": 48, "training": {"per_device_train_batch_size": 4}}
    stage = Recipe.from_dict(given).stages[0]
    assert training_arguments(stage, tmp_path, 0).gradient_accumulation_steps == 12
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(RecipeError, match="48 is no multiple of 20"):
        training_arguments(stage, tmp_path, 0)


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


@pytest.mark.parametrize(("size", "encoder"), [("b", "base"), ("l", "large")])
def test_the_edge_recipes_differ_in_their_encoder_and_its_adapter(size: str, encoder: str) -> None:
    edge, paper = load_recipe(f"edge/siglip2-{size}-switch-kd"), load_recipe("paper/qwen2.5-0.5b-ldpv2-edge")
    name = f"google/siglip2-{encoder}-patch16-384"
    assert edge.model == dataclasses.replace(paper.model, encoder=name)
    pt, dft = edge.stages
    assert pt == paper.stages[0]
    assert dft == dataclasses.replace(paper.stages[1], objective={**paper.stages[1].objective, "encoder_adapter": True})
    teacher = load_recipe("edge/siglip2-so400m-teacher")
    assert edge.teacher is not None
    assert edge.teacher.checkpoint == f"{teacher.output}/{teacher.stages[-1].name}"
    ours, theirs = (PUBLISHED[str(recipe.model.encoder)] for recipe in (edge, teacher))
    assert [side["image_size"] // side["patch_size"] for side in (ours, theirs)] == [24, 24]
    assert ours["hidden_size"] < theirs["hidden_size"] == 1152


def test_the_edge_baseline_is_its_student_without_a_teacher() -> None:
    sft, edge = load_recipe("edge/siglip2-b-sft"), load_recipe("edge/siglip2-b-switch-kd")
    assert (sft.model, sft.stages[0], sft.teacher) == (edge.model, edge.stages[0], None)
    ours, theirs = sft.stages[1], edge.stages[1]
    assert (ours.data, ours.training, ours.train) == (theirs.data, theirs.training, theirs.train)


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


@pytest.mark.parametrize(
    "name", ["world/student_switch_kd", "paper/qwen2.5-0.5b-ldpv2-edge", "edge/siglip2-b-switch-kd"]
)
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
        ({"model": PIECES | {"projector_grid": "12x12"}}, "projector_grid is '12x12', expected a whole number"),
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
