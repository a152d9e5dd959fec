"""Kills `switchkd train` with SIGKILL again and again, half of the times or more inside a save, and lets it go on.

    python tests/stress/kill_and_resume.py --kills 100

Each attempt is the command in a fork of this process, so that nothing is imported a hundred times. After every kill
there has to be a whole checkpoint, at most one save interval behind the log; whenever a run gets to its end, it must
have the weights and the losses of a run that nobody killed, bit for bit. Exits with 1 at the first that does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from switchkd.cli.main import main as command
from switchkd.training.runs.checkpoints import MANIFEST, fault
from switchkd.training.runs.progress import read_log, training_rows
from switchkd.training.runs.stages import run_recipe
from switchkd.training.train_command import ERRORS
from switchkd.training.world.dataset import WorldSettings, write_world

STEPS, SAVE_STEPS = 16, 2
IMPORTED_BEFORE_THE_FORKS = (run_recipe, ERRORS)


class StressError(Exception):
    """A run that did not keep its promise."""


class Attempt:
    """The command in a process of its own; `code` is None while it runs, and negative after a signal."""

    def __init__(self, recipe: Path, output: Path, said: Path) -> None:
        self.code: int | None = None
        self._said = said
        self._process = os.fork()
        if self._process == 0:
            os.nice(5)  # so that who watches it comes first
            torch.set_num_threads(1)
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = 1
            try:
                code = command(["train", str(recipe), f"output={output}"])
            finally:
                os._exit(code)

    def ended(self, *, wait: bool = False) -> bool:
        """Whether it has ended. Raises StressError where it ended with an error."""
        if self.code is None:
            process, status = os.waitpid(self._process, 0 if wait else os.WNOHANG)
            if process:
                self.code = os.waitstatus_to_exitcode(status)
        if self.code is not None and self.code not in (0, -signal.SIGKILL):
            raise StressError(f"the command ended with {self.code}: {self._said.read_text()[-2000:]}")
        return self.code is not None

    def kill(self) -> bool:
        """Kill it; False if it had come to its end before."""
        if not self.ended():
            os.kill(self._process, signal.SIGKILL)
            self.ended(wait=True)
        return self.code != 0


class Stress:
    """One recipe, run without a kill in `straight` and with many in `killed`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.kills = self.inside = self.finished = self.most_lost = 0
        self._random = random.Random(seed)
        self._folder = folder
        self._killed = folder / "killed"
        self._work = self._killed / ".dft.checkpoints"
        self._recipe = write_recipe(folder)
        started = time.monotonic()
        self._start(folder / "straight").ended(wait=True)
        self._seconds = time.monotonic() - started

    def kill_once(self) -> None:
        """Start an attempt and kill it, inside a save unless more than half of the kills were."""
        attempt = self._start(self._killed)
        if self.inside * 2 <= self.kills:
            self._wait_for_a_save(attempt)
        else:
            time.sleep(self._random.uniform(0, self._seconds))
        if attempt.kill():
            self.kills += 1
            self.inside += bool(self._being_written())
            self._check_what_is_left()
        else:
            self._check_end()

    def finish(self) -> None:
        """Let the run come to its end."""
        self._start(self._killed).ended(wait=True)
        self._check_end()

    def _start(self, output: Path) -> Attempt:
        return Attempt(self._recipe, output, self._folder / "said.txt")

    def _being_written(self) -> set[Path]:
        """Checkpoints without a manifest, and the stage's own folder before it has its name."""
        begun = {path for path in self._work.glob("checkpoint-*") if not (path / MANIFEST).exists()}
        return begun | set(self._killed.glob(".dft.partial"))

    def _wait_for_a_save(self, attempt: Attempt) -> None:
        known = self._being_written()  # by the attempt before
        for _ in range(self._random.randint(1, 3)):
            while not attempt.ended() and not self._being_written() - known:
                time.sleep(0.0005)
            known |= self._being_written()
        time.sleep(self._random.uniform(0, 0.01))

    def _check_what_is_left(self) -> None:
        """Raise StressError if the newest whole checkpoint is more than a save interval behind the log."""
        log = self._work / "log.jsonl"
        if (self._killed / "dft").exists() or not log.exists():
            return
        step = max((row["step"] for row in read_log(log)[-1:]), default=0)
        whole = [int(path.name.split("-")[1]) for path in self._work.glob("checkpoint-*") if fault(path) is None]
        lost = step - max(whole, default=0)
        self.most_lost = max(self.most_lost, lost)
        if lost > SAVE_STEPS:
            raise StressError(f"killed after step {step}, and the whole checkpoints are of {whole}: {lost} are lost")

    def _check_end(self) -> None:
        """Raise StressError if weights or losses are not those of the run that nobody killed."""
        ours, theirs = self._killed / "dft", self._folder / "straight" / "dft"
        weights, expected = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
        if weights.keys() != expected.keys() or not all(torch.equal(weights[name], expected[name]) for name in weights):
            raise StressError("the weights are not those of the run that nobody killed")
        rows = [[(row["step"], row["loss"]) for row in training_rows(at / "log.jsonl")] for at in (ours, theirs)]
        if rows[0] != rows[1] or len(rows[0]) != STEPS:
            raise StressError(f"the losses are not those of the run that nobody killed: {rows}")
        self.finished += 1
        shutil.rmtree(self._killed)


def write_recipe(folder: Path) -> Path:
    """A recipe of one stage over the tests' tiny checkpoint, which is its own teacher, and a very small world."""
    spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    fixtures.write_tiny_checkpoint(folder / "checkpoint")
    world = write_world(folder / "world", WorldSettings(24, 7, 7))
    stage = {
        "name": "dft",
        "train": ["encoder", "projector", "language_model"],
        "objective": {"name": "switch_kd"},
        "data": {"records": [str(world / "train.json")], "pictures": str(world / "pictures")},
        "training": {
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "logging_steps": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "report_to": "none",
            "use_cpu": True,
        },
    }
    checkpoint = str(folder / "checkpoint")
    recipe = {"output": "", "teacher": checkpoint, "model": {"checkpoint": checkpoint}, "stages": [stage]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def main(words: Sequence[str] | None = None) -> int:
    """Run it, and say in one line what happened."""
    parser = argparse.ArgumentParser(description="Kill `switchkd train` many times, and let it go on.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as folder:
        try:
            stress = Stress(Path(folder), arguments.seed)
            while stress.kills < arguments.kills or stress.inside < arguments.kills / 2:
                stress.kill_once()
                if sys.stderr.isatty():
                    sys.stderr.write(f"\r{stress.kills} kills")
            stress.finish()
        except StressError as error:
            sys.stdout.write(f"FAILED: {error}\n")
            return 1
    sys.stdout.write(
        f"{stress.kills} kills, {stress.inside} of them inside a save; {stress.finished} runs came to their end, each "
        "with the weights and losses of the run that nobody killed, bit for bit; "
        f"at most {stress.most_lost} finished steps were lost at a time (a checkpoint every {SAVE_STEPS})\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
