"""How a stage holds its models: the teacher's precision and weights, attention, kernels, DeepSpeed, optimizers."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

from switchkd.cli.main import main
from switchkd.training.models.distillation import Distillation
from switchkd.training.models.vlm import load_vlm, train_only
from switchkd.training.recipe.arguments import training_arguments
from switchkd.training.recipe.recipe import Recipe, RecipeError
from switchkd.training.runs.stage_models import stage_distillation, stage_student
from switchkd.training.runs.trainer import DistillationTrainer

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


@pytest.fixture(scope="module")
def with_qwen3(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's files with CLIP and with Qwen3, whose attention has norms too; a head of its own."""
    folder = tmp_path_factory.mktemp("qwen3")
    vlm = load_vlm(tiny_checkpoint)
    plain = vlm.model.config.to_dict()
    vision: dict[str, Any] = {name: plain["vision_config"][name] for name in ("image_size", "patch_size")}
    vision |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = Qwen3Config(**{name: plain["text_config"][name] for name in names}, num_key_value_heads=2, head_dim=8)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=text,
        image_token_index=plain["image_token_index"],
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


LAYERS = {  # of a kind of layer: what has a matrix, and so decays
    "siglip": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
    "qwen": (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
}
TOWER, TEXT = "student.model.vision_tower", "student.model.language_model"
DECAYING = {
    f"{TOWER}.embeddings.patch_embedding.weight",
    f"{TOWER}.embeddings.position_embedding.weight",
    *(f"{TOWER}.encoder.layers.{i}.{name}.weight" for i in (0, 1) for name in LAYERS["siglip"]),
    "student.model.multi_modal_projector.linear_1.weight",
    "student.model.multi_modal_projector.linear_2.weight",
    f"{TEXT}.embed_tokens.weight",
    *(f"{TEXT}.layers.{i}.{name}.weight" for i in (0, 1) for name in LAYERS["qwen"]),
}


@pytest.mark.parametrize(
    ("checkpoint", "objective", "decaying"),
    [
        ("tiny_checkpoint", "align_kd", DECAYING | {"adapters.heads.weight", "adapters.tokens.weight"}),
        ("with_qwen3", "sft", DECAYING | {f"{TOWER}.embeddings.class_embedding", "student.lm_head.weight"}),
        ("ldpv2_checkpoint", "sft", DECAYING | {"student.model.multi_modal_projector.peg.weight"}),
    ],
)
def test_weight_decay_shrinks_matrices_and_leaves_out_biases_and_norms(
    checkpoint: str, objective: str, decaying: set[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """As LLaVA has it. A step whose gradient is zero moves a weight by its decay alone: by 1 − 0.5 · 0.1."""
    folder: Path = request.getfixturevalue(checkpoint)
    training = {"weight_decay": 0.1, "learning_rate": 0.5, "use_cpu": True, "report_to": "none"}
    recipe = make_recipe(folder, **training)
    stage = dataclasses.replace(recipe.stages[0], objective={"name": objective})
    student = stage_student(recipe, stage, None)
    train_only(student.model, stage.train)
    module = stage_distillation(recipe, stage, student)
    arguments = training_arguments(stage, tmp_path, 0)
    optimizer = DistillationTrainer(module, student, "dft", tmp_path, args=arguments).create_optimizer()
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learning.items()}
    for parameter in learning.values():
        parameter.data += 1.0  # so that what is zero at first can be seen to shrink
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name: p.detach() / (before[name] + 1) for name, p in learning.items()}
    assert {name for name, factor in moved.items() if not torch.equal(factor, torch.ones_like(factor))} == decaying
    for name in decaying:
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], 0.95))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"processor_config.json": {'      0.5\n    ],\n    "image_p': '      0.4\n    ],\n    "image_p'}},
            "pictures are prepared with mean (0.5, 0.5, 0.5) for the student and (0.5, 0.5, 0.4) for the teacher",
        ),
        (
            {"processor_config.json": {'"resample": 3': '"resample": 2'}},
            "pictures are prepared with resample 3 for the student and 2 for the teacher",
        ),
        (
            {"tokenizer.json": {'"(":': '"swap":', '"+":': '"(":', '"swap":': '"+":'}},
            "the tokenizers differ: from token",
        ),
        (
            {name: {"<|im_start|>": "<|begins|>"} for name in ("tokenizer.json", "tokenizer_config.json")},
            "the tokenizers' special tokens differ: {'<|im_start|>': 1} only in the student's, {'<|begins|>': 1} only",
        ),
    ],
)
def test_a_teacher_that_reads_or_sees_otherwise_is_refused_before_training(
    tiny_checkpoint: Path,
    one_stage_recipe: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, dict[str, str]],
    reason: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_checkpoint, teacher)
    for name, others in changes.items():
        text = (teacher / name).read_text()
        for old, new in others.items():
            assert old in text
            text = text.replace(old, new)
        (teacher / name).write_text(text)
    recipe = one_stage_recipe(tmp_path / "r.yaml", tiny_checkpoint)
    assert main(["train", str(recipe), f"teacher={teacher}"]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"error: stage dft: student and teacher do not fit: {reason}" in said
    assert not list((tmp_path / "out").glob("*dft*"))


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
