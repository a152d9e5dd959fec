"""What of a GPU's memory does not depend on the batch: weights, gradients, optimizer states and exchange, by part.

As torch's AdamW, DDP and DeepSpeed's ZeRO hold them; N below is the number of GPUs, e the bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, TrainingArguments

from ..models.vlm import train_only
from ..recipe.arguments import read_deepspeed
from ..recipe.model_sizes import build_without_memory
from ..recipe.recipe import ACCUMULATION, RecipeError, StageRecipe, TeacherRecipe
from .fake_step import GRADIENTS, Arrangement

# Bytes of optimizer state a trained parameter.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2.0,
    "adamw_8bit": 2.0,
    "paged_adamw": 8.0,
    "paged_adamw_32bit": 8.0,
    "paged_adamw_8bit": 2.0,
    "sgd": 0.0,
}
# Bytes of a weight in bitsandbytes, with the scales of 4 bit's blocks of 64.
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5625}
# DeepSpeed's buffers in multiples of its bucket, with and without overlap: those being filled, and copies on the way.
BUCKETS = {True: 4.5, False: 2.0}
# DeepSpeed's own defaults, in elements.
BUCKET, LIVE = 5e8, 1e9


@dataclass(frozen=True)
class Sizes:
    """Parameters of the student that train and that do not, of the teacher, and of its layers that can be quantised."""

    trained: int
    frozen: int
    teacher: int
    quantizable: int


@dataclass(frozen=True)
class Holding:
    """How a stage holds its models on each of `gpus`; `zero` is DeepSpeed's stage, 0 without it."""

    gpus: int
    micro_batch: int
    accumulation: int
    optimizer: str
    zero: int
    deepspeed: dict[str, Any]
    quantization: str | None
    arrangement: Arrangement


def holding(stage: StageRecipe, teacher: TeacherRecipe | None, gpus: int) -> Holding:
    """How a stage is held by so many processes, as `training_arguments` and `load_teacher` have it.

    Raises RecipeError.
    """
    training = stage.training_on(gpus)
    half = torch.bfloat16 if training.get("bf16") else torch.float16 if training.get("fp16") else None
    # One process without a launcher trains without DeepSpeed: it has nobody to share with.
    given = training.get("deepspeed") if gpus > 1 else None
    deepspeed = read_deepspeed(given) if given is not None else {}
    accumulation = int(training.get(ACCUMULATION, 1))
    zero = int(deepspeed.get("zero_optimization", {}).get("stage", 0))
    optimizer = str(training.get("optim", TrainingArguments.optim))
    optimizer = optimizer.rpartition(".")[2].lower()  # a default is OptimizerNames.ADAMW_TORCH
    if optimizer not in OPTIMIZER_BYTES:
        raise RecipeError(
            f"stage {stage.name}: the memory of optim {optimizer!r} is not known; known are "
            f"{', '.join(OPTIMIZER_BYTES)}"
        )
    wanted = teacher.dtype if teacher is not None else None
    teacher_dtype: torch.dtype = getattr(torch, wanted) if wanted else half or torch.float32
    arrangement = Arrangement(
        train=stage.train,
        # DeepSpeed turns all weights to the half precision, with a copy in float32 of those that train.
        student_dtype=half if deepspeed and half else torch.float32,
        teacher_dtype=half if deepspeed and half else teacher_dtype,
        autocast=None if deepspeed else half,
        checkpointing=checkpointing(training),
        accumulates=accumulation > 1,
        keeps_gradients=zero < 2,
    )
    micro = int(training.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size))
    quantization = teacher.quantization if teacher is not None else None
    return Holding(gpus, micro, accumulation, optimizer, zero, deepspeed, quantization, arrangement)


def checkpointing(training: dict[str, Any]) -> bool:
    """Whether activations are computed again in the backward, under either of the names that transformers has had."""
    return bool(training.get("activation_checkpointing") or training.get("gradient_checkpointing"))


def sizes(student: LlavaConfig, teacher: LlavaConfig | None, train: tuple[str, ...]) -> Sizes:
    """Count parameters on the classes that training uses. Raises ModelError."""
    model = build_without_memory(student, torch.float32)
    train_only(model, train)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, learns in counts if learns)
    frozen = sum(size for size, learns in counts if not learns)
    if teacher is None:
        return Sizes(trained, frozen, 0, 0)
    theirs = build_without_memory(teacher, torch.float32)
    layers = [layer for layer in theirs.model.language_model.modules() if isinstance(layer, nn.Linear)]
    return Sizes(
        trained,
        frozen,
        sum(parameter.numel() for parameter in theirs.parameters()),
        sum(layer.weight.numel() for layer in layers),
    )


def fixed_bytes(how: Holding, size: Sizes) -> dict[str, float]:
    """Bytes of a GPU by part that are held through the whole stage; gradients only where ZeRO shares them out."""
    element = how.arrangement.student_dtype.itemsize
    teacher = float(size.teacher * how.arrangement.teacher_dtype.itemsize)
    if how.quantization is not None:
        whole = how.arrangement.teacher_dtype.itemsize
        teacher -= size.quantizable * (whole - QUANTIZED_BYTES[how.quantization])
    shared = how.gpus if how.zero == 3 else 1
    held = {
        "student's weights, trained": size.trained * element / shared,
        "student's weights, frozen": size.frozen * element / shared,
        "teacher's weights": teacher / shared,
        "optimizer": size.trained * OPTIMIZER_BYTES[how.optimizer] / (how.gpus if how.zero else 1),
    }
    if not how.deepspeed:
        # DDP's buckets hold the gradients a second time.
        exchange = {"exchange": float(size.trained * element)} if how.gpus > 1 else {}
        return held | exchange
    return held | _zero_bytes(how, size, element)


def _zero_bytes(how: Holding, size: Sizes, element: int) -> dict[str, float]:
    settings = how.deepspeed.get("zero_optimization", {})
    held: dict[str, float] = {"float32 copy": size.trained * 4 / max(1, how.gpus if how.zero else 1)}
    if how.zero >= 2:
        # A GPU's share; ZeRO-2 keeps the sum over micro-batches beside that of the last one, ZeRO-3 adds in place.
        copies = 2 if how.zero == 2 and how.accumulation > 1 else 1
        held[GRADIENTS] = copies * size.trained * element / how.gpus
    bucket = float(settings.get("reduce_bucket_size", BUCKET))
    held["exchange"] = BUCKETS[bool(settings.get("overlap_comm", False))] * bucket * element
    if how.zero == 3:
        live = float(settings.get("stage3_max_live_parameters", LIVE))
        held["gathered weights"] = min(live, size.trained + size.frozen + size.teacher) * element
    return held


def update_bytes(how: Holding, size: Sizes) -> float:
    """Bytes beside the fixed ones while the optimizer steps: gradients, and copies in the optimizer's precision."""
    element = how.arrangement.student_dtype.itemsize
    if how.deepspeed:
        kept = size.trained * element if how.zero < 2 else 0
        return kept + size.trained * 4 / (how.gpus if how.zero else 1)
    # Unfused AdamW works on all parameters at once on a GPU.
    return size.trained * element * (2 if how.optimizer == "adamw_torch" else 1)
