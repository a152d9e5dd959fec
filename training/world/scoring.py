"""Scores answers by exact match: by kind, over all kinds, and above what guessing without the picture reaches."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.answers import generate_answers
from ..models.vlm import load_vlm


@dataclass(frozen=True)
class Score:
    """Accuracies between 0 and 1; `above_prior` is (accuracy - prior) / (1 - prior), 0 for a blind guesser."""

    accuracy: float
    by_kind: dict[str, float]
    prior: float
    prior_by_kind: dict[str, float]

    @property
    def above_prior(self) -> float:
        """The share of what is left above guessing that is reached, over all kinds."""
        return above(self.accuracy, self.prior)

    @property
    def above_prior_by_kind(self) -> dict[str, float]:
        """The same by kind."""
        return {kind: above(value, self.prior_by_kind[kind]) for kind, value in self.by_kind.items()}


def above(accuracy: float, prior: float) -> float:
    """The share of the way from the prior to 1; negative below the prior."""
    return (accuracy - prior) / (1 - prior) if prior < 1 else 0.0


def normalise(answer: str) -> str:
    """Lower case, single spaces, no article and no full stop."""
    words = answer.lower().strip().rstrip(".").split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words)


def score(answers: Sequence[str], records: Sequence[dict[str, Any]]) -> Score:
    """Score answers against the records' last turns. Raises ValueError if their numbers differ."""
    if len(answers) != len(records):
        raise ValueError(f"{len(answers)} answers for {len(records)} records; score what was asked")
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, record in zip(answers, records, strict=True):
        right[record["kind"]].append(normalise(answer) == normalise(record["conversations"][-1]["value"]))
    hits = [hit for kind in right.values() for hit in kind]
    priors = prior_by_kind(records)
    prior = sum(priors[record["kind"]] for record in records) / len(records)
    by_kind = {kind: sum(values) / len(values) for kind, values in right.items()}
    return Score(sum(hits) / len(hits), by_kind, prior, priors)


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


def score_checkpoint(checkpoint: Path, world: Path) -> dict[str, object]:
    """Accuracy over the test questions, by kind, and what guessing reaches."""
    records = json.loads((world / "test.json").read_text())
    answers = generate_answers(load_vlm(checkpoint), records, world / "pictures", title="test questions")
    result = score(answers, records)
    return {
        "accuracy": result.accuracy,
        "above_prior": result.above_prior,
        "by_kind": result.by_kind,
        "prior": result.prior,
        "prior_by_kind": result.prior_by_kind,
        "test_questions": len(records),
    }
