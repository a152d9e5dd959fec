"""The check before the first step, `data check` and training say the same of a record; what they say is one line."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from switchkd.cli.main import main
from switchkd.training.data.check import check_data, percent
from switchkd.training.data.conversations import DataError, Reason
from switchkd.training.data.dataset import Sample, collator
from switchkd.training.data.label_mask import model_inputs
from switchkd.training.data.stage_data import LostSamples, Selection, StageDataset
from switchkd.training.models.alignment import IGNORED
from switchkd.training.models.distillation import Distillation
from switchkd.training.models.vlm import load_vlm
from switchkd.training.objectives import build_objective
from switchkd.training.recipe.recipe import DataRecipe
from switchkd.training.runs.trainer import DistillationTrainer


def record(name: str, *questions: str) -> dict[str, Any]:
    turns = [
        turn
        for number, question in enumerate(questions)
        for turn in (
            {"from": "human", "value": ("" if number else "<image>\n") + question},
            {"from": "gpt", "value": f"Red, and {number}."},
        )
    ]
    return {"id": name, "image": "a.png", "conversations": turns}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """records.json, of which three have one turn and three have two, and the picture of all."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "pictures").mkdir()
    Image.new("RGB", (30, 20), "red").save(folder / "pictures" / "a.png")
    single = [record(f"one-{number}", "What?") for number in range(3)]
    (folder / "records.json").write_text(
        json.dumps([*single, *(record(f"two-{n}", "What?", "Sure?") for n in range(3))])
    )
    return folder


# As Qwen3's writes it: the last answer alone has a think block, which the earlier ones lose when a turn is added.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_recipe(folder: Path, sound: Path, output: Path, max_length: int | None) -> Path:
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no"}
    data = {"records": [str(sound / "records.json")], "pictures": str(sound / "pictures"), "max_broken": 0.4}
    data |= {} if max_length is None else {"max_length": max_length}
    stage = {"name": "sft", "train": ["projector"], "objective": {"name": "sft"}, "data": data, "training": training}
    recipe = {"output": str(output), "model": {"checkpoint": str(folder / "thinking")}, "stages": [stage]}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "r.yaml"


def test_the_check_before_the_first_step_says_what_data_check_says(
    sound: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "thinking")
    (tmp_path / "thinking" / "chat_template.jinja").write_text(THINKING)
    for max_length in (None, 300):
        output = tmp_path / f"out-{max_length}"
        recipe = write_recipe(tmp_path, sound, output, max_length)
        assert main(["data", "check", str(recipe)]) == 1
        assert f"{Reason.TEMPLATE:<34}        3" in capsys.readouterr().out
        (kept,) = (output / "data-check").glob("records-*")
        assert main(["train", str(recipe)]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert "3 of 6 records left out (50 %): refused by the chat template 3, more than max_broken 40 %" in last
        assert "two-0: the chat template changes earlier turns" in last
        assert [*(output / "data-check").glob("records-*")] == [kept]  # what the command found is not asked again
        assert not (output / "sft").exists()
    # Allowed, the others are trained on.
    assert main(["train", str(recipe), "stages.sft.data.max_broken=0.5"]) == 0
    facts = json.loads((output / "sft" / "stage.json").read_text())["facts"]
    assert facts["left_out"] == {Reason.TEMPLATE: 3}


def test_a_sample_that_is_refused_while_training_is_no_fault_of_the_disk(
    sound: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchkd.training.data.stage_data.WAITS", (10_000.0,))  # once more is never
    recipe = DataRecipe([str(sound / "records.json")], str(sound / "pictures"))
    found = check_data(recipe, None, None)
    encoder, preprocessing = model_inputs(load_vlm(tiny_checkpoint), 9)
    dataset = StageDataset(
        Selection(found.records, found.length_N, {}, tmp_path / "skipped.jsonl"), recipe, encoder, preprocessing
    )
    sample = dataset[0]
    assert (set(sample.labels_T), sample.lost) == ({IGNORED}, True)
    assert (dataset.lost, dataset.refused) == (0, 1)
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["reason"] == Reason.CUT
    with pytest.raises(DataError, match=r"step 5: 1 samples cannot be trained on, though .*skipped\.jsonl"):
        LostSamples(dataset, print).on_step_end(TrainingArguments(), TrainerState(global_step=5), TrainerControl())


@pytest.mark.parametrize("lost", [True, False])
def test_a_step_without_a_supervised_token_is_an_error_unless_its_samples_are_lost(
    lost: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    student = load_vlm(tiny_checkpoint)
    samples = [Sample([5, 6, 7], [IGNORED] * 3, None, f"r{number}", lost or number == 1) for number in range(2)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = DistillationTrainer(
        Distillation(student.model, None, build_objective("sft")),
        student,
        "sft",
        tmp_path,
        args=arguments,
        train_dataset=samples,
        data_collator=collator(0),
    )
    if lost:
        assert trainer.train().training_loss == 0
    else:
        with pytest.raises(DataError, match=r"step 1: not one supervised token.*samples are r\d, r\d"):
            trainer.train()


def test_a_share_is_no_power_of_ten() -> None:
    shares = (1.0, 0.996, 0.5, 0.0996, 0.012, 0.000015, 0.0)
    assert [percent(share) for share in shares] == [
        *("100 %", "99.6 %", "50 %", "10 %", "1.2 %", "0.0015 %", "0 %"),
    ]


def test_files_that_are_no_records_are_mistakes_of_the_command(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(sound / "records.json", tmp_path / "X.JSON")
    assert main(["data", "check", str(tmp_path / "X.JSON"), "--pictures", str(sound / "pictures")]) == 0
    (tmp_path / "train.parquet").write_bytes(b"PAR1\x15\x04")
    (tmp_path / "train.json.gz").write_bytes(gzip.compress(b"[]"))
    for name, way_out in (
        ("train.parquet", "`switchkd data convert {} --out"),
        ("train.json.gz", "unpack it (gunzip -k {})"),
    ):
        capsys.readouterr()
        assert main(["data", "check", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert way_out.format(tmp_path / name) in line
