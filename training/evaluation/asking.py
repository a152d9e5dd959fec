"""Asks a model what is not answered yet, and keeps every answer: whatever ends the process, the same call goes on."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from .kept_answers import Answer, Results, Stamp, filling, is_results, read_results
from .questions import Question, data_digest

MAX_NEW_TOKENS = 64
_PACKAGES = ("switchkd", "torch", "transformers", "onnxruntime", "tokenizers", "numpy", "pillow")


class Model(Protocol):
    """What can be asked: a checkpoint, a bundle, a server, or whatever else has these."""

    @property
    def name(self) -> str:
        """What it is called in tables and folders' names."""

    def identity(self) -> Mapping[str, Any]:
        """What makes it this model and no other: hashes of its files."""

    def about(self) -> Mapping[str, Any]:
        """What is to be known besides, asked once: `kind`, `given` (where it is), its chat template's hash."""

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[list[tuple[str, Answer]]]:
        """Answer questions greedily, some at a time and in any order, each with its question's key."""


def evaluate(
    model: Model,
    questions: Sequence[Question],
    out: Path,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    machine: Mapping[str, Any] | None = None,
) -> Results:
    """Let the model answer what it has not answered yet, into a folder of its own under `out`, and return the results.

    The folder is named after the model and what its answers depend on (`stamp_of`), so that a changed model gets
    another one. Raises EvaluationError, OSError and what the model raises.
    """
    stamp = stamp_of(model, questions, max_new_tokens)
    folder = out / f"{_as_file_name(model.name)}-{stamp.digest[:8]}"
    about = {} if is_results(folder) else {"name": model.name, **model.about()}
    session = {"versions": versions(), "machine": dict(machine or {})}
    with filling(folder, stamp, questions, about, session) as kept:
        left = [question for question in questions if question.key not in kept.answers]
        done = len(questions) - len(left)
        bar = tqdm(total=len(questions), initial=done, desc=model.name, unit="answer", disable=None)
        with bar:
            for answers in model.answer(left, max_new_tokens) if left else ():
                kept.add(answers)
                bar.update(len(answers))
    return read_results(folder)


def stamp_of(model: Model, questions: Sequence[Question], max_new_tokens: int = MAX_NEW_TOKENS) -> Stamp:
    """What a model's answers to these questions depend on."""
    return Stamp(dict(model.identity()), data_digest(questions), {"greedy": True, "max_new_tokens": max_new_tokens})


def versions() -> dict[str, str]:
    """The versions of what answers are made with, of those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _as_file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).strip(".-") or "model"
