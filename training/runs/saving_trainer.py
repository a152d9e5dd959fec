"""A Trainer whose checkpoints hold the student and never the teacher, and whose run outlives a save that fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..models.distillation import Distillation
from ..models.vlm import Vlm
from ..process.stopping import StopRequest
from ..recipe.arguments import gathered, load_whole_models
from .checkpoints import MAKE_ROOM, CheckpointError, commit, discard, writing
from .stop_at_step_end import StopAtStepEnd

ADAPTERS_NAME = "adapters.safetensors"  # beside the student in checkpoints to resume from
FAILED_SAVES = 3  # one after the other, and a run without checkpoints would go on for days


class SavingTrainer(Trainer):
    """Saves a `Distillation`'s student, in one rank, whole or not at all.

    After a request to `stop` the step in progress is finished and saved, and `stopped` is true.
    """

    def __init__(
        self, model: Distillation, vlm: Vlm, *, stop: StopRequest, announce: Callable[[str], None], **settings: Any
    ) -> None:
        super().__init__(model=model, **settings)
        load_whole_models()
        self._vlm = vlm
        self._adapters = model.adapters
        self._announce = announce
        self._saved_step: int | None = None
        self._failed_saves = 0
        self._stopping = StopAtStepEnd(self, stop)

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
            failure = self._failure(lambda: super(SavingTrainer, self)._save_checkpoint(model, trial), folder)
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
