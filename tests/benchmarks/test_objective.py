"""The benchmarks run from the command line and compare what they say they compare; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import explicit_pairs, objective, step
from switchkd.training.objectives.dbild import dbild

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *words: str, report: Path) -> tuple[str, Any]:
    command = [sys.executable, "-m", module, *words, "--device", "cpu", "--repeats", "2", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(report.read_text())


def test_objective_measures_every_method_of_every_case(tmp_path: Path) -> None:
    sizes = ["--positions", "6", "--windows", "16", "whole", "--vocabulary", "300", "--forced-k", "20"]
    printed, (report,) = run("benchmarks.objective", *sizes, report=tmp_path / "report.json")
    assert [(each["title"], each["method"]) for each in report["records"]] == [
        (title, method)
        for title, methods in (
            ("N=6 window=16", objective.METHODS),
            ("N=6 window=whole", objective.METHODS),
            ("N=6 window=20, k=20", objective.METHODS),
            ("N=6 window=20, k=20, gathered", objective.METHODS[1:]),
        )
        for method in methods
    ]
    for record in report["records"]:
        assert record["ms"]["min"] <= record["ms"]["median"] <= record["ms"]["max"]
        assert 0 <= record["above_mib"] <= record["peak_mib"]
        assert f"| {record['title']} | {record['mean_k']:.0f} | {record['method']} |" in printed
    assert {each["mean_k"] for each in report["records"] if each["case"]["forced_k"]} == {20}
    assert report["machine"] in printed


@pytest.mark.parametrize("settings", [{}, {"window": 40}, {"window": 30, "min_k": 30, "max_k": 30}], ids=str)
def test_explicit_pairs_equal_dbild(settings: dict[str, Any]) -> None:
    case = objective.Case(5, 200, None)
    reference_NV, candidate_NV = (objective.make_logits(case, torch.device("cpu"), seed).double() for seed in (0, 1))
    candidate_NV.requires_grad_()
    losses = [
        explicit_pairs.explicit_dbild(reference_NV, candidate_NV, **settings),
        dbild(reference_NV, candidate_NV, reduction="sum", **settings),
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(loss, candidate_NV)[0] for loss in losses])


def test_forms_that_disagree_stop_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    case, device = objective.Case(4, 100, 16), torch.device("cpu")
    monkeypatch.setattr(objective, "explicit_dbild", lambda *_, **__: torch.ones((), requires_grad=True))
    with pytest.raises((ValueError, AssertionError)):
        objective.measure(case, device, repeats=1, memory=False)


def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case, device = objective.Case(40, 5000, None), torch.device("cpu")
    monkeypatch.setattr(objective, "memory_at_hand", lambda _: 2**24)
    records = objective.measure(case, device, repeats=1, memory=False)
    assert [each["method"] for each in records if "skipped" in each] == ["explicit pairs"]
    assert "left out: needs about" in objective.lines(records)


def test_step_measures_both_and_they_agree(tmp_path: Path) -> None:
    sizes = ["--shapes", "tiny", "--rows", "2", "--window", "40", "--peak", "0.1"]
    printed, report = run("benchmarks.step", *sizes, report=tmp_path / "report.json")
    ours, same_window, obvious = report["records"]
    assert same_window["loss"] == pytest.approx(obvious["loss"], rel=1e-3)
    assert ours["loss"] != obvious["loss"]
    for record in report["records"]:
        assert record["tokens_per_s"] > 0
        assert record["utilisation"] > 0
        assert 0 <= record["above_mib"] <= record["peak_mib"]
        assert f"| {record['implementation']} |" in printed


def test_real_shapes_without_a_gpu_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--shapes", "real", "--device", "cpu"])
    assert "use --shapes heads" in capsys.readouterr().err
