"""Metrics over questions: figures worked out by hand, kinds, defaults, and questions that do not fit."""

import random
from typing import Any

import pytest

from switchkd.training.evaluation.metrics import ALL, METRICS, FigureOf, Scored, default_metrics, metric_of
from switchkd.training.evaluation.questions import EvaluationError, Question


def ask(number: int, reference: str, picture: str = "", **more: Any) -> Question:
    name = f"q{number:03}"
    return Question(key=name, name=name, cluster=picture or name, reference=reference, **more)


def values(metric: str, questions: list[Question], answers: list[str], kind: str = ALL) -> dict[str, float]:
    scored = Scored.of(METRICS[metric], questions, [answers])
    return {figure.name: scored.estimate(figure, kind).value for figure in scored.figures(kind)}


def figure_of(metric: str, name: str) -> FigureOf:
    return next(figure for figure in METRICS[metric].figures if figure.name == name)


# Two questions each about ten pictures; true yes 7, false yes 2, false no 3, true no 8.
LABELS = ["yes"] * 7 + ["no"] * 2 + ["yes"] * 3 + ["no"] * 8
SAID = ["Yes."] * 9 + ["No."] * 11
YES_NO = [ask(number, label, f"p{number % 10}") for number, label in enumerate(LABELS)]


def test_popes_figures() -> None:
    assert values("pope", YES_NO, SAID) == pytest.approx(
        {"accuracy": 15 / 20, "precision": 7 / 9, "recall": 7 / 10, "F1": 14 / 19, "yes ratio": 9 / 20}
    )
    never = values("pope", YES_NO, ["no"] * 20)
    assert (never["precision"], never["recall"], never["F1"], never["accuracy"]) == (0, 0, 0, 0.5)


def test_f1_has_a_bootstrap_and_accuracy_a_clustered_interval() -> None:
    scored = Scored.of(METRICS["pope"], YES_NO, [SAID])
    hows = {figure.name: scored.estimate(figure).how for figure in scored.figures(ALL)}
    assert {hows[name] for name in ("precision", "recall", "F1")} == {"bootstrap over pictures"}
    assert {hows[name] for name in ("accuracy", "yes ratio")} == {"clustered Wilson"}
    assert scored.estimate(figure_of("pope", "F1")).clusters == 10


def mme() -> tuple[list[Question], list[str]]:
    """Three pictures of two kinds: count has p0 with both right and p1 with one, color p2 with none."""
    rows = [
        ("count", "p0", "yes", "Yes, it is"),
        ("count", "p0", "no", "No"),
        ("count", "p1", "yes", "yes"),
        ("count", "p1", "no", "It is not"),  # neither in the first four letters: other
        ("color", "p2", "yes", "no"),
        ("color", "p2", "no", "yes"),
    ]
    questions = [ask(number, label, picture, kind=kind) for number, (kind, picture, label, _) in enumerate(rows)]
    return questions, [row[3] for row in rows]


def test_mmes_figures() -> None:
    questions, answers = mme()
    assert values("mme", questions, answers, "count") == pytest.approx({"acc": 3 / 4, "acc+": 1 / 2, "score": 1.25})
    assert values("mme", questions, answers, "color") == {"acc": 0, "acc+": 0, "score": 0}
    # Over all: 3 of 6 right, 1 of 3 pictures; the sum over kinds is 1.25 + 0.
    assert values("mme", questions, answers) == pytest.approx(
        {"acc": 1 / 2, "acc+": 1 / 3, "score": 5 / 6, "sum of the kinds' scores": 1.25}
    )


def test_mme_needs_two_questions_a_picture() -> None:
    questions, answers = mme()
    with pytest.raises(EvaluationError, match=r"q004: 1 questions of its kind .*is --limit odd\?"):
        values("mme", questions[:5], answers[:5])


def test_means_and_kinds() -> None:
    questions = [
        ask(0, "The cat.", kind="thing"),
        ask(1, "no", answers=("red", "dark red"), kind="colour"),
        ask(2, "blue", kind="colour"),
    ]
    answers = ["a cat", "Red", "green"]
    assert values("exact", questions, answers) == {"accuracy": pytest.approx(2 / 3)}
    assert values("exact", questions, answers, "colour") == {"accuracy": 0.5}
    assert Scored.of(METRICS["exact"], questions, [answers]).kinds() == [ALL, "colour", "thing"]
    assert values("anls", questions, ["the cat", "dark rad", "green"])["ANLS"] == pytest.approx((7 / 8 + 7 / 8) / 3)
    assert values("relaxed", [ask(0, "100"), ask(1, "x", answers=("7", "9"))], ["104", "9.2"])["accuracy"] == 1


