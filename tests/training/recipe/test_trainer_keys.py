"""Every key of `training:` works, is ours or is refused by name; numbers are numbers and paths are paths, once."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from switchkd.cli.main import main
from switchkd.training.objectives.switch_kd import SwitchKd
from switchkd.training.recipe.arguments import training_arguments
from switchkd.training.recipe.recipe import Recipe, RecipeError, load_recipe
from switchkd.training.recipe.trainer_keys import OURS, REFUSED, WORKING, check_training
from switchkd.training.runs.stage_models import stage_objective

FIELDS = set(TrainingArguments.__dataclass_fields__)


def recipe_with(training: dict[str, Any]) -> Recipe:
    """A recipe of one stage; the models are nowhere, so what is refused is refused before they are loaded."""
    return Recipe.from_dict(plain(training))


def plain(training: dict[str, Any]) -> dict[str, Any]:
    values = {"name": "pt", "train": ["projector"], "objective": {"name": "sft"}, "data": {"records": "a.json"}}
    values |= {"training": {"use_cpu": True, "report_to": "none"} | training}
    return {"output": "out", "model": {"checkpoint": "/nowhere"}, "stages": [values]}


def test_every_field_of_transformers_is_in_one_list() -> None:
    listed = [*WORKING, *OURS, *REFUSED]
    assert FIELDS - set(listed) == set(), "a release has new fields: try them, put them into trainer_keys"
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("key", sorted((OURS | REFUSED).keys() & FIELDS))
def test_keys_that_do_not_work_are_named_with_the_way_out(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"^stage pt: training: {key} .*(is not set|does not work) here: .{{20}}"):
        recipe_with({key: True})
    assert key not in recipe_with({key: None}).stages[0].training  # null takes away what a base has


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau does not work here: stages train and"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'; did you mean 'cosine'"),
        ({"save_strategy": "best"}, "best does not work here"),
        ({"train_sampling_strategy": "batch_rebalance"}, "group_by_length puts"),
        ({"train_sampling_strategy": "shuffled"}, "is 'shuffled', expected one of random, sequential"),
        ({"dataloader_multiprocessing_context": "spawn"}, "spawn does not work here: workers are forked"),
        ({"optim": "galore_adamw"}, "galore_adamw does not work here"),
        ({"max_steps": 0}, "max_steps is 0, expected 1 or more"),
        ({"max_steps": 2.5}, "max_steps is 2.5, expected a whole number"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0, expected more than 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, expected 1 or more"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, expected a number"),
        ({"learning_rate": True}, "learning_rate is True, expected a number"),
        ({"bf16": "maybe"}, "bf16 is 'maybe', expected true or false"),
        ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs is 3, expected keys and values"),
    ],
)
def test_values_that_do_not_work_are_named(training: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        recipe_with(training)


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ".* lr_scheduler_kwargs None: One of min_lr or min_lr_rate"),
        (
            {"lr_scheduler_kwargs": {"min_lr": 0.1}},
            "lr_scheduler_type linear with lr_scheduler_kwargs .*unexpected keyword argument",
        ),
        ({"adam_beta1": 2}, "optim adamw_torch_fused: Invalid beta"),
        ({"optim_args": "betas=3"}, "optim adamw_torch_fused: it takes no optim_args"),
        ({"optim": "stable_adamw"}, "optim stable_adamw: You need to install"),
        ({"report_to": "mlflow"}, "report_to names mlflow, which is not installed"),
    ],
)
def test_what_cannot_be_built_is_said_before_models_are_loaded(
    training: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"^stage pt: training: {reason}"):
        training_arguments(recipe_with(training).stages[0], tmp_path, 0)


# As YAML 1.1 reads a number without a dot, and as people quote them.
TEXTS = """
output: out
model: {encoder: v, language_model: l, vision_feature_layer: "-3"}
seed: "7"
stages:
  - name: pt
    train: projector
    global_batch: "8"
    objective: {name: switch_kd, temperature: 2e0, min_k: "4", lambda_vsd: 5e-1}
    data: {records: a.json, max_length: "64", max_broken: 1e-3, max_pixels: 1e6, follow_links: "yes"}
    training:
      learning_rate: 2e-5
      weight_decay: 1e-2
      adam_epsilon: 1e-7
      max_grad_norm: "2"
      max_steps: '3'
      warmup_steps: 5e-1
      per_device_train_batch_size: 2.0
      save_strategy: no
      dataloader_drop_last: "true"
      lr_scheduler_type: cosine_with_min_lr
      lr_scheduler_kwargs: {min_lr: 1e-6}
      run_name: 7
      tf32: null
      logging_steps: null
