"""A results folder: a model's answers as they came, the questions they answer, and all that they depend on.

    stamp.json       what the answers depend on (model, data, settings), and what is to be known about them
    questions.jsonl  the questions with their right answers, so that metrics need neither the data nor the model
    answers.jsonl    a line for each answer, on the disk before the next one is asked for

Another model, other data or other settings have another stamp, and a folder holds the answers of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .questions import EvaluationError, Question

if sys.platform != "win32":
    import fcntl

FORMAT = 1
STAMP, QUESTIONS, ANSWERS = "stamp.json", "questions.jsonl", "answers.jsonl"


@dataclass(frozen=True)
class Answer:
    """What was answered; `cut` where it had come to the most tokens and not to its end."""

    text: str
    cut: bool = False


@dataclass(frozen=True)
class Stamp:
    """What answers depend on: `model` (hashes of its files), `data` (a hash), `settings` (of generation)."""

    model: Mapping[str, Any]
    data: str
    settings: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        text = json.dumps([FORMAT, self.model, self.data, self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Stamp) -> list[str]:
        """Which parts are not the same."""
        return [part for part in ("model", "data", "settings") if getattr(self, part) != getattr(other, part)]


@dataclass(frozen=True)
class Results:
    """A finished folder: the questions in the order of their keys, each one's answer, and what is kept about them."""

    folder: Path
    stamp: Stamp
    about: Mapping[str, Any]
    questions: Sequence[Question]
    answers: Sequence[Answer]

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.about["name"])

    @property
    def texts(self) -> list[str]:
        """The answers' texts."""
        return [answer.text for answer in self.answers]

    @property
    def cut(self) -> int:
        """How many answers ended at the most tokens."""
        return sum(answer.cut for answer in self.answers)


def is_results(folder: Path) -> bool:
    """Whether a folder holds answers."""
    return (folder / STAMP).is_file()


def find_results(folder: Path) -> Path | None:
    """The results folder that this is, or the only one in it; None where there is none. Raises EvaluationError."""
    if is_results(folder):
        return folder
    inside = sorted(path.parent for path in folder.glob(f"*/{STAMP}"))
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise EvaluationError(f"{folder}: holds the results of several models ({names}); give one of these folders")
    return inside[0] if inside else None


def read_results(folder: Path) -> Results:
    """Read a finished results folder. Raises EvaluationError where answers are missing, or a file is damaged."""
    kept = _read_stamp(folder)
    questions = [Question.from_json(line) for line in _lines(folder / QUESTIONS)]
    answers = _answers(folder / ANSWERS)
    missing = sum(question.key not in answers for question in questions)
    if missing:
        raise EvaluationError(
            f"{folder}: {missing} of {len(questions)} answers are missing; the command that began it goes on with them"
        )
    return Results(folder, _stamp_of(kept), kept["about"], questions, [answers[question.key] for question in questions])


class AnswerFolder:
    """A results folder that is being filled; `answers` are those that it holds, by the key of their question."""

    def __init__(self, folder: Path, file: IO[bytes], answers: dict[str, Answer]) -> None:
        self.folder = folder
        self.answers = answers
        self._file = file

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Append answers, on the disk when this returns. Raises OSError."""
        lines = []
        for key, answer in answers:
            self.answers[key] = answer
            line = {"question": key, "answer": answer.text} | ({"cut": True} if answer.cut else {})
            lines.append(json.dumps(line) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def filling(
    folder: Path, stamp: Stamp, questions: Sequence[Question], about: Mapping[str, Any], session: Mapping[str, Any]
) -> Iterator[AnswerFolder]:
    """Open a results folder to go on with, or begin one; a line that a kill has cut off is dropped.

    `about` is kept from the beginning, a `session` is added for every time that it goes on. Raises EvaluationError
    where the folder holds the answers of another stamp, or another process fills it just now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS
    with path.open("ab") as file:
        _hold(file, folder)
        if is_results(folder):
            kept = _read_stamp(folder)
            if differs := _stamp_of(kept).differences(stamp):
                raise EvaluationError(
                    f"{folder}: holds answers of another {' and '.join(differs)}; they are never mixed: take another "
                    "--out, or remove the folder"
                )
        else:
            kept = {"format": FORMAT, "stamp": stamp.__dict__, "about": dict(about), "sessions": []}
            _write(folder / QUESTIONS, "".join(json.dumps(question.to_json()) + "\n" for question in questions))
        _drop_half_line(path)
        answers = _answers(path)
        if session not in kept["sessions"] and any(question.key not in answers for question in questions):
            kept["sessions"].append(dict(session))
        _write(folder / STAMP, json.dumps(kept, indent=1) + "\n")
        yield AnswerFolder(folder, file, answers)


def sessions_of(results: Results) -> list[dict[str, Any]]:
    """With which versions and on which machines the answers were made."""
    return list(_read_stamp(results.folder)["sessions"])


def _stamp_of(kept: Mapping[str, Any]) -> Stamp:
    return Stamp(**kept["stamp"])


def _read_stamp(folder: Path) -> dict[str, Any]:
    path = folder / STAMP
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}); evaluate into another folder") from None
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise EvaluationError(f"{path}: not results of this version (format {FORMAT}); evaluate into another folder")
    return kept


def _answers(path: Path) -> dict[str, Answer]:
    return {line["question"]: Answer(line["answer"], line.get("cut", False)) for line in _lines(path)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, but for a line at its end that is not whole yet."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror}); evaluate into another folder") from None
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{path}: line {number} is damaged ({error}); remove the folder, ask again") from None


def _drop_half_line(path: Path) -> None:
    """Cut off what is behind the last end of a line: a process was killed while it wrote it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _hold(file: IO[bytes], folder: Path) -> None:
    """Keep the file for this process, until it is closed or ends."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EvaluationError(
            f"{folder}: another process fills it just now; wait for it, or take another --out"
        ) from None
    except OSError:  # a file system without locks
        return
