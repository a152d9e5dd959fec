"""How a stage holds its models: the teacher's precision and weights, attention, kernels, DeepSpeed, optimizers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from switchkd.training.arguments import training_arguments
from switchkd.training.distillation import Distillation
from switchkd.training.recipe import Recipe, RecipeError
from switchkd.training.stage_models import stage_distillation, stage_student
from switchkd.training.trainer import DistillationTrainer
from switchkd.training.vlm import load_vlm

IMAGE = "<image>"


def make_recipe(checkpoint: Path, teacher: Any = None, model: Any = None, **training: Any) -> Recipe:
    stage = {"name": "dft", "train": ["encoder", "projector", "language_model"], "objective": {"name": "switch_kd"}}
    stage |= {"data": {"records": "a.json"}, "training": training}
    teacher = {"checkpoint": str(checkpoint)} | (teacher or {})
    start = {"checkpoint": str(checkpoint)} | (model or {})
    return Recipe.from_dict({"output": "x", "teacher": teacher, "model": start, "stages": [stage]})


def make_module(recipe: Recipe) -> Distillation:
    student = stage_student(recipe, recipe.stages[0], None)
    return stage_distillation(recipe, recipe.stages[0], student).train()


def make_batch(module: Distillation) -> dict[str, torch.Tensor]:
    """Two rows of a picture (16 tokens) and text."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(10, 250, (2, 24), generator=generator)
    ids_BT[:, 1:17] = module.student.config.image_token_index
    labels_BT = torch.where(torch.arange(24) > 18, ids_BT, -100)
    pixels_PCHW = torch.randn(2, 3, 24, 24, generator=generator)
    batch = {"input_ids": ids_BT, "labels": labels_BT, "pixel_values": pixels_PCHW}
    return batch | {"attention_mask": torch.ones_like(ids_BT)}


@pytest.mark.parametrize(
    ("teacher", "training", "expected"),
    [
        ({}, {}, torch.float32),
        ({}, {"bf16": True}, torch.bfloat16),
        ({}, {"fp16": True}, torch.float16),
        ({"dtype": "float32"}, {"bf16": True}, torch.float32),
    ],
)
def test_the_teacher_is_held_in_what_the_stage_computes_in(
    tiny_checkpoint: Path, teacher: dict[str, Any], training: dict[str, Any], expected: torch.dtype
) -> None:
    recipe = make_recipe(tiny_checkpoint, teacher, **training)
    module = make_module(recipe)
    assert module.teacher is not None
    assert {parameter.dtype for parameter in module.teacher.parameters()} == {expected}
    assert {parameter.dtype for parameter in module.student.parameters()} == {torch.float32}


def test_deepspeed_is_given_a_student_in_bfloat16_and_keeps_a_float32_copy_of_its_own(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for training, expected in (({"bf16": True}, torch.bfloat16), ({}, torch.float32)):
        module = make_module(make_recipe(tiny_checkpoint, deepspeed="zero2", **training))
        assert {parameter.dtype for parameter in module.student.parameters()} == {expected}


def test_a_step_in_bfloat16_with_a_teacher_in_it(tiny_checkpoint: Path) -> None:
    """As DDP trains: float32 weights under autocast, the loss close to that of float32."""
    module, plain = (make_module(make_recipe(tiny_checkpoint, bf16=bf16)) for bf16 in (True, False))
    batch = make_batch(module)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(**batch)["loss"]
    loss.backward()
    torch.testing.assert_close(loss.float(), plain(**batch)["loss"], rtol=0.03, atol=0)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in module.student.parameters())


