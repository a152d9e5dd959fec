"""What a person sees of a run: a progress bar or lines in a job's log, every log as a line of JSON, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

LOG_NAME = "log.jsonl"
WIDTH = 100  # columns of the bar at most
SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal
# What a training log holds beside the objective's terms and the statistics of k.
MEASURED = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "samples_per_second",
    "data_wait",
    "memory_gib",
    "memory_reserved_gib",
    "seconds_left",
}
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"


class StageProgress(TrainerCallback):
    """Two lines that stay in place: a bar with the time left, and the last log's numbers.

    Where standard error is no terminal, a line every half minute at most, so that a job's log shows life.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm[Any] | None = None
        self._numbers: tqdm[Any] | None = None
        self._line_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where the run stands."""
        self._line_at = time.monotonic()
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        # One column is kept free: a full line makes some terminals begin another.
        shared: dict[str, Any] = {"ncols": min(WIDTH, shutil.get_terminal_size().columns - 1), "leave": True}
        self._bar = tqdm(
            desc=self._title,
            total=state.max_steps,
            initial=state.global_step,
            bar_format=_BAR,
            smoothing=0,  # the time left by the mean of this attempt, as the log has it
            **shared,
        )
        self._numbers = tqdm(bar_format="{desc}", position=1, **shared)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the numbers."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if self._bar is not None and self._numbers is not None:
            self._bar.set_postfix_str(speed(logs))
            self._numbers.set_description_str(f"  {losses(logs)}")
        elif time.monotonic() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = time.monotonic()
            left = tqdm.format_interval(logs["seconds_left"]) if "seconds_left" in logs else "?"
            step = f"step {state.global_step}/{state.max_steps}"
            sys.stderr.write(f"{self._title}: {step}, {left} left, {speed(logs)}; {losses(logs)}\n")
            sys.stderr.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Leave the bar as it is; what is written next begins on a line of its own."""
        for line in (self._bar, self._numbers):
            if line is not None:
                line.close()


def speed(logs: dict[str, float]) -> str:
    """Tokens a second, memory, and a share of waiting that is worth a look, as far as a log has them."""
    said = []
    if "tokens_per_second" in logs:
        said.append(f"{_rounded(logs['tokens_per_second'])} tokens/s")
    if "memory_gib" in logs:
        said.append(f"{logs['memory_gib']:.1f} GiB")
    if logs.get("data_wait", 0) >= 0.1:
        said.append(f"{100 * logs['data_wait']:.0f}% waiting for data")
    return ", ".join(said)


def losses(logs: dict[str, float]) -> str:
    """The loss, its terms, the learning rate and the mean k, as far as a log has them."""
    said = [f"loss {logs['loss']:.4g}"]
    terms = [f"{name} {value:.3g}" for name, value in terms_of(logs).items()]
    if terms:
        said.append(" ".join(terms))
    if "learning_rate" in logs:
        said.append(f"lr {logs['learning_rate']:.2g}")
    k = [f"{who} {_rounded(logs[f'k_{who}'])}" for who in ("teacher", "student") if logs.get(f"k_{who}")]
    if k:
        said.append(f"k {' '.join(k)}")
    return " | ".join(said)


def terms_of(logs: dict[str, float]) -> dict[str, float]:
    """The objective's terms of a training log."""
    return {name: value for name, value in logs.items() if name not in MEASURED | {"step", "time"} and name[:2] != "k_"}


class JsonLines(TrainerCallback):
    """Every log as a line of JSON in the run's folder, whatever else reports; each attempt opens with `began`.

    What a full disk refuses waits for the next line: a run outlives such a while, and so does its log.
    """

    def __init__(self) -> None:
        self._waiting = b""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where this attempt begins, on a line of its own: a kill may have cut off the one before."""
        path = Path(str(args.output_dir)) / LOG_NAME
        if state.is_world_process_zero and path.is_file() and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
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
            self._waiting += f"{json.dumps(line)}\n".encode()
            with contextlib.suppress(OSError), (Path(str(args.output_dir)) / LOG_NAME).open("ab", buffering=0) as file:
                while self._waiting:
                    self._waiting = self._waiting[file.write(self._waiting) :]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a stage's log, all attempts'; one that a kill cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def training_rows(path: Path) -> list[dict[str, Any]]:
    """The training logs that led to the model, each step's once: what a later attempt did again counts once."""
    rows: list[dict[str, Any]] = []
    for row in read_log(path):
        if "began" in row:
            rows = [kept for kept in rows if kept["step"] <= row["step"]]
        elif "loss" in row:
            rows.append(row)
    return rows


class TensorBoard(TensorBoardCallback):
    """TensorBoard's events in a folder that outlives the stage's work; an attempt hides what it does again."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = self.logging_dir or str(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the events where the run stands."""
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


class Wandb(WandbCallback):
    """wandb's run, ended with the stage: the next stage's steps begin again, and would go on in the same run."""

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        """End the run."""
        super().on_train_end(args, state, control, model, processing_class, **kwargs)
        if self._wandb.run is not None:
            self._wandb.finish()


def report_in(trainer: Trainer, logs: Path) -> None:
    """Report to TensorBoard and wandb, where the run is to, in our ways: TensorBoard's events go to `logs`."""
    asked = trainer.args.report_to or []
    if "tensorboard" in asked:
        trainer.remove_callback(TensorBoardCallback)
        trainer.add_callback(TensorBoard(logs))
    if "wandb" in asked:
        trainer.remove_callback(WandbCallback)
        trainer.add_callback(Wandb())


def _rounded(number: float) -> str:
    """Three digits: 7, 512, 12.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
