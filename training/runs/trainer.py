"""The Hugging Face Trainer with a distillation objective in it: the student is saved, the teacher never."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..data.conversations import DataError
from ..data.dataset import ConversationDataset
from ..data.sampler import epoch_sampler
from ..models.distillation import Distillation
from ..models.vlm import Vlm
from ..objectives.finite import before_the_update, check_gradients, check_terms, naming
from ..process.stopping import StopRequest, leave_stopping_to_the_trainer
from .meter import Meter
from .progress import JsonLines, StageProgress, report_in
from .saving_trainer import SavingTrainer


class DistillationTrainer(SavingTrainer):
    """Trains a `Distillation`'s student; logs every term of the objective beside the loss.

    The loss of a step is the sum over supervised tokens divided by their number over all ranks and
    accumulated batches, which the Trainer counts and hands over as `num_items_in_batch`.
    """

    def __init__(
        self,
        model: Distillation,
        vlm: Vlm,
        title: str,
        logs: Path,
        *,
        stop: StopRequest | None = None,
        announce: Callable[[str], None] = lambda _: None,
        **settings: Any,
    ) -> None:
        super().__init__(model, vlm, stop=stop or StopRequest(), announce=announce, **settings)
        self.model_accepts_loss_kwargs = True
        self._meter = Meter()
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._progress = StageProgress(title)
        self.add_callback(self._progress)
        self.add_callback(JsonLines())
        self.add_callback(self._stopping)
        self.add_callback(self._meter)
        report_in(self, logs)

    def train(self, *arguments: Any, **settings: Any) -> TrainOutput:
        """The Trainer's, which closes its bar before an error is shown."""
        try:
            return super().train(*arguments, **settings)
        finally:
            self._progress.close()

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        """The Trainer's, but for a run that was killed between its last checkpoint and its end: it has no step left.

        The Trainer looks at the number of steps after a step only, and would take one more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **settings)

    def _init_training_state(self, max_steps: int, *arguments: Any) -> Any:
        """The Trainer's, but how often is logged and saved is what the recipe says now, and not what it said once."""
        warns = logging.getLogger("transformers.trainer_utils")  # of another micro-batch, which changes no step
        level = warns.level
        warns.setLevel(logging.ERROR)
        try:
            place = super()._init_training_state(max_steps, *arguments)
        finally:
            warns.setLevel(level)
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        return place

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss (0-dim); what else is measured is kept for the next log.

        Raises NonFiniteError, and DataError for a step without a supervised token, unless its samples were lost.
        """
        samples, lost = inputs.pop("sample_ids", ()), inputs.pop("lost", ())
        assert num_items_in_batch is not None  # the Trainer counts labels
        supervised = num_items_in_batch
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # where all are lost a loss of 0, and not 0 / 0
        # Here and not after the backward, in which DeepSpeed changes the weights.
        with before_the_update(self.state.global_step + 1), naming(f"samples {', '.join(samples)}"):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            check_terms(loss, outputs["terms"])
        if not all(lost) and int(supervised) == 0:  # asked behind the wait for the device
            raise DataError(
                f"step {self.state.global_step + 1}: not one supervised token, and nothing would be learned; its "
                f"samples are {', '.join(samples)}. Look at them with `switchkd data check`"
            )
        if model.training:
            self._meter.add(outputs, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *arguments: Any, **settings: Any) -> Tensor:
        """Forward and backward of a micro-batch; a step's last checks the gradients. Raises NonFiniteError."""
        loss = super().training_step(model, *arguments, **settings)
        scaled = self.accelerator.scaler is not None  # fp16: the scaler meets infinite gradients, and skips the step
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled and not scaled:
            with before_the_update(self.state.global_step + 1):
                check_gradients(model)
        return loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, with workers that a signal from outside does not end."""
        loader = super().get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)
        base.worker_init_fn = functools.partial(leave_stopping_to_the_trainer, then=base.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's sampler; lengths come from the dataset, which knows them without decoding pictures."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not isinstance(dataset, ConversationDataset):
            return super()._get_train_sampler(train_dataset)
        return epoch_sampler(self.args, dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step; the time spent waiting for them is measured."""
        return super().get_batch_samples(self._meter.timed(epoch_iterator), num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training log what was measured since the one before, over all ranks."""
        if "loss" in logs:
            logs |= self._meter.read(self.state.global_step, self.state.max_steps)
        super().log(logs, start_time)
