"""Every shipped recipe of full size, resolved: the papers' values, and stated ones where they leave a choice."""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from switchkd.training.ablation.matrix import Matrix
from switchkd.training.objectives import build_objective
from switchkd.training.recipe.arguments import training_arguments
from switchkd.training.recipe.recipe import Recipe, StageRecipe, find_recipe, load_recipe, read_yaml

RECIPES = Path(str(resources.files("switchkd.recipes")))
PAPER = sorted(path.stem for path in (RECIPES / "paper").glob("*.yaml") if path.stem != "table2")
ABLATIONS = ("table3", "table4", "table5", "rivals")
EVERYTHING = ("encoder", "projector", "language_model")

# Table 2 of the Switch-KD paper: its column PT holds for DPT too, DFT for SFT. Pictures are in the models below.
TABLE_2: dict[str, dict[str, Any]] = {
    "pt": {"train": ("projector",), "learning_rate": 1e-3, "global_batch": 256},
    "dft": {"train": EVERYTHING, "learning_rate": 2e-5, "global_batch": 128},
}
FOR_BOTH = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "num_train_epochs": 1, "deepspeed": "zero2"}
FOR_BOTH |= {"optim": "adamw_torch_fused"}
# What table 2 does not say, as LLaVA trains: its data in its order, no weight decay, AdamW as torch has it.
OPEN: dict[str, Any] = {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
OPEN |= {"max_grad_norm": 1.0, "max_steps": -1, "bf16": True, "max_length": 2048}
LLAVA_DATA = {
    "pt": {
        "records": ["data/llava/blip_laion_cc_sbu_558k.json"],
        "pictures": "data/llava/llava_558k",
        "train_sampling_strategy": "random",
    },
    "dft": {
        "records": ["data/llava/llava_v1_5_mix665k.json"],
        "pictures": "data/llava",
        "train_sampling_strategy": "group_by_length",
    },
}
# The objectives with every setting: those of the Switch-KD paper's algorithms 1 and 2, and of its rivals' papers.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"ce_temperature": 1.0},
    "switch_kd": {
        "lambda_ce": 1.0,
        "lambda_dbild": 1.0,
        "lambda_vsd": 1.0,
        "temperature": 3.0,
        "tau_squared": False,
        "window": None,
        "min_k": 3,
        "max_k": None,
        "direction": "reverse",
        "led_by": "both",
        "vocabulary": None,
        "ce_temperature": 1.0,
        "encoder_adapter": False,
    },
    "llava_kd": {
        "lambda_ce": 1.0,
        "lambda_kd": 1.0,
        "lambda_visual": 1.0,
        "lambda_relation": 0.5,
        "relation_of": "language_model",
        "temperature": 1.0,
        "direction": "forward",
    },
    "align_kd": {
        "lambda_ce": 1.0,
        "lambda_logits": 1.0,
        "lambda_attention": 1.0,
        "lambda_visual": 1.0,
        "top_tokens": 16,
    },
    "kd": {"lambda_ce": 1.0, "lambda_kd": 1.0, "temperature": 1.0, "tau_squared": False, "direction": "forward"},
    "bild": {"lambda_ce": 0.0, "lambda_bild": 1.0, "k": 8, "temperature": 3.0, "direction": "forward"},
}
SIGLIP, CLIP = "google/siglip-so400m-patch14-384", "openai/clip-vit-large-patch14-336"
# Stages by column of table 2 and objective; of the two rivals the encoder stays as it is.
PT, SFT, DFT = ("pt", "sft"), ("dft", "sft"), ("dft", "switch_kd")
SCHEMES = {
    "teacher": [PT, SFT],
    "sft": [PT, SFT],
    "switch-kd": [PT, DFT],
    "switch-kd-from-7b": [PT, DFT],
    "ldpv2-edge": [PT, DFT],
    "llava-kd": [("pt", "llava_kd"), SFT, ("dft", "llava_kd")],
    "align-kd": [PT, ("dft", "align_kd")],
}


def resolved(stage: StageRecipe, folder: Path) -> dict[str, Any]:
    """What a stage trains with, defaults filled in, as its classes take it."""
    # bf16 and DeepSpeed need their hardware to be built, and are taken as they are given.
    hardware = {name: stage.training.get(name) for name in ("bf16", "deepspeed")}
    training = {name: value for name, value in stage.training.items() if name not in hardware}
    built = training_arguments(dataclasses.replace(stage, training=training), folder, 0)
    names = TABLE_2["pt"].keys() | FOR_BOTH.keys() | OPEN.keys() | LLAVA_DATA["pt"].keys()
    found = hardware | {name: getattr(built, name) for name in names if hasattr(built, name) and name not in hardware}
    found |= {name: getattr(stage.data, name) for name in ("records", "pictures", "max_length")}
    objective = build_objective(**stage.objective)
    return found | {
        "train": stage.train,
        "global_batch": built.train_batch_size * built.gradient_accumulation_steps,
        "objective": {"name": stage.objective["name"]} | dataclasses.asdict(objective),  # type: ignore[call-overload]
    }


