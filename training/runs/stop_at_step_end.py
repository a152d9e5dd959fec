"""How a request to stop ends a run: all ranks agree at the end of a step, and save it."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..process.stopping import StopRequest


class StopAtStepEnd(TrainerCallback):
    """Looks at the end of every step for a request to stop, agrees on it with the other ranks, and saves the step."""

    def __init__(self, trainer: Trainer, stop: StopRequest) -> None:
        self._trainer = trainer
        self._stop = stop
        self.agreed = False

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the sampler its epoch: accelerate does not reach it where several ranks resume within an epoch."""
        sampler = kwargs["train_dataloader"].batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        if hasattr(sampler.sampler, "set_epoch"):
            sampler.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log and a checkpoint if any rank was asked to stop."""
        if self._stop.requested:
            self._trainer.accelerator.set_trigger()
        if self._trainer.accelerator.check_trigger():
            self.agreed = True
            control.should_log = control.should_save = True
            control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after the save: the checkpoint holds what was decided before, and must not say that it ends there."""
        if self.agreed:
            control.should_training_stop = True
