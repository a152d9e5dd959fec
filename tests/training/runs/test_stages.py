"""Stages through the real command: standard folders, reuse, resuming bit for bit, and the full-size road tried dry."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainingArguments

from switchkd.cli.main import main
from switchkd.training.models.pathway import features_width
from switchkd.training.models.vlm import ModelError, build_vlm, load_vlm, train_only
from switchkd.training.recipe.recipe import load_recipe
from switchkd.training.runs.stages import run_recipe
from switchkd.training.world.dataset import WorldSettings, write_world

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small picture world."""
    return write_world(tmp_path_factory.mktemp("data") / "world", WorldSettings(24, 7, 7))


def write_recipe(path: Path, checkpoint: Path, world: Path, output: Path, **changes: Any) -> Path:
    """A two-stage recipe over the tiny checkpoint, which is its own teacher."""
    training: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
    }
    training |= {"learning_rate": 1e-3, "use_cpu": True}
    data = {"records": [str(world / "train.json")], "pictures": str(world / "pictures")}
    everything = ["encoder", "projector", "language_model"]
    recipe = {
        "output": str(output),
        "teacher": str(checkpoint),
        "model": {"checkpoint": str(checkpoint)},
        "stages": [
            {"name": "pt", "train": ["projector"], "objective": {"name": "sft"}, "data": data, "training": training},
            {
                "name": "dft",
                "train": everything,
                "objective": {"name": "switch_kd"},
                "data": data,
                "training": training,
            },
        ],
    }
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the whole recipe, run by the command."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", str(write_recipe(folder / "r.yaml", tiny_checkpoint, world, folder / "out"))]) == 0
    return folder


class Wrapped(torch.nn.DataParallel[Any]):
    """In place of DataParallel, which wraps nothing where there is no GPU."""

    def __init__(self, *_: Any) -> None:
        pytest.fail("wrapped in DataParallel")


