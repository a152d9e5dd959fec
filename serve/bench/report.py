"""Runs contenders in turns and says what each stage took: medians, the least and the most, and on which machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contender import Contender
from .protocol import PROMPT, STAGES, TOKENS

SECOND = "second"  # the first token of another question about the same picture
_HEADS = {
    "load": "load s",
    "preprocess": "preprocess s",
    "encode": "encode s",
    "prefill": "prefill s",
    "first_token": "first token s",
    "token": "ms/token",
    "whole": "whole s",
    SECOND: "2nd question s",
    "peak": "peak MiB",
}


@dataclass(frozen=True)
class Report:
    """What was measured: for each contender every round's seconds by stage, its load seconds, memory and versions."""

    machine: Mapping[str, Any]
    threads: int
    question: str
    rounds: int
    contenders: Mapping[str, Mapping[str, Any]]

    def text(self) -> str:
        """A table for people: medians, with the least and the most below each."""
        rows = [["", *_HEADS.values(), "tokens"]]
        for name, found in self.contenders.items():
            cells = [_cells(found, head) for head in _HEADS]
            tokens = found["rounds"][TOKENS]
            rows.append([name, *(cell[0] for cell in cells), f"{statistics.median(tokens):g}"])
            rows.append(["", *(cell[1] for cell in cells), ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])  # names left, numbers right
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        machine = self.machine
        lines += [
            "",
            f"Medians of {self.rounds} rounds in turns, each with a new picture; below them the least and the most.",
            f"{self.threads} threads on {machine['processors']} logical processors of {machine['processor']}; "
            f"{machine['system']}.",
        ]
        for name, found in self.contenders.items():
            about = [f"{key} {value}" for key, value in found["about"].items()]
            if found[PROMPT] is not None:
                about.append(f"{found[PROMPT]} prompt tokens")
            lines.append(f"{name}: {', '.join(about)}")
        return "\n".join(line.rstrip() for line in lines)


def measure(
    contenders: Sequence[Contender],
    pictures: Sequence[Path],
    questions: tuple[str, str],
    tokens: int,
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, Any]]:
    """Ask each contender both questions about every picture, in turns, and return what `Report.contenders` holds.

    The first picture makes room for all others and is not counted. Raises ContenderError.
    """
    rounds: dict[str, dict[str, list[Any]]] = {
        contender.name: {key: [] for key in (*STAGES, SECOND, TOKENS)} for contender in contenders
    }
    prompts: dict[str, int | None] = {}
    for number, picture in enumerate(pictures):
        # Another one begins each time, so that nobody always follows the one who heated the processor most.
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            progress(number, len(pictures))
            answers = [
                contender.ask({"picture": str(picture), "question": question, "tokens": tokens})
                for question in questions
            ]
            if number == 0:
                continue
            found = rounds[contender.name]
            for key in (*STAGES, TOKENS):
                found[key].append(answers[0].get(key))
            found[SECOND].append(answers[1].get("first_token"))
            prompts[contender.name] = answers[0].get(PROMPT)
    return {
        contender.name: {
            "load": contender.load_seconds,
            "peak": contender.peak_mib,
            "about": contender.about,
            PROMPT: prompts[contender.name],
            "rounds": rounds[contender.name],
        }
        for contender in contenders
    }


def _cells(found: Mapping[str, Any], head: str) -> tuple[str, str]:
    """A median, and the least and the most; a dash for what a contender does not tell."""
    if head in ("load", "peak"):
        return f"{found[head]:.0f}" if head == "peak" else f"{found[head]:.2f}", ""
    values = [value * (1000 if head == "token" else 1) for value in found["rounds"][head] if value is not None]
    if not values:
        return "–", ""
    median, least, most = statistics.median(values), min(values), max(values)
    digits = 1 if head == "token" else 3 if median < 0.1 else 2
    return f"{median:.{digits}f}", f"{least:.{digits}f}–{most:.{digits}f}"