def test_vqa_takes_the_people_and_choice_the_letters() -> None:
    people = ("2",) * 2 + tuple("abcdefgh")
    assert values("vqa", [ask(0, "2", answers=people)], ["two"]) == {"accuracy": pytest.approx(0.6)}
    choices = {"A": "cat", "B": "dog"}
    questions = [ask(0, "B", choices=choices), ask(1, "dog", choices=choices), ask(2, "(A)", choices=choices)]
    assert values("choice", questions, ["The answer is B", "A", "cat"]) == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("metric", "question", "reason"),
    [
        ("vqa", ask(0, "a", answers=("a", "b", "c")), "q000: has the answers of 3 people.*--metric exact"),
        ("choice", ask(0, "a"), "q000: has no choices"),
        ("choice", ask(0, "E", choices={"A": "x", "B": "y"}), "q000: its last turn 'E' is none of the choices A, B"),
        ("pope", ask(0, "maybe"), "q000: the right answer is 'maybe', expected yes or no"),
        ("mme", ask(0, "2"), "q000: the right answer is '2', expected yes or no"),
    ],
)
def test_questions_that_a_metric_is_not_for(metric: str, question: Question, reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        values(metric, [question], ["a"])


def test_the_data_choose_the_metric_where_nobody_does() -> None:
    people = tuple("abcdefghij")
    assert default_metrics([ask(0, "a", choices={"A": "x", "B": "y"}, answers=people)]) == ("choice",)
    assert default_metrics([ask(0, "a", answers=people)]) == ("vqa",)
    assert default_metrics([ask(0, "a", answers=people), ask(1, "a")]) == ("exact",)
    with pytest.raises(EvaluationError, match="no metric 'f1'; known are exact, vqa, relaxed, anls, pope, mme, choice"):
        metric_of("f1")


def test_the_order_of_questions_changes_nothing() -> None:
    order = list(range(20))
    random.Random(0).shuffle(order)
    there = Scored.of(METRICS["pope"], YES_NO, [SAID])
    shuffled = Scored.of(METRICS["pope"], [YES_NO[place] for place in order], [[SAID[place] for place in order]])
    for figure in METRICS["pope"].figures:
        assert there.estimate(figure) == shuffled.estimate(figure)


def test_a_model_against_itself_is_nothing_and_other_questions_are_refused() -> None:
    scored = Scored.of(METRICS["pope"], YES_NO, [SAID])
    for figure in METRICS["pope"].figures:
        found = scored.minus(scored, figure)
        assert (found.value, found.low, found.high) == (0, 0, 0)
    swapped = Scored.of(METRICS["exact"], [ask(0, "a", "p"), ask(1, "a", "p"), ask(2, "a")], [["a", "b", "a"]])
    other = Scored.of(METRICS["exact"], swapped.questions, [["b", "a", "a"]])  # not the same, by picture the same
    found = swapped.minus(other, METRICS["exact"].figures[0])
    assert (found.value, found.low, found.note[:25]) == (0, None, "every picture shows the s")
    fewer = Scored.of(METRICS["pope"], YES_NO[1:], [SAID[1:]])
    with pytest.raises(EvaluationError, match="the two sides answered other questions"):
        scored.minus(fewer, METRICS["pope"].figures[0])


def test_a_difference_of_f1_is_paired_by_picture() -> None:
    worse = ["No." if number in (0, 3) else said for number, said in enumerate(SAID)]
    scored, other = (Scored.of(METRICS["pope"], YES_NO, [answers]) for answers in (SAID, worse))
    found = scored.minus(other, figure_of("pope", "F1"))
    assert found.value == pytest.approx(14 / 19 - 10 / 17)
    assert found.how == "bootstrap over pictures"
    apart = [side.estimate(figure_of("pope", "F1")).standard_error or 0 for side in (scored, other)]
    assert (found.standard_error or 9) < sum(error**2 for error in apart) ** 0.5
