"""Ablations through the real command: arms, shared stages, resuming, scores, and the paper's tables kept apart."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from switchkd.cli.main import main
from switchkd.training.ablation.matrix import Matrix, load_matrix
from switchkd.training.ablation.report import collect, report_text, write_report
from switchkd.training.models.vlm import build_vlm
from switchkd.training.recipe.arguments import training_arguments
from switchkd.training.recipe.recipe import RecipeError, load_recipe
from switchkd.training.runs.stage_identity import fingerprints
from switchkd.training.world.bases import stored_parts

FULL = ("ablation/table3", "ablation/table4", "ablation/table5", "ablation/rivals")
TOYS = ("ablation/toy-table3", "ablation/toy-table4", "ablation/toy-table5", "ablation/toy-rivals")
SMALL_WORLD = ["world.train_pictures=64", "world.test_questions=70", "world.validation_questions=7"]
ARMS = ["teacher", "PT-SFT", "DPT-SFT", "PT-DFT", "DPT-DFT"]


def toy(root: Path, *more: str) -> list[str]:
    """The command of the toy form of table 4, in a small world and two steps a stage."""
    return ["ablate", "ablation/toy-table4", f"root={root}", *SMALL_WORLD, *more, "--max-steps", "2"]


def weights(root: Path) -> dict[str, int]:
    """When each trained model was written."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.glob("*/model.safetensors")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The toy form of table 4, killed once its first arm was finished, and then run to its end."""
    root = tmp_path_factory.mktemp("ablation")
    process = subprocess.Popen(
        [sys.executable, "-m", "switchkd.cli.main", *toy(root)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (root / "pt-sft" / "stage.json").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "the first arm never ended"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = weights(root)
    assert main(toy(root)) == 0
    return root, before


def test_a_killed_matrix_goes_on_and_trains_shared_stages_once(finished: tuple[Path, dict[str, int]]) -> None:
    root, before = finished
    assert {"pt/model.safetensors", "pt-sft/model.safetensors"} <= before.keys()
    after = weights(root)
    assert {name: after[name] for name in before} == before
    trained = {"pt", "dpt", "pt-sft", "dpt-sft", "pt-dft", "dpt-dft"}
    assert {name.split("/")[0] for name in after} == trained | {"encoder", "student_language_model", "teacher"}


def test_a_second_run_trains_and_scores_nothing(finished: tuple[Path, dict[str, int]], capsys: Any) -> None:
    root, _ = finished
    stamps, report = weights(root), (root / "table4" / "report.json").read_text()
    scored = (root / "table4" / "scores.json").stat().st_mtime_ns
    assert main(toy(root)) == 0
    assert weights(root) == stamps
    assert (root / "table4" / "scores.json").stat().st_mtime_ns == scored
    assert (root / "table4" / "report.json").read_text() == report
    assert "Table 4 at toy size" in capsys.readouterr().out


def test_the_report_has_every_arm_and_says_what_it_is_worth(finished: tuple[Path, dict[str, int]]) -> None:
    root, _ = finished
    report = json.loads((root / "table4" / "report.json").read_text())
    assert list(report["arms"]) == ARMS
    for name, arm in report["arms"].items():
        (seed,) = arm["seeds"]
        assert seed["finished"]
        assert arm["mean"] == seed["scores"]
        assert 0 <= arm["mean"]["all"] <= 1
        assert arm["paper"] == {}, name
    assert report["arms"]["teacher"]["mean"]["all"] > 0.8  # stored, not trained here
    text = (root / "table4" / "report.md").read_text()
    assert all(f"\n{name} " in text for name in ARMS)
    assert "ended after 2 steps: the accuracies mean nothing" in text
    assert "70 test questions" in text
    assert "minus PT-SFT" in text
    for name in ("teacher", "DPT-DFT"):
        found = report["arms"][name]["difference"]
        means = [report["arms"][side]["mean"]["all"] for side in (name, "PT-SFT")]
        assert found["from"] == "PT-SFT"
        assert found["value"] == pytest.approx(means[0] - means[1])
    teacher = report["arms"]["teacher"]["difference"]
    assert 0 < teacher["low"] < teacher["value"] < teacher["high"]
    assert f"teacher minus PT-SFT: {100 * teacher['value']:+.1f} points, 95 % interval" in text
    assert "difference" not in report["arms"]["PT-SFT"]
    assert "PAPER" not in text


def test_seeds_have_folders_of_their_own_and_a_spread(finished: tuple[Path, dict[str, int]], capsys: Any) -> None:
    root, _ = finished
    assert main(toy(root, "--only", "PT-SFT", "--seeds", "2")) == 0
    assert {path.name for path in (root / "seed1").iterdir() if not path.name.startswith(".")} >= {"pt", "pt-sft"}
    first, second = (load_file(folder / "pt-sft" / "model.safetensors") for folder in (root, root / "seed1"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    report = json.loads((root / "table4" / "report.json").read_text())
    arm = report["arms"]["PT-SFT"]
    values = [seed["scores"]["all"] for seed in arm["seeds"]]
    assert arm["mean"]["all"] == pytest.approx(sum(values) / 2)
    assert arm["standard_deviation"]["all"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert [len(report["arms"][name]["seeds"]) for name in ("teacher", "DPT-SFT")] == [1, 2]
    assert [seed["finished"] for seed in report["arms"]["DPT-SFT"]["seeds"]] == [True, False]
    low, high = arm["interval"]["all"]
    assert low < arm["mean"]["all"] < high
    half = 100 * (high - low) / 2
    assert f"{100 * arm['mean']['all']:.1f} ± {half:.1f}" in capsys.readouterr().out


def test_scores_of_another_world_or_without_answers_are_not_compared(finished: tuple[Path, dict[str, int]]) -> None:
    root, _ = finished
    file = root / "table4" / "scores.json"
    before = file.read_text()
    matrix = load_matrix("ablation/toy-table4", [f"root={root}", *SMALL_WORLD]).with_max_steps(2)
    scores = json.loads(before)
    del scores[str(root / "pt-dft")]["answers"]  # as an earlier version kept them
    scores[str(root / "dpt-sft")]["stamp"][1] = {"other": "world"}
    try:
        file.write_text(json.dumps(scores))
        arms = collect(matrix)["arms"]
        assert [name for name, arm in arms.items() if "mean" in arm] == ["teacher", "PT-SFT", "DPT-DFT"]
    finally:
        file.write_text(before)


def test_another_recipe_does_not_write_over_what_is_finished(
    finished: tuple[Path, dict[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = finished
    stamps = weights(root)
    assert main(toy(root, "recipe.stages.pt.training.learning_rate=0.5")) == 2
    assert (
        "pt is finished, and not by this recipe: stages.pt.training.learning_rate was 0.002 and is 0.5"
        in capsys.readouterr().err
    )
    assert weights(root) == stamps


def test_a_launchers_processes_are_refused_where_a_world_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(toy(tmp_path)) == 2
    assert "run it without a launcher" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*FULL, *TOYS])
def test_shipped_matrices_are_complete_and_come_back_from_their_yaml(name: str, tmp_path: Path) -> None:
    matrix = load_matrix(name)
    for arm in matrix.arms:
        for stage in arm.recipe.stages if arm.recipe is not None else ():
            assert training_arguments(_without_hardware(stage), tmp_path, 0).learning_rate > 0
    assert Matrix.from_dict(yaml.safe_load(matrix.to_yaml())) == matrix


def _without_hardware(stage: Any) -> Any:
    import dataclasses

    kept = {key: value for key, value in stage.training.items() if key not in ("bf16", "deepspeed")}
    return dataclasses.replace(stage, training=kept)


def test_the_tables_share_their_stages_and_their_teachers() -> None:
    made: dict[Path, str] = {}
    for name in FULL:
        for arm in load_matrix(name, ["root=here"]).arms:
            assert arm.recipe is not None
            for stage, fingerprint in zip(arm.recipe.stages, fingerprints(arm.recipe), strict=True):
                assert made.setdefault(Path(arm.recipe.output) / stage.name, fingerprint) == fingerprint
    for size in ("3b", "7b"):  # what the teachers' own recipes have trained is not trained again
        recipe = load_recipe(f"paper/qwen2.5-{size}-teacher", ["root=here"])
        assert [made[Path(recipe.output) / stage.name] for stage in recipe.stages] == fingerprints(recipe)


def test_table_3_gives_the_student_its_teachers_encoder() -> None:
    own, theirs, distilled = (arm.recipe for arm in load_matrix("ablation/table3").arms)
    assert own is not None
    assert theirs is not None
    assert distilled is not None
    assert distilled.teacher is not None
    assert theirs.model.encoder == distilled.teacher.checkpoint
    assert own.model.encoder == distilled.model.encoder == "google/siglip-so400m-patch14-384"
    assert [stage.objective["name"] for stage in theirs.stages] == ["sft", "sft"]


@pytest.mark.parametrize(
    ("name", "averages"),
    [
        ("ablation/table3", [56.5, 56.0, 60.1]),
        ("ablation/table4", [56.5, 57.4, 58.8, 58.7]),
        ("ablation/table5", [68.8, 66.2, 64.0, 65.3, 64.8, 56.5, 59.8, 60.1]),
        ("ablation/rivals", [56.5, 58.9, 60.1]),
    ],
)
def test_the_papers_numbers_are_shown_as_the_papers(name: str, averages: list[float], tmp_path: Path) -> None:
    matrix = load_matrix(name, [f"root={tmp_path}"])
    papers = [arm.paper for arm in matrix.arms if arm.paper]
    assert [paper["Avg10"] for paper in papers] == averages
    for paper in papers:
        benchmarks = [value for benchmark, value in paper.items() if benchmark != "Avg10"]
        assert len(benchmarks) == 10
        assert sum(benchmarks) / 10 == pytest.approx(paper["Avg10"], abs=0.051)
    ours, theirs = report_text(collect(matrix)).split("The PAPER'S numbers for its own models (arXiv 2604.14629")
    assert "none is measured here" in theirs
    assert str(averages[0]) in theirs
    assert str(averages[0]) not in ours
    assert ours.count("not scored here") == len(matrix.arms)
    assert all(str(arm.folder(0)) in ours for arm in matrix.arms)
    assert write_report(matrix, collect(matrix)) in (Path(matrix.output) / "report.md").read_text()


def test_dry_run_of_an_arm_builds_the_student_on_the_teachers_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "ablation/table3", "--dry-run", "--only", "PT+SFT (V^T)"]) == 0
    err = capsys.readouterr().err
    assert "vt-pt: sft" in err
    assert "vt-pt-sft: sft" in err
    assert "pt-dft" not in err
    assert "every stage of every arm took two steps" in err


def test_a_llava_checkpoint_gives_its_vision_tower_as_encoder(tiny_checkpoint: Path) -> None:
    vlm = build_vlm(tiny_checkpoint, stored_parts() / "student_language_model")
    teacher = load_file(tiny_checkpoint / "model.safetensors")
    student = {f"vision_tower.{name}": value for name, value in vlm.model.model.vision_tower.state_dict().items()}
    theirs = {name.removeprefix("model."): value for name, value in teacher.items() if "vision_tower" in name}
    assert student.keys() == theirs.keys()
    assert all(torch.equal(student[name], theirs[name]) for name in theirs)
    assert vlm.preprocessing.size == (24, 24)  # pictures are prepared as the encoder's model had them
    assert vlm.tokens_per_picture == 16


def given(*arms: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"output": "out", "recipe": {"base": "world/student_stages"}, "arms": list(arms), **more}


@pytest.mark.parametrize(
    ("matrix", "changes", "reason"),
    [
        (given(), [], "arms are .*at least one"),
        (given({"name": "a", "checkpoint": "x"}, seds=2), [], "unknown key 'seds'; did you mean 'seeds'"),
        (given({"name": "a", "recipee": {}}), [], "arm a: unknown key 'recipee'; did you mean 'recipe'"),
        (given({"name": "a"}), [], "arm a: give either a recipe, or the checkpoint"),
        (given({"name": "a", "checkpoint": "x"}, seeds=0), [], "seeds is 0"),
        (given({"name": "a", "checkpoint": "x"}, world={"pictures": 1}), [], "world: unknown key 'pictures'"),
        (given({"name": "a", "checkpoint": "x"}, world={"train_pictures": 0}), [], "world: train_pictures is 0"),
        (given({"name": "a", "recipe": {"stages": ["ptt"]}}), [], "no stage 'ptt'"),
        (given({"name": "a", "recipe": {"model": {"encodr": "x"}}}), [], "arm a: model: unknown key 'encodr'"),
        (given({"name": "a", "recipe": {}}), ["stages.ptt.train=1"], "no stage 'ptt'"),
        (
            given(
                {"name": "a", "recipe": {"stages": ["pt", "sft"]}}, {"name": "b", "recipe": {"stages": ["dpt", "sft"]}}
            ),
            [],
            "arms 'a' and 'b' both keep a stage 'sft' in .*and the two differ",
        ),
    ],
)
def test_mistakes_in_a_matrix_are_named(matrix: dict[str, Any], changes: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Matrix.from_dict(matrix, changes)


def test_overrides_reach_the_matrix_and_every_arm_that_has_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["seeds=3", "recipe.stages.pt.training.learning_rate=1e-4", "arms.PT-DFT.seeds=1"]
    assert main(["ablate", "ablation/table4", "root=there", *changes, "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seeds"], printed["arms"][2]["seeds"]) == (3, 1)
    assert printed["output"] == "there/runs/ablation/table4"
    rates = {arm["name"]: arm["recipe"]["stages"][0]["training"]["learning_rate"] for arm in printed["arms"]}
    assert rates == {"PT-SFT": 1e-4, "DPT-SFT": 1e-3, "PT-DFT": 1e-4, "DPT-DFT": 1e-3}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["ablation/table4", "--only", "PT-SFTT"], "--only: unknown key 'PT-SFTT'; did you mean 'PT-SFT'"),
        (["paper/qwen2.5-3b-teacher"], "has no arms, so it is no ablation; `switchkd train` runs a recipe"),
        (["ablation/table9"], "no such recipe file"),
    ],
)
def test_mistakes_of_the_command_end_in_one_line_and_2(words: list[str], reason: str, capsys: Any) -> None:
    assert main(["ablate", *words, "--print-config"]) == 2
    assert reason in capsys.readouterr().err
