"""The estimate against the real thing: parameters, bytes by torch's profiler, FLOPs, lengths, and the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig

from switchkd.cli.main import main
from switchkd.training.data import text_lengths
from switchkd.training.data.text_lengths import UNKNOWN
from switchkd.training.estimate.fake_step import Arrangement, Batch, step_bytes, step_flops
from switchkd.training.estimate.holding import Holding, Sizes, fixed_bytes, holding, sizes
from switchkd.training.models.distillation import Distillation
from switchkd.training.models.vlm import PARTS, ModelError, train_only
from switchkd.training.objectives import build_objective
from switchkd.training.recipe.model_sizes import local_tokenizer, student_config, teacher_config
from switchkd.training.recipe.recipe import DataRecipe, ModelRecipe, load_recipe
from switchkd.training.world.vocabulary import train_tokenizer

BATCH = Batch(rows=4, text=40, supervised=24)
VISUAL = 16


def config_of(width: int, layers: int) -> LlavaConfig:
    """A LLaVA large enough that tensors, not single numbers, are what is counted."""
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=48,
        patch_size=12,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=700,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=699,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        image_seq_length=VISUAL,
        tie_word_embeddings=True,
    )


STUDENT, TEACHER = config_of(64, 5), config_of(96, 4)


def real_module(objective: str, checkpointing: bool) -> Distillation:
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    student, teacher = (LlavaForConditionalGeneration(config) for config in (STUDENT, TEACHER))
    train_only(student, PARTS)
    module = Distillation(student, teacher, build_objective(objective)).train()
    if checkpointing:
        module.activation_checkpointing_enable()
    return module


def real_batch() -> dict[str, Tensor]:
    ids_BT = torch.randint(0, 600, (BATCH.rows, VISUAL + BATCH.text))
    ids_BT[:, :VISUAL] = 699
    labels_BT = ids_BT.clone()
    labels_BT[:, : -BATCH.supervised] = -100
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, -1] = 0
    pixels_PCHW = torch.randn(BATCH.rows, 3, 48, 48)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT, "pixel_values": pixels_PCHW}


def peak_of(module: Distillation, how: Arrangement) -> int:
    """The most bytes that torch's CPU allocator held for a step, above the models."""
    if how.accumulates:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = sum(parameter.grad.nbytes for parameter in module.parameters() if parameter.grad is not None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch = real_batch()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.autocast is not None):
            loss = module(**batch)["loss"]
        loss.backward()
    events: Any = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + gradients


@pytest.mark.parametrize(
    ("objective", "checkpointing", "accumulates", "autocast"),
    [
        ("sft", False, False, None),
        ("sft", True, True, torch.bfloat16),
        ("switch_kd", False, True, None),
        ("switch_kd", True, False, None),
        ("align_kd", False, False, None),
    ],
)
def test_bytes_of_a_step_are_those_that_torch_allocates(
    objective: str, checkpointing: bool, accumulates: bool, autocast: torch.dtype | None
) -> None:
    how = Arrangement(PARTS, torch.float32, torch.float32, autocast, checkpointing, accumulates, keeps_gradients=True)
    estimated = step_bytes(STUDENT, TEACHER, build_objective(objective), how, BATCH)
    measured = peak_of(real_module(objective, checkpointing), how)
    assert sum(estimated.values()) == pytest.approx(measured, rel=0.1), estimated


def test_flops_of_shallow_models_tell_those_of_deep_ones() -> None:
    how = Arrangement(PARTS, torch.float32, torch.float32, None, True, False, True)
    module, batch = real_module("switch_kd", checkpointing=True), real_batch()
    with FlopCounterMode(display=False) as counter:
        module(**batch)["loss"].backward()
    estimated = step_flops(STUDENT, TEACHER, build_objective("switch_kd"), how, BATCH)
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("name", "billions"), [("0.5B", 0.494), ("1.5B", 1.54), ("3B", 3.09), ("7B", 7.62)])
def test_published_sizes_give_the_published_parameters(name: str, billions: float) -> None:
    recipe = load_recipe("paper/qwen2.5-0.5b-switch-kd", [f"model.language_model=Qwen/Qwen2.5-{name}-Instruct"])
    config = student_config(recipe)
    counted = sizes(config, None, ("language_model",)).trained
    assert round(counted / 1e9, 3 if billions < 1 else 2) == billions
    # so400m without the pooling head, which LLaVA never reads
    everything = sizes(config, None, PARTS)
    projector = sizes(config, None, ("projector",)).trained
    assert everything.trained + everything.frozen - counted - projector == 412_987_248


def test_a_teacher_that_is_not_there_is_sized_by_the_recipe_that_makes_it() -> None:
    recipe = load_recipe("paper/qwen2.5-0.5b-switch-kd", ["root=/data"])
    for name, width in ((None, 2048), ("Qwen/Qwen2.5-7B-Instruct", 3584)):
        config: Any = teacher_config(recipe, name)
        assert config.text_config.hidden_size == width


def test_zero_shares_out_what_it_should() -> None:
    stage = load_recipe("paper/qwen2.5-0.5b-switch-kd").stages[-1]
    size = Sizes(trained=800, frozen=200, teacher=3000, quantizable=2500)

    def held(**changes: Any) -> tuple[Holding, dict[str, float]]:
        import dataclasses

        changed = dataclasses.replace(stage, training=stage.training | changes)
        how = holding(changed, None, 8)
        parts = fixed_bytes(how, size)
        parts.pop("exchange", None)
        return how, parts

    how, zero2 = held(deepspeed="zero2")
    assert how.arrangement.student_dtype == torch.bfloat16
    assert zero2["student's weights, trained"] == 1600
    assert zero2["teacher's weights"] == 6000
    assert zero2["float32 copy"] + zero2["optimizer"] == 800 * 12 / 8
    _, zero3 = held(deepspeed="zero3")
    assert zero3["teacher's weights"] == 6000 / 8
    how, plain = held(deepspeed=None)
    assert how.arrangement.autocast == torch.bfloat16
    assert plain["student's weights, trained"] == 3200  # autocast keeps them in float32
    assert plain["optimizer"] == 6400