def expected(column: str, objective: str, **changes: Any) -> dict[str, Any]:
    """What the papers say that such a stage trains with."""
    settings = {"name": objective} | OBJECTIVES[objective]
    return TABLE_2[column] | FOR_BOTH | OPEN | LLAVA_DATA[column] | {"objective": settings} | changes


@pytest.mark.parametrize("name", PAPER)
def test_a_papers_recipe_resolves_to_the_papers_values(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(f"paper/{name}")
    _, size, scheme = name.removeprefix("clip-").split("-", 2)
    frozen = {"train": EVERYTHING[1:]} if scheme in ("llava-kd", "align-kd") else {}
    sharded = {"deepspeed": "zero3"} if (size, scheme) == ("7b", "teacher") else {}  # would fill a GPU otherwise
    assert [resolved(stage, tmp_path) for stage in recipe.stages] == [
        expected(column, objective, **sharded, **(frozen if column == "dft" else {}))
        for column, objective in SCHEMES[scheme]
    ]
    assert dataclasses.asdict(recipe.model) == {
        "checkpoint": None,
        "encoder": CLIP if name.startswith("clip-") else SIGLIP,  # at 384 pixels; the released 1.8B's CLIP at 336
        "language_model": f"Qwen/Qwen2.5-{size.upper()}-Instruct",
        "vision_feature_layer": -2,
        "drop_first_patch": False,
        "projector": "ldpv2" if scheme == "ldpv2-edge" else "mlp",
        "projector_grid": 12,
        "attn_implementation": None,
    }
    assert recipe.seed == 0


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablations_arms_differ_from_table_2_in_what_they_are_named_after_alone(name: str, tmp_path: Path) -> None:
    matrix = Matrix.from_dict(read_yaml(find_recipe(f"ablation/{name}")))
    recipes = [arm.recipe for arm in matrix.arms if arm.recipe is not None]
    assert len(recipes) == len(matrix.arms)
    for recipe in recipes:
        assert (recipe.model.vision_feature_layer, recipe.model.projector, recipe.seed) == (-2, "mlp", 0)
        for stage in recipe.stages:
            column = "pt" if stage.train == ("projector",) else "dft"
            objective = stage.objective["name"]
            changes: dict[str, Any] = {"train": EVERYTHING[1:]} if is_a_rivals(stage) else {}
            changes |= {"deepspeed": "zero3"} if is_the_large_teacher(recipe) else {}
            assert resolved(stage, tmp_path) == expected(column, objective, **changes)


def is_a_rivals(stage: StageRecipe) -> bool:
    """Whether it is a fine-tuning of LLaVA-KD or Align-KD, which leave the encoder as it is."""
    return stage.name.startswith(("llava-kd", "align-kd")) and stage.train != ("projector",)


def is_the_large_teacher(recipe: Recipe) -> bool:
    return "7B" in str(recipe.model.language_model)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("processes", [1, 2, 8, 16])
def test_the_global_batch_is_table_2s_on_any_number_of_processes(name: str, processes: int) -> None:
    for stage in load_recipe(f"paper/{name}").stages:
        on = stage.training_on(processes)
        batch = on["per_device_train_batch_size"] * on["gradient_accumulation_steps"] * processes
        assert batch == (256 if stage.train == ("projector",) else 128)


def test_zero_2_is_stage_2() -> None:
    for name, stage in (("zero2", 2), ("zero3", 3)):
        assert yaml.safe_load(find_recipe(f"deepspeed/{name}").read_text())["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("name", ["student_stages", "ablation_stages", "student_switch_kd"])
def test_the_toy_world_distils_with_the_papers_objective(name: str) -> None:
    recipe = load_recipe(f"world/{name}")
    assert recipe.model.vision_feature_layer == -2
    stages = [stage for stage in recipe.stages if stage.objective["name"] != "sft"]
    assert stages
    for stage in stages:
        objective: Any = build_objective(**stage.objective)
        assert {"name": stage.objective["name"]} | dataclasses.asdict(objective) == {
            "name": "switch_kd",
            **OBJECTIVES["switch_kd"],
        }
        assert stage.train == (EVERYTHING if "dft" in stage.name or "switch" in stage.name else ("projector",))
