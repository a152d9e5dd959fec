"""The metrics by name: what each counts of an answer, and the figures that come of the sums.

Shapes: Q questions, S seeds, C clusters, K sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .answer_rules import (
    anls,
    choice_letter,
    mme_label,
    normalise,
    pope_says_yes,
    relaxed_match,
    vqa_accuracy,
)
from .intervals import Estimate, Figure, Floats, Sums, difference, estimate, no_difference
from .questions import EvaluationError, Question

MOST_ALONE = 3  # people: min(1, matches / 3) could never be 1 with so few
ALL = "all"


@dataclass(frozen=True)
class FigureOf:
    """One figure of a metric: `sums` takes what it needs of the metric's sums, `value` makes the number of it.

    `mean` says that it is a mean over questions of scores between 0 and 1; `overall` that it is of all kinds alone.
    """

    name: str
    sums: Callable[[Floats], Floats]
    value: Figure
    mean: bool = True
    overall: bool = False


@dataclass(frozen=True)
class Metric:
    """A metric: `rows` gives what is added up of every question and its answer, as Q x K numbers."""

    name: str
    title: str
    rows: Callable[[Sequence[Question], Sequence[str]], Floats]
    figures: tuple[FigureOf, ...]


def ratio(sums: Floats) -> Floats:
    """The first sum by the second; 0 where there is nothing to divide by, as scikit-learn has it for precision."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] != 0)


# --- means of one score ---


def _mean_of(name: str, title: str, figure: str, score: Callable[[Question, str], float]) -> Metric:
    def rows(questions: Sequence[Question], answers: Sequence[str]) -> Floats:
        return np.array([(score(q, answer), 1.0) for q, answer in zip(questions, answers, strict=True)], dtype=float)

    return Metric(name, title, rows, (FigureOf(figure, lambda sums: sums, ratio),))


def _exact(question: Question, answer: str) -> float:
    return float(normalise(answer) in {normalise(right) for right in question.accepted})


def _vqa(question: Question, answer: str) -> float:
    if len(question.answers) <= MOST_ALONE:
        raise EvaluationError(
            f"{question.name}: has the answers of {len(question.answers)} people, and VQA's accuracy counts how many "
            "of some ten agree; give them as `answers`, or take --metric exact"
        )
    return vqa_accuracy(answer, question.answers)


def _relaxed(question: Question, answer: str) -> float:
    return float(any(relaxed_match(answer, right) for right in question.accepted))


def _choice(question: Question, answer: str) -> float:
    if not question.choices:
        raise EvaluationError(f"{question.name}: has no choices; give texts as `choices`, or take --metric exact")
    right = choice_letter(question.reference, question.choices)
    if right is None:
        raise EvaluationError(
            f"{question.name}: its last turn {question.reference!r:.40} is none of the choices "
            f"{', '.join(question.choices)}; give a letter or a choice's text"
        )
    return float(choice_letter(answer, question.choices) == right)


# --- yes and no ---


def _label(question: Question) -> bool:
    label = normalise(question.reference)
    if label not in ("yes", "no"):
        raise EvaluationError(
            f"{question.name}: the right answer is {question.reference!r:.40}, expected yes or no; this metric is for "
            "such questions alone, take --metric exact"
        )
    return label == "yes"


def _pope_rows(questions: Sequence[Question], answers: Sequence[str]) -> Floats:
    """True and false yes, false and true no, by question."""
    rows = np.zeros((len(questions), 4))
    for row, question, answer in zip(rows, questions, answers, strict=True):
        right, said = _label(question), pope_says_yes(answer)
        row[(0 if right else 1) if said else (2 if right else 3)] = 1
    return rows


def _columns(top: Sequence[int], below: Sequence[int]) -> Callable[[Floats], Floats]:
    """A ratio of sums of columns."""
    return lambda sums: np.stack([sums[..., list(top)].sum(-1), sums[..., list(below)].sum(-1)], axis=-1)


def _f1(sums: Floats) -> Floats:
    return ratio(np.stack([2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2]], axis=-1))


_POPE = Metric(
    "pope",
    "POPE",
    _pope_rows,
    (
        FigureOf("accuracy", _columns((0, 3), (0, 1, 2, 3)), ratio),
        FigureOf("precision", _columns((0,), (0, 1)), ratio, mean=False),
        FigureOf("recall", _columns((0,), (0, 2)), ratio, mean=False),
        FigureOf("F1", lambda sums: sums, _f1, mean=False),
        FigureOf("yes ratio", _columns((0, 1), (0, 1, 2, 3)), ratio),
    ),
)


def _mme_rows(questions: Sequence[Question], answers: Sequence[str]) -> Floats:
    """For every kind right, asked, and half a pair and half a pair right for each of a picture's two questions."""
    kinds = sorted({question.kind or "" for question in questions})
    pairs: dict[tuple[str, str], list[int]] = {}
    rows = np.zeros((len(questions), len(kinds), 4))
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        kind = question.kind or ""
        pairs.setdefault((kind, question.cluster), []).append(number)
        right = mme_label(answer) == ("yes" if _label(question) else "no")
        rows[number, kinds.index(kind)] = (right, 1, 0, 0.5)
    for (kind, _), members in pairs.items():
        if len(members) != 2:
            raise EvaluationError(
                f"{questions[members[0]].name}: {len(members)} questions of its kind are about its picture; MME's acc+ "
                "is of two (is --limit odd?)"
            )
        place = kinds.index(kind)
        rows[members, place, 2] = 0.5 * float(rows[members, place, 0].min())
    return rows.reshape(len(questions), -1)