def write_records(path: Path, count: int) -> list[dict[str, Any]]:
    records = [
        {
            "id": str(number),
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\n" + "What? " * (1 + number % 7)},
                {"from": "gpt", "value": "A dog. " * (1 + number % 11)},
            ],
        }
        for number in range(count)
    ]
    path.write_text(json.dumps(records))
    return records


def test_lengths_are_counted_on_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.json"
    records = write_records(path, 3000)
    data = DataRecipe([str(path)])
    whole = text_lengths.text_lengths(data, None)
    assert whole.samples == len(records)
    assert whole.with_picture == 1
    assert whole.supervised < whole.text < whole.longest
    monkeypatch.setattr(text_lengths, "SMALL", 1000)  # as for a file of a gigabyte
    monkeypatch.setattr(text_lengths, "WINDOW", 8000)
    some = text_lengths.text_lengths(data, None)
    assert "some" in some.basis
    assert some.samples == pytest.approx(len(records), rel=0.05)
    assert some.text == pytest.approx(whole.text, rel=0.1)
    assert text_lengths.text_lengths(DataRecipe([str(tmp_path / "none.json")]), None) == UNKNOWN


def test_a_language_model_of_text_alone_counts_tokens_with_the_tokenizer_of_training(tmp_path: Path) -> None:
    write_records(tmp_path / "records.json", 5)
    tokenizer = train_tokenizer(["What is it?"], 300)
    tokenizer.chat_template = (  # as Qwen2.5's: content is text, and a list of parts a TypeError
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "lm")
    model = ModelRecipe(encoder="google/siglip-so400m-patch14-384", language_model=str(tmp_path / "lm"))
    found = text_lengths.text_lengths(DataRecipe([str(tmp_path / "records.json")]), local_tokenizer(model))
    assert found.basis == "all 5 records of records.json, counted by the tokenizer"
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="its tokenizer has no chat template"):
        local_tokenizer(replace(model, language_model=str(tmp_path / "base")))


@pytest.mark.parametrize("first", [{"data_source": "x"}, {"meta": {"id": 1, "image": "b.png"}}, {"turns": 2, "a": []}])
@pytest.mark.parametrize(("small", "indent"), [(10**9, None), (1000, None), (1000, 1)])
def test_records_are_found_whatever_their_first_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], small: int, indent: int | None
) -> None:
    monkeypatch.setattr(text_lengths, "SMALL", small)
    monkeypatch.setattr(text_lengths, "WINDOW", 8000)
    rows = [
        {
            "id": n,
            "conversations": [{"from": "human", "value": 'Say {"id": 1}, ' * 9}, {"from": "gpt", "value": "x" * 400}],
        }
        for n in range(200)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent))
    (tmp_path / "b.json").write_text(json.dumps([first | row for row in rows], indent=indent))
    expected, found = (
        text_lengths.text_lengths(DataRecipe([str(tmp_path / name)]), None) for name in ("a.json", "b.json")
    )
    assert (found.text, found.supervised, found.longest) == (expected.text, expected.supervised, expected.longest)
    assert found.samples == pytest.approx(200, rel=0.02)


@pytest.fixture
def recipe(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A recipe over the tiny checkpoint, which is its own teacher."""
    write_records(tmp_path / "records.json", 50)
    stage = {
        "name": "dft",
        "train": list(PARTS),
        "objective": {"name": "switch_kd"},
        "data": {"records": [str(tmp_path / "records.json")]},
        "training": {"per_device_train_batch_size": 4, "num_train_epochs": 2},
    }
    plain = {
        "output": str(tmp_path / "out"),
        "teacher": str(tiny_checkpoint),
        "model": {"checkpoint": str(tiny_checkpoint)},
        "stages": [stage],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def estimate(*words: str) -> int:
    return main(["estimate", *words])


def test_command_says_what_a_recipe_takes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate(str(recipe), "--gpu", "24GB", "--gpus", "2") == 0
    shown = capsys.readouterr().out
    for words in ("teacher's weights", "optimizer", "activations", "in all", "hours", "fits", "4 x 1 x 2"):
        assert words in shown
    assert estimate(str(recipe), "stages.dft.training.num_train_epochs=1", "--gpus", "1", "--json") == 0
    stage = json.loads(capsys.readouterr().out)["stages"][0]
    assert stage["steps"] == 13  # 50 samples in batches of 4
    assert stage["parameters"]["teacher"] == stage["parameters"]["trained"] + stage["parameters"]["frozen"]


def test_command_tries_what_would_fit(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = "stages.dft.training.per_device_train_batch_size=64", "stages.dft.objective={name: sft}"
    assert estimate(str(recipe), *changes, "--gpu", "1020MB", "--gpus", "1") == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "per_device_train_batch_size: " in shown
    assert ", fits" in shown


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpu", "plenty"], "--gpu is 'plenty', expected a GPU's memory"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--mfu", "35"], "--mfu is 35"),
        (["--gpu-type", "abacus"], "--gpu-type is 'abacus'"),
        (["--samples", "0"], "--samples is 0"),
        (["teacher=nowhere/at/all"], "nowhere/at/all: there is no such model yet"),
        (["stages.dft.training.optim=galore_adamw"], "galore_adamw"),
    ],
)
def test_mistakes_cost_one_line(recipe: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate(str(recipe), *words) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
