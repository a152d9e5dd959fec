"""Questions of an evaluation: LLaVA records with a reference, in a form that does not depend on their order."""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from switchkd.export.folders.digests import sha256

from ..data.conversations import DataError, name_of, picture_of, to_messages
from ..data.records import read_records


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked; the message names what was found, why, and the way out."""


@dataclass(frozen=True)
class Question:
    """What is asked (`messages`, about `picture`) and what is right: `reference`, or one of several people's `answers`.

    `key` is a hash of the record and of its picture's bytes, `cluster` one of the picture alone: questions about one
    picture have one. `choices` are texts by letter. `picture` is None without one, and where answers are read again.
    """

    key: str
    name: str
    cluster: str
    reference: str
    answers: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)
    kind: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    picture: Path | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every answer that is right."""
        return self.answers or (self.reference,)

    def to_json(self) -> dict[str, Any]:
        """What a results folder keeps of it: everything but where the picture is on this machine."""
        kept = asdict(self)
        del kept["picture"]
        return kept

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Question:
        """The question that `to_json` has written."""
        lists = {name: tuple(kept[name]) for name in ("answers", "messages")}
        return cls(**{**kept, **lists})


def read_questions(file: Path, pictures: Path, limit: int | None = None) -> list[Question]:
    """The questions of a LLaVA JSON or JSONL file, sorted by key, so that the file's order changes nothing.

    `limit` takes that many of them: pictures in the order of their hashes, each with all of its questions, so that a
    smaller limit's are among a larger one's. Raises DataError and EvaluationError, which name the record.
    """
    digests: dict[str, str] = {}
    found = [_question(record, pictures, digests) for record in read_records(file)]
    seen: Counter[str] = Counter()
    unique = []
    for question in sorted(found, key=lambda question: question.key):
        seen[question.key] += 1
        again = seen[question.key]
        unique.append(question if again == 1 else _renamed(question, f"{question.key}-{again}"))
    if limit is None:
        return unique
    if limit < 1:
        raise EvaluationError(f"--limit is {limit}, expected 1 or more questions")
    return sorted(sorted(unique, key=lambda question: (question.cluster, question.key))[:limit], key=lambda q: q.key)


def data_digest(questions: Sequence[Question]) -> str:
    """A hash of the questions, their references and their pictures, whatever their order."""
    return hashlib.sha256("\n".join(sorted(question.key for question in questions)).encode()).hexdigest()


def _renamed(question: Question, key: str) -> Question:
    return Question(**{**question.__dict__, "key": key})


def _question(record: dict[str, Any], pictures: Path, digests: dict[str, str]) -> Question:
    name = name_of(record)
    messages = to_messages(record)
    if messages[-1]["role"] != "assistant":
        raise EvaluationError(f"{name}: its last turn is the {messages[-1]['role']}'s; it has to be the right answer")
    image = picture_of(record)
    picture = None if image is None else pictures / image
    if picture is not None and str(picture) not in digests:
        digests[str(picture)] = _picture_digest(picture, name)
    content = json.dumps(record, sort_keys=True, ensure_ascii=False)
    seen = "" if picture is None else digests[str(picture)]
    key = hashlib.sha256(f"{content}\n{seen}".encode("utf-8", "surrogatepass")).hexdigest()
    kind = record.get("kind")
    return Question(
        key=key,
        name=name,
        cluster=seen or key,
        reference=messages[-1]["content"],
        answers=_answers(record, name),
        choices=_choices(record, name),
        kind=None if kind is None else str(kind),
        messages=tuple(messages[:-1]),
        picture=picture,
    )


def _picture_digest(picture: Path, name: str) -> str:
    try:
        return sha256(picture)
    except OSError as error:
        raise DataError(
            f"{name}: {picture} cannot be read ({error.strerror}); --pictures is the folder that images are named from"
        ) from None


def _answers(record: dict[str, Any], name: str) -> tuple[str, ...]:
    """Texts, or objects with `answer` as VQAv2 has them."""
    given = record.get("answers")
    if given is None:
        return ()
    items = given if isinstance(given, list) else []
    texts = [text for item in items if isinstance(text := item.get("answer") if isinstance(item, dict) else item, str)]
    if not texts or len(texts) != len(items):
        raise EvaluationError(f"{name}: answers is {given!r:.60}, expected a list of texts, one of each person")
    return tuple(texts)


def _choices(record: dict[str, Any], name: str) -> dict[str, str]:
    """Texts by letter, from a list in the order of the letters or an object that has the letters as keys."""
    given = record.get("choices")
    if given is None:
        return {}
    if isinstance(given, list) and 2 <= len(given) <= 26:
        given = dict(zip(string.ascii_uppercase, given, strict=False))
    letters = isinstance(given, dict) and all(len(key) == 1 and key in string.ascii_uppercase for key in given)
    if not letters or not all(isinstance(text, str) for text in given.values()) or len(given) < 2:
        raise EvaluationError(
            f"{name}: choices is {record['choices']!r:.60}, expected 2 to 26 texts, or texts by letter"
        )
    return dict(given)
