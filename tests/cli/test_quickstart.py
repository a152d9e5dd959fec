"""Quickstart through the real command: what it leaves behind, that it goes on where it was, and what it prints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from switchkd.cli.main import main
from switchkd.cli.quickstart_report import write_report
from switchkd.training.evaluation.report import in_words
from switchkd.training.world.bases import STORED, stored_parts
from switchkd.training.world.scoring import difference

SYSTEMS = {"teacher", "student_sft", "student_switch_kd", "bundle_fp32", "bundle_int8"}
KINDS = {"attribute", "conversation", "counting", "existence", "position", "reading", "region"}


def run_until(sign: Path, *words: str) -> None:
    """Kill a short quickstart as soon as it has made this folder."""
    command = [sys.executable, "-m", "switchkd.cli.main", "quickstart", "--short", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not sign.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, f"{sign.name} never came"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short quickstart that was killed while it trained its second arm, and then run to its end."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    run_until(out / ".student_switch_kd.checkpoints", "--out", str(out))
    assert main(["quickstart", "--short", "--out", str(out)]) == 0
    return out


def test_it_leaves_what_it_says(finished: Path) -> None:
    for name in ("teacher", "student_sft", "student_switch_kd"):
        assert (finished / name / "model.safetensors").is_file()
    assert main(["verify", str(finished / "bundle"), "--pairs", "6"]) == 0  # the examples in it included
    assert (finished / "bundle" / "examples" / "examples.json").is_file()
    for name in ("report.json", "report.md", "report.png"):
        assert (finished / name).stat().st_size > 0
    assert not [path.name for path in finished.iterdir() if "partial" in path.name or "checkpoints" in path.name]


def test_the_report_has_every_number(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert set(report["accuracy"]) == SYSTEMS
    for name in SYSTEMS:
        assert 0 <= report["accuracy"][name] <= 1
        assert set(report["by_kind"][name]) == set(report["above_prior_by_kind"][name]) == KINDS
        low, high = report["intervals"][name]["all"]
        assert low < report["accuracy"][name] < high
        assert report["milliseconds_per_answer"][name] > 0
        assert report["bytes"][name] > 0
    assert report["bytes"]["bundle_int8"] < report["bytes"]["bundle_fp32"]
    assert {"world", "student_pt", "student_sft", "student_switch_kd", "export"} <= set(report["seconds"])


def test_the_exported_graphs_answer_as_the_checkpoint_does(finished: Path) -> None:
    answers = {
        name: json.loads((finished / "measurements" / f"{name}.json").read_text())["answers"]
        for name in ("student_switch_kd", "bundle_fp32")
    }
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    assert same == len(answers["bundle_fp32"]) > 100


def test_a_second_run_reuses_everything_and_prints_the_same(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = (finished / "report.json").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert main(["quickstart", "--short", "--out", str(finished)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == stamps
    assert (finished / "report.json").read_text() == report
    out = capsys.readouterr().out
    assert "student, Switch-KD" in out
    assert "guessing (prior)" in out


def test_seeds_are_reported_with_mean_and_spread(finished: Path, tmp_path: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    report["seeds"] = {
        arm: {"accuracies": [0.5, 0.7], "mean": 0.6, "standard_deviation": 0.1414, "interval": [0.1, 0.9]}
        for arm in ("student_sft", "student_switch_kd")
    }
    report["difference"] |= {"value": 0.021, "low": 0.002, "high": 0.04, "seeds": 2}
    text = write_report(tmp_path, report)
    assert (
        "student, SFT: mean 60.0, standard deviation 14.1 over 2 seeds (50.0, 70.0); 95 % interval 10.0 to 90.0" in text
    )
    assert "\nSwitch-KD minus SFT: +2.1 points, 95 % interval +0.2 to +4.0. It excludes 0: the chance of" in text
    assert "--seeds 3" not in text


def test_the_last_line_is_the_paired_difference_of_the_kept_answers(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    records = json.loads((finished / "world" / "test.json").read_text())
    sft, switch_kd = (
        json.loads((finished / "measurements" / f"{name}.json").read_text())["answers"]
        for name in ("student_sft", "student_switch_kd")
    )
    assert report["difference"]["of"] == "student_switch_kd"
    assert report["difference"]["value"] == pytest.approx(
        report["accuracy"]["student_switch_kd"] - report["accuracy"]["student_sft"]
    )
    found = difference([switch_kd], [sft], records)
    assert (report["difference"]["low"], report["difference"]["high"]) == (found.low, found.high)
    assert report["difference"]["clusters"] == report["test_pictures"] == len({row["image"] for row in records})
    assert in_words(found, "Switch-KD", "SFT") in (finished / "report.md").read_text()


def test_from_scratch_makes_the_parts_first_and_starts_from_them(tmp_path: Path) -> None:
    run_until(tmp_path / ".student_pt.checkpoints", "--from-scratch", "--out", str(tmp_path))
    assert json.loads((tmp_path / "seconds.json").read_text())["parts"] > 0
    for part in STORED:
        made, used, carried = (
            (folder / part / "model.safetensors").read_bytes()
            for folder in (tmp_path / "parts" / "stored", tmp_path, stored_parts())
        )
        assert made == used
        assert made != carried


def test_no_seed_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["quickstart", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "--seeds is 0" in capsys.readouterr().err