def _mme_accuracies(sums: Floats) -> tuple[Floats, Floats]:
    """MME's acc and acc+, of each kind."""
    by_kind = sums.reshape(*sums.shape[:-1], -1, 4)
    return ratio(by_kind[..., :2]), ratio(by_kind[..., 2:])


def _over_kinds(first: int) -> Callable[[Floats], Floats]:
    return lambda sums: sums.reshape(*sums.shape[:-1], -1, 4).sum(axis=-2)[..., first : first + 2]


def _mme_score(sums: Floats) -> Floats:
    together = sums.reshape(*sums.shape[:-1], -1, 4).sum(axis=-2)
    return ratio(together[..., :2]) + ratio(together[..., 2:])


def _mme_sum(sums: Floats) -> Floats:
    accuracy, plus = _mme_accuracies(sums)
    return np.asarray((accuracy + plus).sum(axis=-1))


_MME = Metric(
    "mme",
    "MME",
    _mme_rows,
    (
        FigureOf("acc", _over_kinds(0), ratio),
        FigureOf("acc+", _over_kinds(2), ratio, mean=False),
        FigureOf("score", lambda sums: sums, _mme_score, mean=False),
        FigureOf("sum of the kinds' scores", lambda sums: sums, _mme_sum, mean=False, overall=True),
    ),
)

METRICS = {
    metric.name: metric
    for metric in (
        _mean_of("exact", "exact match", "accuracy", _exact),
        _mean_of("vqa", "VQA accuracy", "accuracy", _vqa),
        _mean_of("relaxed", "relaxed accuracy", "accuracy", _relaxed),
        _mean_of("anls", "ANLS", "ANLS", lambda question, answer: anls(answer, question.accepted)),
        _POPE,
        _MME,
        _mean_of("choice", "multiple choice", "accuracy", _choice),
    )
}


def metric_of(name: str) -> Metric:
    """A metric by its name. Raises EvaluationError."""
    if name not in METRICS:
        raise EvaluationError(f"there is no metric {name!r}; known are {', '.join(METRICS)}")
    return METRICS[name]


def default_metrics(questions: Sequence[Question]) -> tuple[str, ...]:
    """What the records ask for: `choice` where all have choices, `vqa` where all have several people's answers."""
    if all(question.choices for question in questions):
        return ("choice",)
    if all(len(question.answers) > MOST_ALONE for question in questions):
        return ("vqa",)
    return ("exact",)


# --- figures with their intervals ---


@dataclass(frozen=True)
class Scored:
    """A metric's sums of every figure, for one system's seeds over the same questions."""

    metric: Metric
    questions: Sequence[Question]
    rows_SQK: Floats

    @classmethod
    def of(cls, metric: Metric, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> Scored:
        """Score the answers of every seed. Raises EvaluationError where the questions do not fit the metric."""
        return cls(metric, questions, np.stack([metric.rows(questions, seed) for seed in answers]))

    def kinds(self) -> list[str]:
        """`all`, and the kinds of questions where there are any."""
        return [ALL, *sorted({question.kind for question in self.questions if question.kind is not None})]

    def figures(self, kind: str) -> list[FigureOf]:
        """The figures that there are of a kind."""
        several = len(self.kinds()) > 2
        return [figure for figure in self.metric.figures if not figure.overall or (kind == ALL and several)]

    def estimate(self, figure: FigureOf, kind: str = ALL) -> Estimate:
        """A figure with its interval."""
        return estimate(self.sums(figure, kind), figure.value, mean=figure.mean)

    def minus(self, other: Scored, figure: FigureOf, kind: str = ALL) -> Estimate:
        """The paired difference, with its interval. Raises EvaluationError where the questions are not the same."""
        if [question.key for question in self.questions] != [question.key for question in other.questions]:
            raise EvaluationError("the two sides answered other questions; a paired difference needs the very same")
        one, against = self.sums(figure, kind), other.sums(figure, kind)
        chosen = self._of_kind(kind)
        same = np.array_equal(self.rows_SQK[:, chosen], other.rows_SQK[:, chosen])
        return no_difference(one) if same else difference(one, against, figure.value, mean=figure.mean)

    def sums(self, figure: FigureOf, kind: str = ALL) -> Sums:
        """What the figure adds up, by seed and cluster; clusters in the order of their hashes."""
        chosen = self._of_kind(kind)
        clusters = [self.questions[number].cluster for number in chosen]
        place_of = {cluster: place for place, cluster in enumerate(sorted(set(clusters)))}
        rows_SQK = figure.sums(self.rows_SQK[:, chosen])
        sums_SCK = np.zeros((len(rows_SQK), len(place_of), rows_SQK.shape[-1]))
        places_Q = np.array([place_of[cluster] for cluster in clusters])
        for sums_CK, rows_QK in zip(sums_SCK, rows_SQK, strict=True):
            np.add.at(sums_CK, places_Q, rows_QK)
        return Sums(sums_SCK, len(chosen))

    def _of_kind(self, kind: str) -> list[int]:
        return [number for number, question in enumerate(self.questions) if kind in (ALL, question.kind)]
