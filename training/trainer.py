"""The Hugging Face Trainer with a distillation objective in it: the student is saved, the teacher never."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .conversations import ConversationDataset
from .distillation import Distillation
from .progress import JsonLines, StageProgress
from .sampler import LengthGroupedSampler
from .vlm import Vlm

ADAPTERS_NAME = "adapters.safetensors"  # beside the student in checkpoints to resume from


class DistillationTrainer(Trainer):
    """Trains a `Distillation`'s student; logs every term of the objective beside the loss.

    The loss of a step is the sum over supervised tokens divided by their number over all ranks and
    accumulated batches, which the Trainer counts and hands over as `num_items_in_batch`.
    """

    def __init__(self, model: Distillation, vlm: Vlm, title: str, **settings: Any) -> None:
        super().__init__(model=model, **settings)
        self.model_accepts_loss_kwargs = True
        self._vlm = vlm
        self._adapters = model.adapters
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(StageProgress(title))
        self.add_callback(JsonLines())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss (0-dim); its terms are kept for the next log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name, value in outputs["terms"].items():
            self._terms[name].append(value)
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's sampler; lengths come from the dataset, which knows them without decoding pictures."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(dataset, ConversationDataset):
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(dataset.lengths(), size, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term since the last log."""
        for name, values in self._terms.items():
            logs[name] = torch.stack([value.float() for value in values]).mean().item()
        self._terms.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        student, adapters = None, self._adapters.state_dict()
        if state_dict is not None:  # DeepSpeed gathers the whole module's
            student, adapters = _part(state_dict, "student."), _part(state_dict, "adapters.")
        self._vlm.model.save_pretrained(folder, state_dict=student)
        self._vlm.processor.save_pretrained(folder)
        if adapters:
            save_file({name: value.contiguous() for name, value in adapters.items()}, folder / ADAPTERS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        kind = type(self._vlm.model)  # a projector of our own has a class of its own
        saved = kind.from_pretrained(resume_from_checkpoint, dtype=self._vlm.model.dtype)
        self._vlm.model.load_state_dict(saved.state_dict())
        if self._adapters:
            self._adapters.load_state_dict(load_file(Path(resume_from_checkpoint) / ADAPTERS_NAME))


def _part(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
