"""What a person sees of a run: logs whose loss is the sum of its terms, TensorBoard's events, the bar and the lines."""

import io
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments

from switchkd.cli.main import main
from switchkd.training.data.conversations import to_messages
from switchkd.training.data.label_mask import ConversationEncoder, model_inputs
from switchkd.training.models.vlm import load_vlm
from switchkd.training.objectives.spread import BINS, count_k, quantiles
from switchkd.training.runs import progress
from switchkd.training.runs.progress import StageProgress, TensorBoard, read_log, terms_of, training_rows
from switchkd.training.world.dataset import WorldSettings, write_world

STEPS = 6  # of 4 samples: one epoch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("data") / "world", WorldSettings(24, 7, 7))


@pytest.fixture(scope="module")
def recipe(tiny_checkpoint: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage of Switch-KD over a whole epoch, two micro-batches of unlike length a step, a log every other step."""
    folder = tmp_path_factory.mktemp("run")
    training: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    training |= {"logging_steps": 2, "save_steps": 3, "learning_rate": 1e-3, "use_cpu": True}
    stage = {
        "name": "dft",
        "train": ["encoder", "projector", "language_model"],
        "objective": {"name": "switch_kd", "lambda_vsd": 0.5},
        "data": {"records": str(world / "train.json"), "pictures": str(world / "pictures")},
        "training": training,
    }
    given = {
        "output": str(folder / "out"),
        "teacher": str(tiny_checkpoint),
        "model": {"checkpoint": str(tiny_checkpoint)},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(given | {"stages": [stage]}))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def out(recipe: Path) -> Path:
    assert main(["train", str(recipe)]) == 0
    return recipe.parent / "out"


def test_loss_is_the_weighted_sum_of_its_terms(out: Path) -> None:
    rows = training_rows(out / "dft" / "log.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]  # what is saved is logged
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce"] + row["dbild"] + 0.5 * row["vsd"], rel=1e-5)
        assert set(terms_of(row)) == {"ce", "dbild", "vsd"}


def test_a_log_says_how_fast_how_large_and_how_long(out: Path, world: Path, tiny_checkpoint: Path) -> None:
    rows = training_rows(out / "dft" / "log.jsonl")
    for row in rows:
        assert progress.MEASURED - {"memory_reserved_gib"} <= set(row)
        assert row["tokens_per_second"] > row["samples_per_second"] > 0
        assert 0 <= row["data_wait"] <= 1
        assert 0 < row["memory_gib"] < 1000
        for who in ("k_teacher", "k_student"):
            assert 3 <= row[f"{who}_p10"] <= row[f"{who}_p50"] <= row[f"{who}_p90"]
            assert row[f"{who}_p10"] <= row[who] <= 1.5 * row[f"{who}_p90"]
    assert rows[-1]["seconds_left"] == 0 < rows[0]["seconds_left"]
    encoder: ConversationEncoder = model_inputs(load_vlm(tiny_checkpoint))[0]
    samples = [encoder.encode(to_messages(record)) for record in json.loads((world / "train.json").read_text())]
    assert sum(row["tokens"] for row in rows) == sum(len(ids) for ids, _ in samples)
    supervised = sum(label != -100 for _, labels in samples for label in labels)
    assert sum(row["supervised_tokens"] for row in rows) == supervised


def test_tensorboard_has_what_the_log_has_and_outlives_the_stage(out: Path) -> None:
    events = EventAccumulator(str(out / "logs" / "dft")).Reload()
    for row in training_rows(out / "dft" / "log.jsonl"):
        for name in ("loss", "ce", "dbild", "vsd", "k_teacher_p50", "learning_rate", "tokens_per_second", "memory_gib"):
            found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
            assert found[row["step"]] == pytest.approx(row[name], rel=1e-6)


def test_a_later_attempt_hides_what_it_does_again(tmp_path: Path) -> None:
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    for first, last, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        events = TensorBoard(tmp_path)
        state = TrainerState(global_step=first, is_world_process_zero=True)
        events.on_train_begin(args, state, control)
        for state.global_step in range(first + 1, last + 1):
            events.on_log(args, state, control, logs={"loss": loss})
        events.on_train_end(args, state, control)
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in found] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_a_log_that_a_kill_cut_off_is_read(tmp_path: Path) -> None:
    lines = [{"step": 0, "began": True}, *({"step": step, "loss": 1.0} for step in (1, 2, 3, 4))]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "lo')
    args, state = (
        TrainingArguments(str(tmp_path), use_cpu=True),
        TrainerState(global_step=2, is_world_process_zero=True),
    )
    log = progress.JsonLines()
    log.on_train_begin(args, state, TrainerControl())
    state.global_step = 3
    log.on_log(args, state, TrainerControl(), logs={"loss": 7.0})
    assert [row["step"] for row in read_log(path)] == [0, 1, 2, 3, 4, 2, 3]
    assert [(row["step"], row["loss"]) for row in training_rows(path)] == [(1, 1.0), (2, 1.0), (3, 7.0)]


TWO_RANKS = """
import json, sys, torch
from accelerate import PartialState
from transformers import TrainerControl, TrainerState
from switchkd.training.runs.meter import Meter
from switchkd.training.objectives.spread import count_k

rank = PartialState(cpu=True).process_index
meter = Meter()
meter.on_train_begin(None, TrainerState(global_step=4), TrainerControl())
for terms, k, labels in ([({"ce": 1.0}, 8, 2)], [({"ce": 4.0, "relation": 6.0}, 32, 5), ({"ce": 7.0}, 32, 1)])[rank]:
    output = {"terms": {name: torch.tensor(value) for name, value in terms.items()}}
    output["counts"] = {"k": count_k(torch.full((labels,), k))}
    batch = {"labels": torch.tensor([[-100] + [1] * labels]), "attention_mask": torch.ones(1, labels + 1)}
    meter.add(output, batch | {"attention_mask": batch["attention_mask"].long()}, torch.tensor(8))
values = meter.read(5, 10)
if rank == 0:
    print(json.dumps(values), flush=True)
torch.distributed.destroy_process_group()
"""


def test_terms_are_means_over_the_tokens_of_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "two_ranks.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["ce"] == pytest.approx((2 * 1 + 5 * 4 + 1 * 7) / 8)
    assert values["relation"] == pytest.approx(5 * 6 / 8)  # one rank alone had a picture
    assert (values["tokens"], values["supervised_tokens"]) == (11, 8)
    assert values["k_p10"] == 8
    assert values["k_p90"] == pytest.approx(32, rel=0.05)


def test_quantiles_of_k_are_near_the_true_ones() -> None:
    torch.manual_seed(0)
    for k_N in (torch.randint(3, 12, (501,)), torch.randint(3, 151_936, (4001,)), torch.tensor([3])):
        found = quantiles(count_k(k_N).tolist())
        for name, share in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
            exact = k_N.sort().values[max(0, -int(-share * len(k_N) // 1) - 1)].item()
            assert found[name] == pytest.approx(exact, rel=0 if exact < 12 else 0.05)
    assert quantiles([0] * BINS) == quantiles(count_k(torch.zeros(4, dtype=torch.long)).tolist()) == {}


# --- the bar ---

LOGS: dict[str, float] = {"loss": 4.213, "ce": 2.05, "dbild": 1.32, "vsd": 0.84, "learning_rate": 1.9e-5}
LOGS |= {"k_teacher": 5123.0, "k_student": 4410.0, "tokens_per_second": 12_345.6, "memory_gib": 70.12}
LOGS |= {"data_wait": 0.25, "seconds_left": 45_296.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(title: str, tmp_path: Path) -> None:
    """A log at step 2 of 41,578."""
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=41_578, is_world_process_zero=True)
    bar = StageProgress(title)
    bar.on_train_begin(args, state, control)
    state.global_step = 2
    bar.on_step_end(args, state, control)
    bar.on_log(args, state, control, logs=LOGS)
    bar.on_train_end(args, state, control)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_bar_fits(columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    show("dft", tmp_path)
    written = re.split(r"[\r\n]|\x1b\[A", screen.getvalue())
    assert max(map(len, written)) <= min(columns - 1, 100)
    if columns == 200:
        assert any(
            "2/41578 steps" in line and "left, 12.3k tokens/s, 70.1 GiB, 25% waiting" in line for line in written
        )
        numbers = "loss 4.213 | ce 2.05 dbild 1.32 vsd 0.84 | lr 1.9e-05 | k teacher 5.12k student 4.41k"
        assert any(numbers in line for line in written)


def test_where_there_is_no_terminal_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show("dft", tmp_path)
    assert capsys.readouterr().err == ""  # too early for one
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    show("dft", tmp_path)
    assert capsys.readouterr().err == (
        "dft: step 2/41578, 12:34:56 left, 12.3k tokens/s, 70.1 GiB, 25% waiting for data; loss 4.213 | "
        "ce 2.05 dbild 1.32 vsd 0.84 | lr 1.9e-05 | k teacher 5.12k student 4.41k\n"
    )


# --- who else is told ---


@pytest.mark.parametrize(
    ("report_to", "reason"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        pytest.param(
            "wandb",
            "wandb, which is not installed; pip install wandb",
            marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed"),
        ),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(
    report_to: str, reason: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"output={tmp_path / 'out'}", f"stages.dft.training.report_to={report_to}"]
    assert main(["train", str(recipe), *changes]) == 2
    assert reason in capsys.readouterr().err


def test_a_stage_cannot_take_the_logs_name(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "stages.dft.name=logs"]) == 2
    assert "'logs' cannot be a folder name" in capsys.readouterr().err


def test_none_reports_to_nobody_but_the_log(recipe: Path, tmp_path: Path) -> None:
    changes = ["stages.dft.training.report_to=none", "stages.dft.training.max_steps=1"]
    assert main(["train", str(recipe), f"output={tmp_path / 'out'}", *changes]) == 0
    assert not (tmp_path / "out" / "logs").exists()
    assert training_rows(tmp_path / "out" / "dft" / "log.jsonl")
