"""Stopped by a signal at any moment, a run goes on bit for bit; what is not a number never reaches the weights."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from switchkd.cli.main import main
from switchkd.training.models.vlm import Vlm
from switchkd.training.objectives.finite import NonFiniteError, check_gradients, check_terms
from switchkd.training.process.stopping import EXIT_STOPPED
from switchkd.training.runs.checkpoints import fault
from switchkd.training.runs.progress import training_rows
from switchkd.training.runs.stage_models import stage_student
from switchkd.training.runs.trainer import DistillationTrainer

STEPS, ACCUMULATION = 12, 3
STOPS = 10  # of each sampler
Recipe = Callable[..., Path]
AtMicroBatch = Callable[[int, Callable[[], object]], None]


def run(recipe: Path) -> int:
    return main(["train", str(recipe)])


def kill_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def forgetful(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with dropout, so that the random state counts."""
    folder = tmp_path_factory.mktemp("forgetful") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_stopped_at_random_it_goes_on_bit_for_bit(
    sampling: str,
    forgetful: Path,
    one_stage_recipe: Recipe,
    tmp_path: Path,
    at_micro_batch: AtMicroBatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    straight, stopped = (
        one_stage_recipe(tmp_path / name / "r.yaml", forgetful, train_sampling_strategy=sampling)
        for name in ("straight", "stopped")
    )
    assert run(straight) == 0
    ours, theirs = (tmp_path / name / "out" for name in ("stopped", "straight"))
    chosen = random.Random(sampling)
    places, epochs, stops = set(), set(), 0
    while stops < STOPS:
        count = chosen.randrange(2 * ACCUMULATION)  # soon, so that a run is stopped often before it is finished
        at_micro_batch(count, kill_self(chosen.choice([signal.SIGTERM, signal.SIGINT])))
        code = run(stopped)
        if (ours / "dft").exists():  # the signal came in the last step, or would have come after it
            assert code in (0, EXIT_STOPPED)
            assert same_weights(ours / "dft", theirs / "dft")
            shutil.rmtree(ours)
            continue
        assert code == EXIT_STOPPED == 75
        said = capfd.readouterr().err
        match = re.search(rf"^switchkd: dft: stopped, step (\d+) of {STEPS} is saved; run the same command", said, re.M)
        assert match, said
        assert fault(ours / f".dft.checkpoints/checkpoint-{match[1]}") is None
        places.add(count % ACCUMULATION)
        epochs.add((int(match[1]) - 1) * 3 // STEPS)
        stops += 1
    # The middle of an accumulation is among them, and every epoch.
    assert places == set(range(ACCUMULATION))
    assert epochs == {0, 1, 2}
    at_micro_batch(-1, kill_self(0))
    assert run(stopped) == 0
    assert same_weights(ours / "dft", theirs / "dft")
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    logs = [[[row[name] for name in names] for row in training_rows(out / "dft/log.jsonl")] for out in (theirs, ours)]
    assert [row[0] for row in logs[0]] == list(range(1, STEPS + 1))
    assert logs[0] == logs[1]


def test_outside_of_the_steps_a_signal_loses_nothing(
    forgetful: Path, one_stage_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    recipe = one_stage_recipe(tmp_path / "r.yaml", forgetful, max_steps=2)
    save = DistillationTrainer.save_model

    def stopped_loading(*arguments: Any) -> Any:
        kill_self(signal.SIGTERM)()
        return stage_student(*arguments)

    def stopped_at_the_end(self: DistillationTrainer, folder: str, **settings: Any) -> None:
        if folder.endswith(".dft.partial"):
            kill_self(signal.SIGTERM)()
        save(self, folder, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("switchkd.training.runs.stages.stage_student", stopped_loading)
        assert run(recipe) == EXIT_STOPPED
    assert not (tmp_path / "out/.dft.checkpoints").exists()
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "save_model", stopped_at_the_end)
        assert run(recipe) == EXIT_STOPPED
    assert capfd.readouterr().err.count("switchkd: stopped, and everything is saved; run the same command") == 2
    assert run(recipe) == 0
    assert "already finished" in capfd.readouterr().err
    assert not (tmp_path / "out/.dft.checkpoints").exists()


def test_a_second_signal_ends_it_at_once(
    forgetful: Path, one_stage_recipe: Recipe, tmp_path: Path, at_micro_batch: AtMicroBatch
) -> None:
    def twice() -> None:
        kill_self(signal.SIGINT)()
        kill_self(signal.SIGINT)()

    at_micro_batch(1, twice)
    assert run(one_stage_recipe(tmp_path / "r.yaml", forgetful)) == 130
    assert not list((tmp_path / "out/.dft.checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
def test_signals_to_the_whole_group_leave_the_data_workers_alive(
    forgetful: Path, one_stage_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = one_stage_recipe(
        tmp_path / "r.yaml", forgetful, dataloader_num_workers=2, num_train_epochs=1000, logging_steps=1
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "switchkd.cli.main", "train", str(recipe)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log, deadline = tmp_path / "out/.dft.checkpoints/log.jsonl", time.monotonic() + 240
    while not (log.is_file() and len(training_rows(log)) > 1):
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    for worker in workers:
        os.kill(int(worker), signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode == EXIT_STOPPED, said
    assert re.search(r"^switchkd: dft: stopped, step \d+ of 4000 is saved", said, re.M), said


def test_not_a_number_ends_the_run_before_the_update(
    forgetful: Path,
    one_stage_recipe: Recipe,
    tmp_path: Path,
    at_micro_batch: AtMicroBatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(forgetful, tmp_path / "checkpoint")
    recipe = one_stage_recipe(tmp_path / "r.yaml", tmp_path / "checkpoint")
    assert run(recipe) == 0
    (tmp_path / "out/dft").rename(tmp_path / "straight")
    weights = tmp_path / "checkpoint/model.safetensors"
    healthy = weights.read_bytes()

    def poison() -> None:
        tensors = load_file(weights)
        name = next(name for name in tensors if "embed_tokens" in name)
        tensors[name][0, 0] = float("inf")  # <|endoftext|>, which only pads: in no input that counts, in every logit
        weights.unlink()
        save_file(tensors, weights, metadata={"format": "pt"})
        # As if it had been so from the beginning: else the run would not go on with another teacher.
        kept = tmp_path / "out/.dft.checkpoints/stage.json"
        kept.write_text(json.dumps(json.loads(kept.read_text()) | {"contents": {}}))

    # The student comes from the checkpoint of step 6; the teacher alone is damaged.
    at_micro_batch(13, kill_self(signal.SIGTERM))
    assert run(recipe) == EXIT_STOPPED
    poison()
    capfd.readouterr()
    assert run(recipe) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    expected = r"error: step 7: samples train-\d+: the teacher's logits: row 0 has 1 logits that are NaN or inf"
    assert re.search(expected, said), said
    assert "This step has changed no weight" in said
    assert fault(tmp_path / "out/.dft.checkpoints/checkpoint-6") is None
    weights.write_bytes(healthy)
    assert run(recipe) == 0
    assert same_weights(tmp_path / "out/dft", tmp_path / "straight")


def test_a_gradient_that_is_not_a_number_never_reaches_the_weights(
    forgetful: Path,
    one_stage_recipe: Recipe,
    tmp_path: Path,
    at_micro_batch: AtMicroBatch,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A loss that is finite, and behind it a slope that is not, in the first micro-batch of step 2."""
    students: list[Vlm] = []
    before: dict[str, torch.Tensor] = {}

    def keep(*arguments: Any) -> Any:
        students.append(stage_student(*arguments))
        return students[-1]

    def spoil() -> None:
        before.update({name: value.clone() for name, value in students[0].model.state_dict().items()})
        weight = dict(students[0].model.named_parameters())["model.multi_modal_projector.linear_1.weight"]

        def once(gradient: torch.Tensor) -> torch.Tensor:
            hook.remove()
            return gradient * float("nan")

        hook = weight.register_hook(once)

    monkeypatch.setattr("switchkd.training.runs.stages.stage_student", keep)
    at_micro_batch(ACCUMULATION, spoil)
    assert run(one_stage_recipe(tmp_path / "r.yaml", forgetful)) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"error: step 2: the norm of the gradient is nan, by the parameters .*linear_1\.weight", said), (
        said
    )
    after = students[0].model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_gradient_that_is_not_a_number_is_found_with_its_parameter() -> None:
    first = nn.Linear(2, 2)
    model = nn.Sequential(first, nn.Linear(2, 2))
    (model(torch.ones(1, 2)).sum() + (0 * first.weight).sum().sqrt()).backward()  # finite, with a slope of 0 × ∞
    with pytest.raises(NonFiniteError, match=r"the norm of the gradient is nan, by the parameters 0\.weight$"):
        check_gradients(model)
    model.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    check_gradients(model)


def test_every_term_that_is_not_a_number_is_named() -> None:
    terms = {"ce": torch.tensor(2.0), "vsd": torch.tensor(float("nan")), "dbild": torch.tensor(float("inf"))}
    check_terms(torch.tensor(1.0, requires_grad=True), {"ce": terms["ce"]})
    with pytest.raises(NonFiniteError, match=r"^vsd is nan, dbild is inf$"):
        check_terms(torch.tensor(1.0), terms)
    with pytest.raises(NonFiniteError, match=r"^loss is nan$"):
        check_terms(torch.tensor(float("nan")), {"ce": terms["ce"]})
