"""The card of a finished stage: what it says, that its code runs, and that it may be published."""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers import LlavaForConditionalGeneration, TrainingArguments

from switchkd.cli.main import COMMANDS, main
from switchkd.training.models.distillation import Distillation
from switchkd.training.models.vlm import build_vlm
from switchkd.training.objectives import build_objective
from switchkd.training.recipe.recipe import Recipe, load_recipe
from switchkd.training.runs.model_card import publishable, stage_facts, write_card, write_scores
from switchkd.training.world.dataset import WorldSettings, write_world
from switchkd.training.world.dry_run import shrink

LOG = {"loss": 2.5, "ce": 2.5, "tokens": 100, "supervised_tokens": 10, "time": 0.0}


@pytest.fixture(scope="module")
def root(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's root with data, models, the recipe and its finished stages."""
    root = tmp_path_factory.mktemp("ada") / "run"
    write_world(root / "world", WorldSettings(16, 7, 7))
    for name in ("student", "teacher"):
        shutil.copytree(tiny_checkpoint, root / name)
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True}
    data = {"records": ["{root}/world/train.json"], "pictures": "{root}/world/pictures"}
    shared = {"train": ["projector"], "data": data, "training": training}
    recipe = {
        "root": str(root),
        "output": "{root}/out",
        "teacher": "{root}/teacher",
        "model": {"checkpoint": "{root}/student"},
        "stages": [
            {"name": "pt", "objective": {"name": "sft"}, **shared},
            {"name": "dpt", "objective": {"name": "switch_kd", "lambda_dbild": 0.25}, **shared},
        ],
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(root / "recipe.yaml")]) == 0
    return root


def metadata(card: str) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return front


