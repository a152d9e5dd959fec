"""Evaluating from Python: any model that has the methods, faults in the middle, damaged folders, and the report."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from switchkd.training.evaluation import (
    Answer,
    EvaluationError,
    Question,
    System,
    evaluate,
    make_report,
    read_results,
    report_text,
)


class Parrot:
    """A model that repeats the question's name, and may fall silent after some answers."""

    def __init__(self, name: str = "parrot", silent_after: int | None = None) -> None:
        self.name = name
        self.asked: list[str] = []
        self._silent_after = silent_after

    def identity(self) -> Mapping[str, Any]:
        return {"parrot": self.name}

    def about(self) -> Mapping[str, Any]:
        return {}

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[list[tuple[str, Answer]]]:
        for number, question in enumerate(questions):
            if number == self._silent_after:
                raise RuntimeError("silence")
            self.asked.append(question.name)
            yield [(question.key, Answer(question.name[:max_new_tokens], cut=len(question.name) > max_new_tokens))]


def questions(count: int = 10) -> list[Question]:
    names = [f"name {number}" for number in range(count)]
    return [
        Question(key=f"k{n}", name=n, cluster=n, reference=n if number % 2 else "x") for number, n in enumerate(names)
    ]


def test_any_model_is_evaluated_and_a_fault_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    falls, goes_on = Parrot(silent_after=4), Parrot()
    with pytest.raises(RuntimeError, match="silence"):
        evaluate(falls, questions(), tmp_path)
    results = evaluate(goes_on, questions(), tmp_path)
    assert falls.asked == [f"name {number}" for number in range(4)]
    assert goes_on.asked == [f"name {number}" for number in range(4, 10)]
    assert results.texts == [f"name {number}" for number in range(10)]
    again = Parrot()
    assert evaluate(again, questions(), tmp_path) == results
    assert again.asked == []
    report = make_report(System((results,)), None, ["exact"])
    found = report["metrics"]["exact"]["all"]["accuracy"]["estimate"]
    assert (found["value"], found["questions"], found["clusters"]) == (0.5, 10, 10)
    assert "50.0 [" in report_text(report)


def test_answers_that_were_cut_off_are_counted(tmp_path: Path) -> None:
    results = evaluate(Parrot(), questions(), tmp_path, max_new_tokens=5)
    assert results.cut == 10
    assert "10 of its answers were cut off" in report_text(make_report(System((results,)), None, ["exact"]))


def test_a_name_is_no_way_out_of_the_folder(tmp_path: Path) -> None:
    results = evaluate(Parrot("../../a b:int8"), questions(), tmp_path / "out")
    assert results.folder.parent == tmp_path / "out"
    assert results.folder.name.startswith("a-b-int8-")


def test_damage_is_named(tmp_path: Path) -> None:
    folder = evaluate(Parrot(), questions(), tmp_path).folder
    whole = (folder / "answers.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join([lines[0], "gone\n", *lines[2:]]))
    with pytest.raises(EvaluationError, match=r"answers.jsonl: line 2 is damaged"):
        read_results(folder)
    (folder / "answers.jsonl").write_text("".join(lines[:9]))
    with pytest.raises(EvaluationError, match="1 of 10 answers are missing"):
        read_results(folder)
    (folder / "answers.jsonl").write_text(whole)
    (folder / "questions.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"questions.jsonl: cannot be read"):
        read_results(folder)
    (folder / "stamp.json").write_text("{}")
    with pytest.raises(EvaluationError, match="not results of this version"):
        read_results(folder)


def test_seeds_have_to_have_answered_the_same(tmp_path: Path) -> None:
    first, second = (evaluate(Parrot(str(count)), questions(count), tmp_path) for count in (10, 9))
    with pytest.raises(EvaluationError, match="answered other questions; seeds are compared on the very same"):
        System((first, second))