@pytest.fixture(scope="module")
def wide_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a language model of width 64, the least that 4-bit blocks allow."""
    folder = tmp_path_factory.mktemp("wide")
    vlm = load_vlm(tiny_checkpoint)
    config: Any = vlm.model.config
    config.text_config.hidden_size, config.text_config.intermediate_size = 64, 128
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


# 8 bit rounds activations too.
@pytest.mark.parametrize(("quantization", "alike"), [("8bit", 0.8), ("4bit", 0.999)])
def test_the_switch_learns_through_a_quantised_teacher(
    tiny_checkpoint: Path, wide_checkpoint: Path, quantization: str, alike: float
) -> None:
    """The gradient is that of a plain teacher with the weights that the quantised ones stand for."""
    recipe = make_recipe(tiny_checkpoint, {"checkpoint": str(wide_checkpoint), "quantization": quantization})
    module, plain = (make_module(recipe) for _ in range(2))
    assert module.teacher is not None
    assert plain.teacher is not None
    parts = module.teacher.named_modules()
    quantised = {name for name, part in parts if type(part).__module__.startswith("bitsandbytes")}
    assert len(quantised) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in quantised)
    plain.teacher.dequantize()
    assert {type(part).__module__.split(".")[0] for part in plain.teacher.modules()} <= {"torch", "transformers"}
    found, expected = encoder_gradient(module), encoder_gradient(plain.float())
    assert expected.norm() > 0
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > alike


def encoder_gradient(module: Distillation) -> torch.Tensor:
    """The gradient of the switch term alone, which reaches the student's encoder through the whole teacher."""
    object.__setattr__(module.objective, "lambda_ce", 0.0)
    object.__setattr__(module.objective, "lambda_dbild", 0.0)
    module.activation_checkpointing_enable()
    module(**make_batch(module))["loss"].backward()
    encoder = module.student.model.vision_tower
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def test_eager_attention_is_the_same_model(tiny_checkpoint: Path) -> None:
    """The kernels are chosen for every part of both models, whatever the folders say."""
    eager = {"attn_implementation": "eager"}
    module, plain = (make_module(make_recipe(tiny_checkpoint, given, given)) for given in (eager, None))
    assert module.teacher is not None
    for model in (module.student, module.teacher):
        for part in (model.model.vision_tower, model.model.language_model):
            assert part.config._attn_implementation == "eager"
    batch = make_batch(module)
    torch.testing.assert_close(module(**batch)["loss"], plain(**batch)["loss"])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"teacher": {"dtype": "half"}},
            "teacher: dtype is 'half', expected one of bfloat16, float16, float32, or null",
        ),
        (
            {"teacher": {"quantization": "8-bit"}},
            "teacher: quantization is '8-bit', expected one of 8bit, 4bit, or null",
        ),
        ({"teacher": {"quantisation": "8bit"}}, "teacher: unknown key 'quantisation'; did you mean 'quantization'"),
        (
            {"teacher": {"attn_implementation": "flash_attention_2"}},
            "teacher: attn_implementation is 'flash_attention_2'",
        ),
        ({"model": {"attn_implementation": "sdpaa"}}, "model: attn_implementation is 'sdpaa'"),
        ({"use_liger_kernel": True}, "stage dft: use_liger_kernel is true and there is no CUDA device"),
    ],
)
def test_what_cannot_be_held_is_refused(
    tiny_checkpoint: Path, given: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=reason):
        make_module(make_recipe(tiny_checkpoint, **given))


def test_deepspeed_is_for_processes_of_a_launcher(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process alone trains from the same recipe without it; with use_cpu it would silently be left out."""
    recipe = make_recipe(tiny_checkpoint, {"quantization": "8bit"}, deepspeed="zero3", use_cpu=True)
    assert training_arguments(recipe.stages[0], tmp_path, 0).deepspeed is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="stage dft: training: deepspeed and use_cpu"):
        training_arguments(recipe.stages[0], tmp_path, 0)
    with pytest.raises(RecipeError, match="quantization is '8bit' and ZeRO-3 cannot share out"):
        make_module(recipe)
    with pytest.raises(RecipeError, match="zero4: no such recipe file"):
        training_arguments(make_recipe(tiny_checkpoint, deepspeed="zero4").stages[0], tmp_path, 0)


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit"])
def test_optimizers_take_the_student_and_the_adapters_alone(
    tiny_checkpoint: Path, tmp_path: Path, optimizer: str
) -> None:
    recipe = make_recipe(tiny_checkpoint, optim=optimizer, use_cpu=True, report_to="none")
    module = make_module(recipe)
    student = stage_student(recipe, recipe.stages[0], None)
    arguments = training_arguments(recipe.stages[0], tmp_path, 0)
    trainer = DistillationTrainer(module, student, "dft", tmp_path, args=arguments, train_dataset=None)
    chosen = trainer.create_optimizer()
    held = {id(p) for group in chosen.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.student.parameters()}
    before = module.student.lm_head.weight.clone()
    module(**make_batch(module))["loss"].backward()
    chosen.step()
    assert not torch.equal(before, module.student.lm_head.weight)
