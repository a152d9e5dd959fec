"""Scores answers by exact match as the evaluation does: by kind, over all kinds, and above what guessing reaches."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.answers import generate_answers
from ..evaluation.intervals import Estimate
from ..evaluation.metrics import ALL, METRICS, Scored
from ..evaluation.questions import Question
from ..models.vlm import load_vlm

METRIC = METRICS["exact"]
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Score:
    """Accuracies between 0 and 1; `above_prior` is (accuracy - prior) / (1 - prior), 0 for a blind guesser.

    `estimates` are the accuracies with their intervals, by kind and of `all`.
    """

    estimates: dict[str, Estimate]
    prior: float
    prior_by_kind: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Over all kinds."""
        return self.estimates[ALL].value

    @property
    def by_kind(self) -> dict[str, float]:
        """The same by kind."""
        return {kind: found.value for kind, found in self.estimates.items() if kind != ALL}

    @property
    def above_prior(self) -> float:
        """The share of what is left above guessing that is reached, over all kinds."""
        return above(self.accuracy, self.prior)

    @property
    def above_prior_by_kind(self) -> dict[str, float]:
        """The same by kind."""
        return {kind: above(value, self.prior_by_kind[kind]) for kind, value in self.by_kind.items()}

    @property
    def intervals(self) -> dict[str, list[float | None]]:
        """The ends of the 95 % intervals, by kind and of `all`."""
        return {kind: [found.low, found.high] for kind, found in self.estimates.items()}


def above(accuracy: float, prior: float) -> float:
    """The share of the way from the prior to 1; negative below the prior."""
    return (accuracy - prior) / (1 - prior) if prior < 1 else 0.0


def score(answers: Sequence[str], records: Records) -> Score:
    """Score a model's answers against the records' last turns. Raises ValueError if their numbers differ."""
    return score_seeds([answers], records)


def score_seeds(seeds: Sequence[Sequence[str]], records: Records) -> Score:
    """Score the answers of every seed of one method: means over the seeds, whose chance is in the intervals."""
    scored = _scored(seeds, records)
    priors = prior_by_kind(records)
    prior = sum(priors[record["kind"]] for record in records) / len(records)
    estimates = {kind: scored.estimate(METRIC.figures[0], kind) for kind in scored.kinds()}
    return Score(estimates, prior, priors)


def difference(one: Sequence[Sequence[str]], other: Sequence[Sequence[str]], records: Records) -> Estimate:
    """One method's accuracy over all kinds minus another's, each given by seed: paired by question and by seed."""
    return _scored(one, records).minus(_scored(other, records), METRIC.figures[0])


def _scored(seeds: Sequence[Sequence[str]], records: Records) -> Scored:
    for answers in seeds:
        if len(answers) != len(records):
            raise ValueError(f"{len(answers)} answers for {len(records)} records; score what was asked")
    return Scored.of(METRIC, [_question(number, record) for number, record in enumerate(records)], seeds)


def _question(number: int, record: dict[str, Any]) -> Question:
    """A record as the evaluation scores it; its questions about one picture are one cluster."""
    key = f"{number:08}"
    reference = record["conversations"][-1]["value"]
    return Question(key, str(record.get("id", key)), record.get("image") or key, reference, kind=record["kind"])


def prior_by_kind(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the best constant fact for each wording reaches on these very records: the most generous blind guess."""
    facts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for record in records:
        facts[record["kind"]][record["template"]][record["fact"]] += 1
    return {
        kind: sum(max(counts.values()) for counts in templates.values())
        / sum(sum(counts.values()) for counts in templates.values())
        for kind, templates in facts.items()
    }


def read_test(world: Path) -> list[dict[str, Any]]:
    """A world's test questions."""
    return list(json.loads((world / "test.json").read_text()))


def answer_checkpoint(checkpoint: Path, world: Path) -> list[str]:
    """A checkpoint's answers to a world's test questions."""
    return generate_answers(load_vlm(checkpoint), read_test(world), world / "pictures", title="test questions")


def score_checkpoint(checkpoint: Path, world: Path) -> dict[str, object]:
    """Accuracy over the test questions, by kind, with its intervals, and what guessing reaches."""
    return described(score(answer_checkpoint(checkpoint, world), read_test(world)), len(read_test(world)))


def described(result: Score, questions: int) -> dict[str, object]:
    """A score as reports keep it."""
    return {
        "accuracy": result.accuracy,
        "above_prior": result.above_prior,
        "by_kind": result.by_kind,
        "intervals": result.intervals,
        "prior": result.prior,
        "prior_by_kind": result.prior_by_kind,
        "test_questions": questions,
    }