def test_a_process_of_its_own_trains_on_one_gpu_of_several(
    tiny_checkpoint: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else the Trainer wraps the models in DataParallel, which hands rows and pictures out apart."""
    finish = TrainingArguments.__post_init__

    def with_two(arguments: TrainingArguments) -> None:
        finish(arguments)
        arguments._n_gpu = 2  # as where two GPUs are

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.nn, "DataParallel", Wrapped)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_checkpoint, world, tmp_path / "out")
    assert main(["train", str(recipe), "stages.dft.training.max_steps=1"]) == 0
    out = capsys.readouterr()
    said = "note: 2 GPUs are there and one process takes one of them; all of them: torchrun --nproc_per_node 2 -m"
    assert (out.out + out.err).count(said) == 1
    assert "of 2 samples each" in (tmp_path / "out" / "dft" / "README.md").read_text()


def test_every_stage_is_a_folder_that_plain_transformers_loads(trained: Path) -> None:
    for stage in ("pt", "dft"):
        folder = trained / "out" / stage
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=Image.new("RGB", (50, 30), "red"), return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert generated.shape[1] > inputs["input_ids"].shape[1]
        assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_pretraining_moves_the_projector_alone(trained: Path, tiny_checkpoint: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, trained / "out" / "pt"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)


def test_fine_tuning_moves_every_part_but_the_layer_that_is_never_read(trained: Path) -> None:
    before, after = (load_file(trained / "out" / stage / "model.safetensors") for stage in ("pt", "dft"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name for name in moved), part
    assert not any("encoder.layers.2." in name or "post_layernorm" in name for name in moved)


def test_log_has_every_term_of_the_objective(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "out" / "dft" / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for row in steps:
        assert row["loss"] == pytest.approx(row["ce"] + row["dbild"] + row["vsd"], rel=1e-3)
        assert row["k_teacher"] >= 3


def test_finished_stages_are_reused_and_those_of_another_recipe_are_left_alone(
    trained: Path, tiny_checkpoint: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "out", tmp_path / "out")
    # The recipe's output is no part of what a stage is.
    recipe = write_recipe(tmp_path / "r.yaml", tiny_checkpoint, world, tmp_path / "out")
    assert main(["train", str(recipe)]) == 0
    assert capsys.readouterr().err.count("already finished") == 2
    before = (tmp_path / "out/dft/stage.json").read_bytes()
    assert main(["train", str(recipe), "stages.dft.training.learning_rate=0.002"]) == 2
    said = capsys.readouterr().err
    assert (
        "out/dft is finished, and not by this recipe: stages.dft.training.learning_rate was 0.001 and is 0.002" in said
    )
    assert (tmp_path / "out/dft/stage.json").read_bytes() == before


@pytest.mark.parametrize("objective", ["switch_kd", "align_kd"])  # the second trains adapters of its own
def test_killed_at_any_time_it_ends_in_the_same_weights(
    objective: str, trained: Path, tiny_checkpoint: Path, world: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_checkpoint, world, tmp_path / "out")
    chosen = [f"stages.dft.objective.name={objective}"]
    if objective != "switch_kd":
        shutil.copytree(trained / "out" / "pt", tmp_path / "out" / "pt")
        trained = tmp_path / "straight"
        shutil.copytree(tmp_path / "out", trained / "out")
        assert main(["train", str(recipe), f"output={trained / 'out'}", *chosen]) == 0
        assert not (trained / "out" / "dft" / "adapters.safetensors").exists()
    command = [sys.executable, "-m", "switchkd.cli.main", "train", str(recipe), *chosen]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "out" / ".dft.checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("checkpoint-2/manifest.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # As if it had been killed in the middle of its next save.
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-5", dirs_exist_ok=True)
    for name in ("manifest.json", "trainer_state.json"):
        (checkpoints / "checkpoint-5" / name).unlink()
    assert not (tmp_path / "out" / "dft").exists()
    capsys.readouterr()
    assert main(["train", str(recipe), *chosen]) == 0
    assert "checkpoint-5 cannot be used: manifest.json is missing" in capsys.readouterr().err
    resumed, straight = (load_file(path / "out" / "dft" / "model.safetensors") for path in (tmp_path, trained))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert not checkpoints.exists()


def test_dry_run_of_the_edge_recipe_bridges_two_widths(tmp_path: Path) -> None:
    from switchkd.training.world.dry_run import shrink

    recipe = shrink(load_recipe("edge/siglip2-b-switch-kd"), tmp_path)
    assert recipe.teacher is not None
    run_recipe(recipe)
    student, teacher = load_vlm(tmp_path / "output" / "dft"), load_vlm(recipe.teacher.checkpoint)
    widths = [features_width(vlm.model) for vlm in (student, teacher)]
    assert widths == [32, 48]
    assert [vlm.tokens_per_picture for vlm in (student, teacher)] == [4, 9]
    assert "encoder_adapter" in (tmp_path / "output" / "dft" / "recipe.yaml").read_text()


def test_dry_run_of_the_full_size_recipe_builds_its_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "paper/qwen2.5-0.5b-switch-kd", "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert "pt: sft" in err
    assert "dft: switch_kd" in err
    assert "every stage took two steps" in err


def test_print_config_is_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    # Before the options or behind them.
    assert main(["train", "world/student_sft", "seed=3", "--print-config", "root=here"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == load_recipe("world/student_sft", ["seed=3", "root=here"]).to_dict()
    with pytest.raises(SystemExit):
        main(["train", "world/student_sft", "--print-config", "seed"])
    assert "unrecognized arguments: seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"checkpoint": "/nowhere"}}, "/nowhere: .*no config.json"),
        ({"teacher": None}, "stage dft: switch_kd needs a teacher"),
    ],
)
def test_a_recipe_that_cannot_run_ends_with_one_line_and_2(
    change: dict[str, Any], reason: str, tiny_checkpoint: Path, world: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_checkpoint, world, tmp_path / "out", **change)
    assert main(["train", str(recipe)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("switchkd: error: ")
    assert re.search(reason, last)


def test_unknown_objective_settings_are_refused(
    tiny_checkpoint: Path, world: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_checkpoint, world, tmp_path / "out")
    assert main(["train", str(recipe), "stages.dft.objective.lamda_vsd=0.5"]) == 2
    assert "did you mean 'lambda_vsd'" in capsys.readouterr().err


def test_unused_encoder_layers_take_no_gradient(tiny_checkpoint: Path) -> None:
    vlm = load_vlm(tiny_checkpoint)
    train_only(vlm.model, ("encoder",))
    trained = {name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("vision_tower" in name for name in trained)
    assert not any("layers.2." in name or "post_layernorm" in name for name in trained)


def test_clip_drops_its_class_token(tmp_path: Path) -> None:
    recipe = load_recipe("paper/qwen2.5-0.5b-switch-kd", ["model.encoder=openai/clip-vit-large-patch14-336"])
    from switchkd.training.world.dry_run import shrink

    model = shrink(recipe, tmp_path).model
    assert model.encoder is not None
    assert model.language_model is not None
    vlm = build_vlm(model.encoder, model.language_model)
    assert vlm.model.config.vision_feature_select_strategy == "default"
    assert vlm.tokens_per_picture == 9  # 3 x 3 patches, the class token dropped
    features = vlm.model.get_image_features(torch.zeros(1, 3, 72, 72)).pooler_output
    assert features[0].shape[0] == 9


def test_a_language_model_without_chat_template_is_refused(tmp_path: Path) -> None:
    from switchkd.training.world.dry_run import shrink

    model = shrink(load_recipe("paper/qwen2.5-0.5b-switch-kd"), tmp_path).model
    assert model.encoder is not None
    assert model.language_model is not None
    (Path(model.language_model) / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        build_vlm(model.encoder, model.language_model)
