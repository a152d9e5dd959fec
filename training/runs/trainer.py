"""The Hugging Face Trainer with a distillation objective in it: the student is saved, the teacher never."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..data.conversations import DataError
from ..data.dataset import ConversationDataset
from ..data.sampler import LengthGroupedSampler
from ..models.distillation import Distillation
from ..models.vlm import Vlm
from ..objectives.finite import before_the_update, check_gradients, check_terms, naming
from ..process.stopping import StopRequest, leave_stopping_to_the_trainer
from ..recipe.arguments import gathered, load_whole_models
from .checkpoints import MAKE_ROOM, CheckpointError, commit, discard, writing
from .meter import Meter
from .progress import JsonLines, StageProgress, report_in

ADAPTERS_NAME = "adapters.safetensors"  # beside the student in checkpoints to resume from
FAILED_SAVES = 3  # one after the other, and a run without checkpoints would go on for days


class DistillationTrainer(Trainer):
    """Trains a `Distillation`'s student; logs every term of the objective beside the loss.

    The loss of a step is the sum over supervised tokens divided by their number over all ranks and
    accumulated batches, which the Trainer counts and hands over as `num_items_in_batch`. After a request to `stop` the
    step in progress is finished and saved, and `stopped` is true.
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
        super().__init__(model=model, **settings)
        load_whole_models()
        self.model_accepts_loss_kwargs = True
        self._vlm = vlm
        self._adapters = model.adapters
        self._meter = Meter()
        self._announce = announce
        self._saved_step: int | None = None
        self._failed_saves = 0
        self._stopping = StopAtStepEnd(self, stop or StopRequest())
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
        # Whole steps, and not whole micro-batches: so an epoch does not depend on how a step is put together.
        size, drop = step_batch(self.args), self.args.dataloader_drop_last
        count = len(dataset) - len(dataset) % size if drop else len(dataset)
        if self.args.train_sampling_strategy == "group_by_length":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return LengthGroupedSampler(dataset.lengths(), size, seed, drop)
        if self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(range(count))
        return RandomSampler(dataset, num_samples=count)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step; the time spent waiting for them is measured."""
        return super().get_batch_samples(self._meter.timed(epoch_iterator), num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training log what was measured since the one before, over all ranks."""
        if "loss" in logs:
            logs |= self._meter.read(self.state.global_step, self.state.max_steps)
        super().log(logs, start_time)

    @property
    def stopped(self) -> bool:
        """Whether training ended before its last step, because it was asked to."""
        return self._stopping.agreed and self.state.global_step < self.state.max_steps

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save and commit; only then older checkpoints go. A failed save is announced, and training goes on.

        Raises CheckpointError after FAILED_SAVES of them, or if the run is to stop here.
        """
        if self._saved_step == self.state.global_step:  # at the end of an epoch it may be asked for twice
            return
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the Trainer would delete at once
        try:
            failure = self._failure(lambda: super(DistillationTrainer, self)._save_checkpoint(model, trial), folder)
        finally:
            self.args.save_total_limit = limit
        if failure is None:
            failure = self._failure(lambda: commit(folder) if self.is_world_process_zero() else None, folder)
        if failure is not None:
            self._go_on_without(folder, failure)
            return
        self._saved_step, self._failed_saves = self.state.global_step, 0
        if self.args.should_save:
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint)

    def _failure(self, write: Callable[[], None], folder: Path) -> str | None:
        """Why any of the ranks could not write, told to all of them."""
        failure = None
        try:
            with writing(folder):
                write()
        except CheckpointError as error:
            if self.is_deepspeed_enabled and self.args.world_size > 1:
                raise  # the other ranks wait inside of DeepSpeed
            failure = str(error)
        return next((found for found in gather_object([failure]) if found), None)

    def _go_on_without(self, folder: Path, failure: str) -> None:
        self._failed_saves += 1
        if self.is_world_process_zero():
            discard(folder)
        if self._stopping.agreed or self._failed_saves == FAILED_SAVES:
            raise CheckpointError(f"{failure}, save {self._failed_saves} in a row that failed; {MAKE_ROOM}")
        if self.is_world_process_zero():
            self._announce(f"{failure}; the checkpoint before is kept, and training goes on")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student's folder, by one rank; what ZeRO-3 has shared out of it is gathered, the teacher never."""
        with gathered([*self._vlm.model.parameters(), *self._adapters.parameters()]):
            self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            # DeepSpeed would write all that is frozen, the teacher with it. A stage's start brings it again.
            engine: Any = self.model_wrapped
            save = type(engine).save_checkpoint
            engine.save_checkpoint = functools.partial(save, engine, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self._vlm.model.save_pretrained(folder)
        self._vlm.processor.save_pretrained(folder)
        if adapters := self._adapters.state_dict():
            save_file({name: value.contiguous() for name, value in adapters.items()}, folder / ADAPTERS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        kind = type(self._vlm.model)  # a projector of our own has a class of its own
        saved = kind.from_pretrained(resume_from_checkpoint, dtype=self._vlm.model.dtype)
        self._vlm.model.load_state_dict(saved.state_dict())
        if self._adapters:
            self._adapters.load_state_dict(load_file(Path(resume_from_checkpoint) / ADAPTERS_NAME))


def step_batch(args: TrainingArguments) -> int:
    """Samples of an optimizer step over all processes."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


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
