"""What a recipe takes before it is run: parameters, memory of a GPU by part, tokens and hours, and what would fit.

What does not depend on the batch is counted (`holding`), the rest is measured on a step without numbers (`fake_step`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from switchkd.export.llava.projectors import tokens_per_picture

from ..data.text_lengths import TextLengths, text_lengths
from ..models.chunks import LOGITS_AT_ONCE
from ..recipe.model_sizes import local_tokenizer, student_config, teacher_config
from ..recipe.recipe import ACCUMULATION, Recipe, RecipeError, StageRecipe, TeacherRecipe
from ..runs.stage_models import stage_objective
from .fake_step import ACTIVATIONS, BACKWARD, GRADIENTS, LOGITS, Batch, step_bytes, step_flops
from .holding import OPTIMIZER_BYTES, Holding, Sizes, checkpointing, fixed_bytes, holding, sizes, update_bytes

GB = 1e9
# Dense bfloat16 products of the data sheets, in TFLOP/s.
GPU_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX4090": 165.0}
# What no tensor accounts for, an allowance that was not measured: CUDA's context with cuBLAS's workspaces, NCCL's
# buffers, and the share of a step's tensors that the allocator loses between its blocks.
CONTEXT, NCCL, FRAGMENTATION = 1.0e9, 0.5e9, 0.05
# The logits of so many chunks of positions show all that there is to see of more.
CHUNKS = 3
SMALL_OPTIMIZER = "adamw_bnb_8bit"


@dataclass(frozen=True)
class Cluster:
    """The GPUs: how many, the bytes and TFLOP/s of each, and the share of these that training is assumed to use."""

    gpus: int
    memory: float
    tflops: float
    utilisation: float

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise RecipeError(f"--gpus is {self.gpus}, expected 1 or more")
        if not self.tflops > 0:
            raise RecipeError(f"--tflops is {self.tflops:g}, expected TFLOP/s above 0, such as 989 for an H100")
        if not 0 < self.utilisation <= 1:
            raise RecipeError(f"--mfu is {self.utilisation:g}, expected a share above 0 and up to 1, such as 0.35")


@dataclass(frozen=True)
class StageEstimate:
    """A stage: parameters, `memory` of a GPU in bytes by part, samples and tokens, FLOPs and hours.

    `steps`, `tokens` and `hours` are None where the number of samples is unknown. `remedies` are changes that were
    tried where the stage does not fit, each with the bytes it comes to.
    """

    name: str
    objective: str
    parameters: Sizes
    memory: dict[str, float]
    fits: bool
    micro_batch: int
    accumulation: int
    global_batch: int
    visual_tokens: int
    longest_tokens: int
    lengths: TextLengths
    flops_of_sample: float
    steps: int | None
    tokens: float | None
    hours: float | None
    remedies: tuple[tuple[str, float], ...] = ()

    @property
    def peak(self) -> float:
        """Bytes in all."""
        return sum(self.memory.values())


class Estimator:
    """Estimates a recipe's stages on a cluster; what was measured once is remembered.

    `text_tokens` and `samples` replace what is known of the data; `teacher_language_model` stands in for a teacher that
    is not there yet. Raises RecipeError or ModelError.
    """

    def __init__(
        self,
        recipe: Recipe,
        cluster: Cluster,
        *,
        teacher_language_model: str | None = None,
        text_tokens: int | None = None,
        samples: int | None = None,
    ) -> None:
        self._recipe, self._cluster = recipe, cluster
        self._text_tokens, self._samples = text_tokens, samples
        self._student = student_config(recipe)
        taught = any(stage_objective(stage).needs_teacher for stage in recipe.stages)
        self._teacher = teacher_config(recipe, teacher_language_model) if taught else None
        tokenizer = local_tokenizer(recipe.model)
        self._lengths = {stage.name: self._lengths_of(stage, tokenizer) for stage in recipe.stages}
        self._sizes = {
            stage.name: sizes(self._student, self._teacher_of(stage), stage.train) for stage in recipe.stages
        }
        self._measured: dict[Any, dict[str, int]] = {}

    def stages(self) -> list[StageEstimate]:
        """Every stage in turn, with what would make it fit where it does not."""
        estimates = []
        for stage in self._recipe.stages:
            estimate = self._stage(stage)
            if not estimate.fits:
                estimate = dataclasses.replace(estimate, remedies=tuple(self._remedies(stage, self._recipe.teacher)))
            estimates.append(estimate)
        return estimates

    def _stage(self, stage: StageRecipe) -> StageEstimate:
        how, lengths = holding(stage, self._recipe.teacher, self._cluster.gpus), self._lengths[stage.name]
        memory, visual = self.memory(stage, self._recipe.teacher), tokens_per_picture(self._student)
        batch = how.micro_batch * how.accumulation * how.gpus
        average = Batch(1, max(1, round(lengths.text)), max(1, min(round(lengths.supervised), round(lengths.text))))
        flops = step_flops(self._student, self._teacher_of(stage), stage_objective(stage), how.arrangement, average)
        steps, seen = _steps(stage, batch, lengths.samples)
        hours = None
        if seen is not None:
            used = self._cluster.gpus * self._cluster.tflops * 1e12 * self._cluster.utilisation
            hours = seen * flops / used / 3600
        return StageEstimate(
            name=stage.name,
            objective=str(stage.objective["name"]),
            parameters=self._sizes[stage.name],
            memory=memory,
            fits=sum(memory.values()) <= self._cluster.memory,
            micro_batch=how.micro_batch,
            accumulation=how.accumulation,
            global_batch=batch,
            visual_tokens=visual,
            longest_tokens=visual + self._longest_text(stage),
            lengths=lengths,
            flops_of_sample=flops,
            steps=steps,
            tokens=None if seen is None else seen * (lengths.with_picture * visual + lengths.text),
            hours=hours,
        )

    def memory(self, stage: StageRecipe, teacher: TeacherRecipe | None) -> dict[str, float]:
        """Bytes of a GPU by part at the moment when most are held, of a batch of the longest samples."""
        how, size = holding(stage, teacher, self._cluster.gpus), self._sizes[stage.name]
        fixed = fixed_bytes(how, size)
        step: dict[str, float] = dict(self._step(stage, how))
        update = update_bytes(how, size)
        if update > sum(step.values()):  # the optimizer's own moment, when activations are gone, is the larger one
            step = {GRADIENTS: min(update, step.get(GRADIENTS, 0))}
            step[BACKWARD] = update - step[GRADIENTS]
        loose = FRAGMENTATION * sum(step.values())
        step[GRADIENTS] = step.get(GRADIENTS, 0) + fixed.pop(GRADIENTS, 0)
        in_order = dict.fromkeys((ACTIVATIONS, LOGITS, BACKWARD, GRADIENTS), 0.0) | step
        return fixed | in_order | {"allowance": CONTEXT + (NCCL if how.gpus > 1 else 0) + loose}

    def _step(self, stage: StageRecipe, how: Holding) -> dict[str, int]:
        objective, teacher, text = stage_objective(stage), self._teacher_of(stage), self._longest_text(stage)
        words: Any = self._student.text_config
        chunk = max(1, LOGITS_AT_ONCE // int(words.vocab_size))
        batch = Batch(how.micro_batch, text, min(text, math.ceil(CHUNKS * chunk / how.micro_batch)))
        key = stage.name, how.arrangement, batch
        if key not in self._measured:
            self._measured[key] = step_bytes(self._student, teacher, objective, how.arrangement, batch)
        return self._measured[key]

    def _remedies(self, stage: StageRecipe, teacher: TeacherRecipe | None) -> Iterator[tuple[str, float]]:
        """Each single change that makes the stage fit; where none does, all of them together."""
        found = False
        kinds = (_checkpointing, _smaller_batch, self._more_zero, _quantized, _small_optimizer)
        for kind in kinds:
            for text, changed, holder in kind(stage, teacher):
                size = sum(self.memory(changed, holder).values())
                if size <= self._cluster.memory:
                    found = True
                    yield text, size
                    break
        if found:
            return
        texts = []
        for kind in kinds:
            for text, changed, holder in list(kind(stage, teacher))[-1:]:
                stage, teacher = changed, holder
                texts.append(text)
        yield " + ".join(texts) or "no change left to try", sum(self.memory(stage, teacher).values())

    def _more_zero(self, stage: StageRecipe, teacher: TeacherRecipe | None) -> Iterator[_Change]:
        how = holding(stage, teacher, self._cluster.gpus)
        names = {0: ("zero2", "zero3"), 1: ("zero2", "zero3"), 2: ("zero3",)}.get(how.zero, ())
        for name in names if how.gpus > 1 else ():
            if name == "zero2" or how.quantization is None:  # ZeRO-3 cannot share out quantised weights
                yield f"deepspeed: {name}", _with(stage, deepspeed=name), teacher

    def _lengths_of(self, stage: StageRecipe, tokenizer: PreTrainedTokenizerBase | None) -> TextLengths:
        lengths = text_lengths(stage.data, tokenizer)
        if self._samples is not None:
            lengths = dataclasses.replace(lengths, samples=self._samples)
        if self._text_tokens is not None:
            share = self._text_tokens / lengths.text
            lengths = dataclasses.replace(
                lengths, text=self._text_tokens, supervised=share * lengths.supervised, basis="--text-tokens"
            )
        limit = stage.data.max_length
        return lengths if limit is None else dataclasses.replace(lengths, text=min(lengths.text, limit))

    def _longest_text(self, stage: StageRecipe) -> int:
        visual, longest = tokens_per_picture(self._student), self._lengths[stage.name].longest
        limit = stage.data.max_length
        return max(1, longest if limit is None else min(longest, limit - visual))

    def _teacher_of(self, stage: StageRecipe) -> Any:
        return self._teacher if stage_objective(stage).needs_teacher else None


_Change = tuple[str, StageRecipe, TeacherRecipe | None]


def _checkpointing(stage: StageRecipe, teacher: TeacherRecipe | None) -> Iterator[_Change]:
    if not checkpointing(stage.training):
        yield "gradient_checkpointing: true", _with(stage, gradient_checkpointing=True), teacher


def _smaller_batch(stage: StageRecipe, teacher: TeacherRecipe | None) -> Iterator[_Change]:
    """Half the micro-batch again and again; the global batch stays."""
    how = holding(stage, teacher, 1)
    size, accumulation = how.micro_batch, int(stage.training.get(ACCUMULATION, 1))
    while size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        kept = {} if stage.global_batch else {ACCUMULATION: accumulation}
        text = f"per_device_train_batch_size: {size}" + "".join(f", {key}: {value}" for key, value in kept.items())
        yield text, _with(stage, per_device_train_batch_size=size, **kept), teacher


def _quantized(stage: StageRecipe, teacher: TeacherRecipe | None) -> Iterator[_Change]:
    objective = stage_objective(stage)
    if teacher is None or not objective.needs_teacher or stage.training.get("deepspeed") == "zero3":
        return
    for name in ("8bit", "4bit") if teacher.quantization is None else ():
        yield f"teacher.quantization: {name}", stage, dataclasses.replace(teacher, quantization=name)


def _small_optimizer(stage: StageRecipe, teacher: TeacherRecipe | None) -> Iterator[_Change]:
    if OPTIMIZER_BYTES[holding(stage, teacher, 1).optimizer] > OPTIMIZER_BYTES[SMALL_OPTIMIZER]:
        yield f"optim: {SMALL_OPTIMIZER}", _with(stage, optim=SMALL_OPTIMIZER), teacher


def _with(stage: StageRecipe, **training: Any) -> StageRecipe:
    return dataclasses.replace(stage, training=stage.training | training)


def _steps(stage: StageRecipe, batch: int, samples: int | None) -> tuple[int | None, float | None]:
    """Optimizer steps of a stage, and how many samples they see."""
    most = int(stage.training.get("max_steps", -1))
    if most > 0:
        return most, float(most * batch)
    if samples is None:
        return None, None
    seen = samples * float(stage.training.get("num_train_epochs", 3))
    steps = seen // batch if stage.training.get("dataloader_drop_last") else math.ceil(seen / batch)
    return int(steps), seen