teacher: t
"""


def test_numbers_are_taken_by_the_type_of_their_field(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXTS)
    recipe = load_recipe(tmp_path / "r.yaml", ["stages.pt.training.adam_beta2=9e-1"])
    stage = recipe.stages[0]
    assert stage.training == {
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "adam_epsilon": 1e-7,
        "adam_beta2": 0.9,
        "max_grad_norm": 2,
        "max_steps": 3,
        "warmup_steps": 0.5,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "dataloader_drop_last": True,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "run_name": "7",
        "tf32": None,
    }
    assert (recipe.seed, recipe.model.vision_feature_layer, stage.global_batch, stage.train) == (
        7,
        -3,
        8,
        ("projector",),
    )
    objective = stage_objective(stage)
    assert isinstance(objective, SwitchKd)
    assert (objective.temperature, objective.min_k, objective.lambda_vsd) == (2.0, 4, 0.5)
    data = stage.data
    assert (data.max_length, data.max_broken, data.max_pixels, data.follow_links) == (64, 0.001, 1_000_000, True)
    arguments = training_arguments(Recipe.from_dict(yaml.safe_load(recipe.to_yaml())).stages[0], tmp_path, 0)
    assert (arguments.learning_rate, arguments.max_steps, arguments.gradient_accumulation_steps) == (2e-5, 3, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": "x"}, "recipe: seed is 'x', expected a whole number"),
        ({"seed": 1.5}, "recipe: seed is 1.5, expected a whole number"),
        ({"teacher": {"checkpoint": "t", "quantization": True}}, "teacher: quantization is True, expected a text"),
    ],
)
def test_other_values_of_another_type_are_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Recipe.from_dict(yaml.safe_load(recipe_with({}).to_yaml()) | change)


@pytest.mark.parametrize("given", [[1], "x"])
def test_training_is_keys_and_values(given: Any) -> None:
    with pytest.raises(RecipeError, match="expected keys and values"):
        check_training(given, "training")


def test_a_path_has_one_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = plain({"deepspeed": "~/z.json"})
    given["stages"][0]["data"] = {"records": ["~/a.json", "{root}/b.json"], "pictures": "~/p"}
    given |= {"root": "~/r", "output": "~/out", "teacher": "~/t"}
    given["model"] = {"encoder": "~/e", "language_model": "{root}/l"}
    recipe = Recipe.from_dict(given)
    home = str(tmp_path)
    assert (recipe.root, recipe.output) == (f"{home}/r", f"{home}/out")
    assert recipe.teacher is not None
    assert (recipe.teacher.checkpoint, recipe.model.encoder) == (f"{home}/t", f"{home}/e")
    assert recipe.model.language_model == f"{home}/r/l"
    assert recipe.stages[0].data.records == [f"{home}/a.json", f"{home}/r/b.json"]
    assert recipe.stages[0].data.pictures == f"{home}/p"
    assert recipe.stages[0].training["deepspeed"] == f"{home}/z.json"
    assert Recipe.from_dict(given | {"root": None}).root == "."  # a lone ~ is null in YAML
    for path, reason in (
        ("$SCRATCH/x", r"\$SCRATCH is not filled in here"),
        ("~nobody-of-that-name/x", "no such user"),
    ):
        with pytest.raises(RecipeError, match=f"recipe: output is .*{reason}"):
            Recipe.from_dict(given | {"output": path})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ablation/table4", "`switchkd ablate ablation/table4` runs it"),
        ("deepspeed/zero2", "a configuration of DeepSpeed; a stage's training names it"),
        ("paper/table2", r"no run by itself; give output=FOLDER, or build a recipe on it \(base: paper/table2\)"),
    ],
)
def test_shipped_files_that_are_no_recipes_say_what_they_are(name: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe(name)
    with pytest.raises(RecipeError, match=r"^no/such: ((?!zero2|table4).)*$"):
        load_recipe("no/such")


def test_a_last_batch_that_is_dropped_has_to_leave_one(
    one_stage_recipe: Any, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 4}
    assert main(["train", str(one_stage_recipe(tmp_path / "r.yaml", tiny_checkpoint, **settings))]) == 2
    assert "10 records are fewer than the 12 of a step" in capsys.readouterr().err
