"""What a person sees of a run: a progress bar, and every log as a line of JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG_NAME = "log.jsonl"


class StageProgress(TrainerCallback):
    """A progress bar with the stage's name, the loss and a time left; silent where standard error is no terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where the run stands."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                desc=self._title, total=state.max_steps, initial=state.global_step, disable=None, unit="step"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the loss."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class JsonLines(TrainerCallback):
    """Every log as a line of JSON in the run's folder, whatever else reports; each attempt opens with `began`."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where this attempt begins."""
        self._append(args, state, {"began": True})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append the line."""
        if logs:
            self._append(args, state, logs)

    def _append(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            line = {"step": state.global_step, "time": round(time.time(), 3)} | logs
            with (Path(str(args.output_dir)) / LOG_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