def run_script(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    Image.new("RGBA", (50, 30), "red").save("picture.png")
    exec(compile(script, "card", "exec"), {})


def test_the_card_says_what_it_is_and_how_it_was_made(root: Path) -> None:
    card = (root / "out" / "dpt" / "README.md").read_text()
    front = metadata(card)
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert "knowledge-distillation" in front["tags"]
    assert "base_model" not in front  # a folder is no model that others can find
    assert "$" not in card
    rows = {line.split("|")[1].strip(): line for line in card.splitlines() if line.startswith("| ")}
    assert "siglip_vision_model" in rows["encoder"]
    assert "| no |" in rows["encoder"]
    assert "| yes |" in rows["projector"]
    parameters = sum(
        p.numel() for p in LlavaForConditionalGeneration.from_pretrained(root / "out" / "dpt").parameters()
    )
    assert f"{parameters:,}" in rows["together"]
    assert "`pt` (sft), then `dpt` (switch_kd)" in rows["stages so far"]
    assert "lambda_dbild 0.25" in rows["objective"]
    assert "2, of 2 samples each" in rows["steps"]
    assert "1 process on CPU" in rows["hardware"]
    last = json.loads((root / "out" / "dpt" / "log.jsonl").read_text().splitlines()[2])
    for name in ("loss", "ce", "dbild", "vsd", "k_teacher"):
        assert rows[name].endswith(f"| {last[name]:.4g} |")
    for text in ("from a teacher of", "the folder `teacher`", "**This is a toy.**", "16 samples of `train.json`"):
        assert text in card
    assert "None were measured" in card


def test_a_stage_without_teacher_says_so(root: Path) -> None:
    card = (root / "out" / "pt" / "README.md").read_text()
    assert "Its objective, `sft`, has no teacher." in card
    assert "knowledge-distillation" not in metadata(card)["tags"]


def test_its_code_runs(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "out" / "dpt"
    run_script((folder / "README.md").read_text(), folder, monkeypatch)
    assert capsys.readouterr().out.strip()


def test_its_commands_are_ours(root: Path) -> None:
    card = (root / "out" / "dpt" / "README.md").read_text()
    commands = [shlex.split(line)[1:] for line in card.splitlines() if line.startswith("switchkd ")]
    assert [words[0] for words in commands] == ["export", "ask", "train"]
    modules = {command.name: command.module for command in COMMANDS}
    for name, *words in commands:
        parser = argparse.ArgumentParser()
        import_module(modules[name]).add_arguments(parser)
        parser.parse_args(words)  # it would exit, if it knew them not


def test_nothing_in_the_folder_names_a_place_of_this_machine(root: Path) -> None:
    for stage in ("pt", "dpt"):
        named = [p.name for p in (root / "out" / stage).iterdir() if root.parent.name.encode() in p.read_bytes()]
        assert named == []


def test_the_recipe_beside_it_is_the_whole_run_again(root: Path) -> None:
    again = load_recipe(root / "out" / "dpt" / "recipe.yaml", [f"root={root}"])
    assert again.to_dict() == load_recipe(root / "recipe.yaml").to_dict()


def test_scores_come_into_the_card_and_stay(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dpt"
    shutil.copytree(root / "out" / "dpt", folder)
    write_scores(folder, {"MMMU": {"accuracy, %": 33.14159, "seeds": 3}, "SciQA": {"accuracy, %": 59}}, "By nobody.")
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert "| | accuracy, % | seeds |\n|---|---|---|\n| MMMU | 33.14 | 3 |\n| SciQA | 59 |  |\n\nBy nobody." in card


# --- cards of models that are made, and not trained ---


def finish(folder: Path, recipe: Recipe, module: Distillation) -> str:
    """The card of a stage as if it had been trained."""
    args = TrainingArguments(str(folder), use_cpu=True)
    facts = stage_facts(recipe, recipe.stages[-1], module, args, 12)
    folder.mkdir(exist_ok=True)
    (folder / "stage.json").write_text(json.dumps({"seconds": 5025.0, "steps": 3, "facts": facts}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(publishable(recipe)))
    (folder / "log.jsonl").write_text(json.dumps(LOG | {"step": 3}) + "\n")
    write_card(folder)
    return (folder / "README.md").read_text()


def test_an_encoder_adapter_is_said(llava: Callable[..., LlavaForConditionalGeneration], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": "switch_kd", "encoder_adapter": True}
    module = Distillation(llava(0), llava(1, encoder_width=24), build_objective(**settings))
    stage = {"name": "dft", "train": ["encoder"], "objective": settings, "data": {"records": "x.json"}}
    recipe = Recipe.from_dict(
        {
            "output": str(tmp_path / "out"),
            "teacher": "Some/Teacher",
            "model": {"encoder": "google/siglip-so400m-patch14-384", "language_model": str(tmp_path / "mine")},
            "stages": [stage],
        }
    )
    (tmp_path / "mine").mkdir()
    card = finish(tmp_path / "dft", recipe, module)
    assert "student's encoder, 16 wide, to the teacher's projector, which takes 24" in card
    assert "is not in this folder" in card
    assert "[Some/Teacher](https://huggingface.co/Some/Teacher)" in card
    assert metadata(card)["base_model"] == ["google/siglip-so400m-patch14-384"]
    assert "the folder `mine`" in card
    assert "1 h 23 min" in card
    assert str(tmp_path) not in card


def test_a_projector_that_transformers_lacks_is_loaded_by_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = shrink(load_recipe("paper/qwen2.5-0.5b-ldpv2-edge"), tmp_path / "parts")
    model = recipe.model
    vlm = build_vlm(str(model.encoder), str(model.language_model), projector="ldpv2", projector_grid=2)
    folder = tmp_path / "edge"
    vlm.save(folder)
    card = finish(folder, recipe, Distillation(vlm.model, None, build_objective("sft")))
    assert metadata(card)["library_name"] == "switchkd"
    assert "LDPv2" in card
    assert "load_vlm" in card
    capsys.readouterr()
    run_script(card, folder, monkeypatch)
    assert capsys.readouterr().out


def test_a_published_recipe_keeps_names_and_no_places_and_no_secrets() -> None:
    given = {
        "root": "/data/llava",
        "output": "/scratch/ada/out",
        "model": {"encoder": "google/siglip", "language_model": "../ada/qwen"},
        "stages": [
            {
                "name": "sft",
                "train": ["encoder"],
                "objective": {"name": "sft"},
                "data": {"records": ["{root}/a.json", "~/b.json", "/data/llava2/c.json"]},
                "training": {"deepspeed": {"offload_path": "/scratch/ada", "a_token": "hf_secret"}},
            }
        ],
    }
    plain = publishable(Recipe.from_dict(given))
    assert (plain["root"], plain["output"]) == (".", "out")
    assert plain["model"]["encoder"] == "google/siglip"
    assert plain["model"]["language_model"] == "qwen"
    assert plain["stages"][0]["data"]["records"] == ["{root}/a.json", "b.json", "c.json"]
    assert plain["stages"][0]["training"] == {"deepspeed": {"offload_path": "ada", "a_token": ""}}
