"""`switchkd eval` through the real command: checkpoints, bundles, planted accuracies, kills, comparisons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from switchkd.cli.main import main
from switchkd.training.evaluation.kept_answers import Stamp, filling, read_results
from switchkd.training.evaluation.questions import EvaluationError, read_questions

Report = dict[str, Any]
WORDS = ("How many red circles", "What colour is the square", "Is there a blue triangle", "Describe what you see")


def record(number: int, picture: str | None, reference: str = "wrong", **more: Any) -> dict[str, Any]:
    question = f"{WORDS[number % 4]} in place {number}?"
    first = question if picture is None else f"<image>\n{question}"
    turns = [{"from": "human", "value": first}, {"from": "gpt", "value": reference}]
    return {"id": f"r{number}", "conversations": turns} | ({} if picture is None else {"image": picture}) | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures and twelve questions about them, of two kinds, and two without a picture; every answer is wrong."""
    folder = tmp_path_factory.mktemp("eval")
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (30, 24), colour).save(folder / f"{number}.png")
    records = [record(number, f"{number % 4}.png", kind="ab"[number % 2]) for number in range(12)]
    write(folder / "blank.json", [*records, record(12, None, kind="b"), record(13, None, kind="a")])
    return folder


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records))
    return path


def evaluate(*words: str | Path, out: Path) -> Report:
    code = main(["eval", *map(str, words), "--max-new-tokens", "6", "--out", str(out)])
    assert code == 0
    return dict(json.loads((out / "report.json").read_text()))


def accuracy(report: Report, kind: str = "all", part: str = "estimate") -> dict[str, Any]:
    return dict(report["metrics"]["exact"][kind]["accuracy"][part])


@pytest.fixture(scope="module")
def data(folder: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same questions, with what the tiny checkpoint says as the right answer to eight of the fourteen."""
    out = tmp_path_factory.mktemp("first")
    evaluate(tiny_checkpoint, "--data", folder / "blank.json", out=out)
    (results,) = out.glob("*/stamp.json")
    said = {q.name: a.text for q, a in zip(*answered(results.parent), strict=True)}
    records = json.loads((folder / "blank.json").read_text())
    # An answer cut off within a character ends otherwise in a bundle, which waits for the rest.
    whole = [row for row in records[:12] if not said[row["id"]].endswith("\ufffd")]
    for row in whole[:8]:
        row["conversations"][-1]["value"] = said[row["id"]]
    return write(folder / "data.json", records)


def answered(results: Path) -> tuple[Any, Any]:
    read = read_results(results)
    return read.questions, read.answers


def only(out: Path) -> Path:
    """The one results folder."""
    (stamp,) = out.glob("*/stamp.json")
    return stamp.parent


def test_a_checkpoints_planted_accuracy_by_kind_with_intervals(
    data: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(tiny_checkpoint, "--data", data, out=tmp_path)
    assert (report["questions"], report["pictures"]) == (14, 6)  # questions without a picture stand for themselves
    assert accuracy(report)["value"] == pytest.approx(8 / 14)
    assert [accuracy(report, kind)["value"] for kind in "ab"] == pytest.approx([3 / 7, 5 / 7])
    # By picture 2, 3, 1, 2 of 3 right, and twice 0 of 1: residuals 2/7, 9/7, -5/7, 2/7, -4/7, -4/7.
    assert accuracy(report)["standard_error"] == pytest.approx(
        (6 / 5 * (4 + 81 + 25 + 4 + 16 + 16) / 49 / 14**2) ** 0.5
    )
    assert accuracy(report)["low"] < 8 / 14 < accuracy(report)["high"]
    (seed,) = report["system"]["seeds"]
    assert seed["settings"] == {"greedy": True, "max_new_tokens": 6}
    assert len(seed["template_sha256"]) == 64
    assert seed["sessions"][0]["versions"]["torch"]
    assert "processor" in seed["sessions"][0]["machine"]
    assert seed["cut_off"] > 0
    out = capsys.readouterr().out
    assert "exact match, %" in out
    assert f"57.1 [{100 * accuracy(report)['low']:.1f}, {100 * accuracy(report)['high']:.1f}]" in out
    assert "57.1 [" in (tmp_path / "report.md").read_text()
    assert (only(tmp_path) / "report.md").read_text() == (tmp_path / "report.md").read_text()


def test_order_and_batch_change_nothing_and_nothing_is_asked_twice(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    backwards = write(data.parent / "backwards.json", json.loads(data.read_text())[::-1])
    first = evaluate(tiny_checkpoint, "--data", data, "--batch", "1", out=tmp_path / "one")
    second = evaluate(tiny_checkpoint, "--data", backwards, "--batch", "16", out=tmp_path / "two")
    assert first["metrics"] == second["metrics"]
    assert first["system"]["seeds"][0]["stamp"] == second["system"]["seeds"][0]["stamp"]
    assert answered(only(tmp_path / "one")) == answered(only(tmp_path / "two"))
    kept = (only(tmp_path / "one") / "answers.jsonl").stat()
    again = evaluate(tiny_checkpoint, "--data", backwards, "--batch", "5", out=tmp_path / "one")
    assert (only(tmp_path / "one") / "answers.jsonl").stat().st_mtime_ns == kept.st_mtime_ns
    assert again == first


def test_a_bundle_needs_no_torch_and_answers_as_its_checkpoint(
    data: Path, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    blocked = ("torch", "transformers", "accelerate", "onnx", "datasets", "sklearn", "matplotlib", "yaml", "scipy")
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "from switchkd.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = ["eval", f"{tiny_bundle}:fp32", "--data", str(data), "--max-new-tokens", "6", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["system"]["name"] == "bundle:fp32"
    assert accuracy(report)["value"] == pytest.approx(8 / 14)
    both = evaluate(tiny_bundle, "--precision", "fp32", "--against", tiny_checkpoint, "--data", data, out=tmp_path)
    difference = accuracy(both, part="difference")
    assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)
    assert difference["excludes_zero"] is False


def test_modules_of_the_evaluation_need_no_torch() -> None:
    place = Path(__file__).parents[2] / "training" / "evaluation"
    names = [f"switchkd.training.evaluation.{path.stem}" for path in place.glob("*.py") if path.stem[0] != "_"]
    assert len(names) > 6
    code = (
        "import sys, importlib\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"for name in {names!r}:\n    if not name.endswith('.answers'): importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_killed_evaluation_goes_on_behind_what_is_answered(folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    many = write(folder / "many.json", [record(number, f"{number % 4}.png") for number in range(300)])
    words = ["eval", str(tiny_bundle), "--data", str(many), "--max-new-tokens", "6", "--out"]
    command = [sys.executable, "-m", "switchkd.cli.main", *words, str(tmp_path / "killed"), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("killed/*/answers.jsonl")) < 5:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "no answer came"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    results = only(tmp_path / "killed")
    before = (results / "answers.jsonl").read_bytes()
    assert 5 <= before.count(b"\n") < 300
    with pytest.raises(EvaluationError, match=r"of 300 answers are missing; the command that began it goes on"):
        read_results(results)
    with (results / "answers.jsonl").open("ab") as file:
        file.write(b'{"question": "half a li')
    assert main([*words, str(tmp_path / "killed")]) == 0
    after = (results / "answers.jsonl").read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    assert after.count(b"\n") == 300
    assert len({json.loads(line)["question"] for line in after.splitlines()}) == 300
    assert main([*words, str(tmp_path / "whole")]) == 0
    assert answered(only(tmp_path / "whole")) == answered(results)


def test_another_model_other_data_and_other_settings_have_folders_of_their_own(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed" / "checkpoint"
    shutil.copytree(tiny_checkpoint, changed)
    evaluate(tiny_checkpoint, "--data", data, out=tmp_path / "out")
    evaluate(changed, "--data", data, out=tmp_path / "out")  # the same files elsewhere are the same model
    assert len(list((tmp_path / "out").glob("*/stamp.json"))) == 1
    (changed / "chat_template.jinja").write_text("{# #}" + (changed / "chat_template.jinja").read_text())
    evaluate(changed, "--data", data, out=tmp_path / "out")
    pictures = shutil.copytree(data.parent, tmp_path / "pictures")
    Image.new("RGB", (30, 24), "black").save(pictures / "0.png")
    evaluate(tiny_checkpoint, "--data", data, "--pictures", pictures, out=tmp_path / "out")
    main(["eval", str(tiny_checkpoint), "--data", str(data), "--out", str(tmp_path / "out"), "--max-new-tokens", "5"])
    stamps = [read_results(path.parent).stamp for path in (tmp_path / "out").glob("*/stamp.json")]
    assert len(stamps) == 4
    original = next(path.parent for path in (tmp_path / "out").glob("*/stamp.json"))
    first = read_results(original)
    for part in ("model", "data", "settings"):
        other = Stamp(**{**first.stamp.__dict__, part: {"other": 1} if part != "data" else "other"})
        with pytest.raises(EvaluationError, match=f"holds answers of another {part}; they are never mixed"):
            filling(original, other, first.questions, {}, {}).__enter__()


def test_a_second_process_on_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    questions, stamp = read_questions(data, data.parent), Stamp({"a": 1}, "data", {})
    with filling(tmp_path, stamp, questions, {"name": "m"}, {}):
        code = (
            "import sys\nfrom pathlib import Path\nfrom switchkd.training.evaluation.kept_answers import *\n"
            f"filling(Path({str(tmp_path)!r}), Stamp({{'a': 1}}, 'data', {{}}), [], {{}}, {{}}).__enter__()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process fills it just now" in done.stderr


def test_metrics_of_finished_results_need_neither_model_nor_data(
    data: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    evaluate(checkpoint, "--data", data, out=tmp_path / "out")
    shutil.rmtree(checkpoint)
    report = evaluate(tmp_path / "out", "--metric", "exact", "--metric", "anls", out=tmp_path / "again")
    assert accuracy(report)["value"] == pytest.approx(8 / 14)
    assert report["metrics"]["anls"]["all"]["ANLS"]["estimate"]["value"] >= 8 / 14
    found = evaluate(tmp_path / "out", "--against", tmp_path / "out", out=tmp_path / "again")
    assert [accuracy(found, part="difference")[name] for name in ("value", "low", "high")] == [0, 0, 0]
    assert "accuracy: model (1) minus model (2): 0 [0, 0], since every score is the same." in capsys.readouterr().out


def test_results_of_other_questions_are_refused_before_anything_is_asked(
    data: Path, folder: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(tiny_checkpoint, "--data", folder / "blank.json", out=tmp_path / "blank")
    words = ["eval", str(tiny_checkpoint), "--against", str(tmp_path / "blank"), "--data", str(data), "--out"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "answers other questions than those of --data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    evaluate(tiny_checkpoint, "--data", data, out=tmp_path / "data")
    assert main(["eval", str(tmp_path / "data"), "--against", str(tmp_path / "blank"), "--out", str(tmp_path)]) == 2
    assert "the two sides answered other questions" in capsys.readouterr().err


def planted(tmp_path: Path, data: Path, name: str, wrong: Callable[[int], bool]) -> Path:
    """Finished results of a system that is wrong where it is told to be."""
    questions = read_questions(data, data.parent)
    folder = tmp_path / name
    from switchkd.training.evaluation.kept_answers import Answer

    about = {"name": name.split("/")[-1], "kind": "planted", "given": name}
    with filling(
        folder, Stamp({"name": name}, "planted", {}), questions, about, {"versions": {}, "machine": {}}
    ) as kept:
        by_number = sorted(questions, key=lambda question: int(question.name[1:]))
        kept.add((q.key, Answer("no" if wrong(n) else q.reference)) for n, q in enumerate(by_number))
    return folder


def test_a_planted_difference_is_told_with_its_interval_in_plain_words(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(folder / "planted.json", [record(n, f"{n % 4}.png" if n < 4 else None, "yes") for n in range(200)])
    good = planted(tmp_path, data, "good", lambda n: n % 10 == 0)
    bad = planted(tmp_path, data, "bad", lambda n: n % 10 < 3)
    report = evaluate(good, "--against", bad, out=tmp_path / "out")
    difference = accuracy(report, part="difference")
    assert difference["value"] == pytest.approx(0.2)
    assert difference["excludes_zero"] is True
    assert 0.1 < difference["low"] < 0.2 < difference["high"] < 0.3
    out = capsys.readouterr().out
    low, high = 100 * difference["low"], 100 * difference["high"]
    assert f"accuracy: good minus bad: +20.0 points, 95 % interval {low:+.1f} to {high:+.1f}. It excludes 0" in out
    near = planted(tmp_path, data, "near", lambda n: n % 10 == 1)
    evaluate(good, "--against", near, out=tmp_path / "out")
    assert "It includes 0: the two cannot be told apart by these questions." in capsys.readouterr().out


def test_seeds_are_a_second_level(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(folder / "seeds.json", [record(n, None, "yes") for n in range(100)])
    # Each seed of the one is right on 10, 20 and 30 more than that of the other.
    one = [planted(tmp_path, data, f"one{seed}", lambda n, s=seed: n < 20 - 10 * s) for seed in range(3)]  # type: ignore[misc]
    other = [planted(tmp_path, data, f"other{seed}", lambda n: n < 30) for seed in range(3)]
    report = evaluate(*one, "--against", *other, out=tmp_path / "out")
    difference = accuracy(report, part="difference")
    assert difference["value"] == pytest.approx(0.2)
    assert (difference["seeds"], difference["how"]) == (3, "two-level t")
    assert report["metrics"]["exact"]["all"]["accuracy"]["by_seed"] == pytest.approx([0.8, 0.9, 1.0])
    # MS_s = 100 (0.1² + 0 + 0.1²) / 2 = 1; 1, 2/3 and 1/3 by question, ten times each: MS_c = 3 (140/9 - 4) / 99; MS_e
    # is what is left of 60 - 12, over 2 x 99. The half-width has t = 4.30265 of seeds, t = 1.98422 of questions.
    ms_c = 3 * (140 / 9 - 4) / 99
    ms_e = (60 - 12 - 2 - 99 * ms_c) / 198
    half = ((4.302653**2 * (1 - ms_e) + 1.984217**2 * ms_c) / 300) ** 0.5
    assert (difference["low"], difference["high"]) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert "It includes 0" in capsys.readouterr().out  # two standard errors of the questions alone would not
    assert main(["eval", *map(str, one), "--against", *map(str, other[:2]), "--out", str(tmp_path / "out")]) == 2
    assert "3 models against 2; seeds are compared in pairs" in capsys.readouterr().err


def test_a_limit_is_the_same_draw_whatever_the_order_and_grows(data: Path) -> None:
    backwards = write(data.parent / "limit.json", json.loads(data.read_text())[::-1])
    draws = {
        limit: {q.key for q in read_questions(file, data.parent, limit)}
        for limit in (3, 7)
        for file in (data, backwards)
    }
    for limit, keys in draws.items():
        assert keys == {q.key for q in read_questions(data, data.parent, limit)}
        assert len(keys) == limit
    assert draws[3] < draws[7]
    pictures = [q.cluster for q in read_questions(data, data.parent, 7)]
    assert max(map(pictures.count, pictures)) == 3  # whole pictures


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{data}", "--data", "{data}"], "is a file; give a checkpoint folder, a bundle folder"),
        (["nowhere", "--data", "{data}"], "nowhere: is not there; give a checkpoint folder"),
        (["{checkpoint}"], "has no answers yet; --data FILE says what it is to be asked"),
        (["{checkpoint}", "--data", "{data}", "--limit", "0"], "--limit is 0, expected 1 or more questions"),
        (["{checkpoint}", "--data", "{data}", "--batch", "0"], "--batch is 0, expected 1 or more"),
        (["{checkpoint}", "--data", "{data}", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["{checkpoint}", "--data", "{data}", "--metric", "f1"], "there is no metric 'f1'; known are exact, vqa"),
        (["{checkpoint}", "--data", "{data}", "--metric", "pope"], "expected yes or no"),
        (["{bundle}:q9", "--data", "{data}"], "holds no graphs in 'q9', only fp32, int8"),
        (["{checkpoint}", "--data", "{data}", "--pictures", "{bundle}"], "--pictures is the folder"),
        (["{checkpoint}", "--data", "{data}.gone"], "there is no such file"),
    ],
)
def test_mistakes_are_one_line_and_2(
    words: list[str],
    reason: str,
    data: Path,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [word.format(data=data, checkpoint=tiny_checkpoint, bundle=tiny_bundle) for word in words]
    assert main(["eval", *filled, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"answers": "two"}, "answers is 'two', expected a list of texts"),
        ({"answers": [1, 2]}, r"answers is \[1, 2\], expected a list of texts"),
        ({"choices": ["one"]}, "expected 2 to 26 texts, or texts by letter"),
        ({"choices": {"first": "a", "B": "b"}}, "expected 2 to 26 texts, or texts by letter"),
    ],
)
def test_records_that_cannot_be_asked_are_named(folder: Path, tmp_path: Path, more: Any, reason: str) -> None:
    with pytest.raises(EvaluationError, match=f"r0: .*{reason}"):
        read_questions(write(tmp_path / "data.json", [record(0, None, **more)]), folder)


def test_answers_and_choices_are_read_as_data_sets_have_them(folder: Path, tmp_path: Path) -> None:
    rows = [
        record(0, "0.png", answers=[{"answer": "red", "answer_id": 1}, {"answer": "dark red", "answer_id": 2}]),
        record(1, "0.png", choices={"A": "x", "C": "y"}),
        record(2, "1.png", choices=["x", "y"]),
        record(2, "1.png", choices=["x", "y"]),  # the very same again is a question of its own
    ]
    questions = sorted(read_questions(write(tmp_path / "data.json", rows), folder), key=lambda q: (q.name, q.key))
    assert questions[0].answers == ("red", "dark red")
    assert [dict(q.choices) for q in questions[1:3]] == [{"A": "x", "C": "y"}, {"A": "x", "B": "y"}]
    assert questions[0].cluster == questions[1].cluster != questions[2].cluster
    assert len({q.key for q in questions}) == 4
    assert questions[0].messages[0]["content"][0] == {"type": "image"}
