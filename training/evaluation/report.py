"""What an evaluation reports: every figure with its interval, the paired difference in words, what it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .intervals import LEVEL, Estimate
from .kept_answers import Results, sessions_of
from .metrics import ALL, FigureOf, Scored, metric_of
from .questions import EvaluationError

FORMAT = 1
NOTHING = "–"


@dataclass(frozen=True)
class System:
    """One side of a comparison: a model's results, or those of one method's several training seeds."""

    results: tuple[Results, ...]

    def __post_init__(self) -> None:
        first, *others = self.results
        for other in others:
            if [question.key for question in other.questions] != [question.key for question in first.questions]:
                raise EvaluationError(
                    f"{first.folder} and {other.folder} answered other questions; seeds are compared on the very same"
                )

    @property
    def name(self) -> str:
        """What a table calls it."""
        return " + ".join(dict.fromkeys(result.name for result in self.results))

    def scored(self, metric: str) -> Scored:
        """The scores of every seed's answers."""
        return Scored.of(metric_of(metric), self.results[0].questions, [result.texts for result in self.results])


def make_report(system: System, against: System | None, metrics: Sequence[str]) -> dict[str, Any]:
    """What `report.json` holds. Raises EvaluationError where metric and questions, or the two sides, do not fit."""
    first = system.results[0]
    report: dict[str, Any] = {
        "format": FORMAT,
        "level": LEVEL,
        "questions": len(first.questions),
        "pictures": len({question.cluster for question in first.questions}),
        "data": first.stamp.data,
        "system": _described(system),
    }
    if against is not None:
        report["against"] = _described(against)
    report["metrics"] = {name: _of_metric(system, against, name) for name in metrics}
    return report


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.md`. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(f"# Evaluation\n\n```text\n{report_text(report)}```\n", encoding="utf-8")


def report_text(report: Mapping[str, Any]) -> str:
    """The tables, the differences in words, and what the numbers depend on, in lines of text."""
    blocks = [_metric_text(report, name) for name in report["metrics"]]
    blocks.append("\n".join(_pinned(report)))
    return "\n\n".join(blocks) + "\n"


def in_words(found: Estimate, one: str, other: str) -> str:
    """A paired difference in a sentence: the number, its interval, and whether that excludes 0."""
    if (found.value, found.low, found.high) == (0, 0, 0):
        return f"{one} minus {other}: 0 [0, 0], since every score is the same."
    start = f"{one} minus {other}: {100 * found.value:+.1f} points"
    if found.low is None or found.high is None:
        return f"{start}, without an interval: {found.note}."
    chance = "pictures" if found.seeds == 1 else f"pictures and of {found.seeds} seeds"
    interval = f"95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    if found.excludes_zero:
        return f"{start}, {interval}. It excludes 0: the chance of {chance} does not explain the difference."
    return f"{start}, {interval}. It includes 0: the two cannot be told apart by these questions."


def with_interval(found: Estimate) -> str:
    """A number in percent with its interval in brackets."""
    if found.low is None or found.high is None:
        return f"{100 * found.value:.1f} [no interval]"
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left and the others to the right, a line below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# --- what is in it ---


def _described(system: System) -> dict[str, Any]:
    return {
        "name": system.name,
        "seeds": [
            {
                "folder": str(result.folder),
                "stamp": result.stamp.digest,
                "model": dict(result.stamp.model),
                "settings": dict(result.stamp.settings),
                "cut_off": result.cut,
                **result.about,
                "sessions": sessions_of(result),
            }
            for result in system.results
        ],
    }


def _of_metric(system: System, against: System | None, name: str) -> dict[str, Any]:
    """By kind of question, and by figure."""
    scored = system.scored(name)
    other = None if against is None else against.scored(name)
    return {
        kind: {figure.name: _figure(scored, other, figure, kind) for figure in scored.figures(kind)}
        for kind in scored.kinds()
    }


def _figure(scored: Scored, other: Scored | None, figure: FigureOf, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "estimate": asdict(scored.estimate(figure, kind)),
        "by_seed": _by_seed(scored, figure, kind),
    }
    if other is not None:
        found["against"] = asdict(other.estimate(figure, kind))
        found["against_by_seed"] = _by_seed(other, figure, kind)
        difference = scored.minus(other, figure, kind)
        found["difference"] = asdict(difference) | {"excludes_zero": difference.excludes_zero}
    return found


def _by_seed(scored: Scored, figure: FigureOf, kind: str) -> list[float]:
    sums = scored.sums(figure, kind)
    return [float(value) for value in figure.value(sums.sums_SCK.sum(axis=1))]


# --- in text ---


def _estimate(kept: Mapping[str, Any]) -> Estimate:
    return Estimate(**{name: value for name, value in kept.items() if name != "excludes_zero"})


def _metric_text(report: Mapping[str, Any], name: str) -> str:
    kinds: Mapping[str, Mapping[str, Any]] = report["metrics"][name]
    one, other = _names(report)
    figures = list(dict.fromkeys(figure for found in kinds.values() for figure in found))
    head = [f"{metric_of(name).title}, %", "questions", "pictures", one]
    if other is not None:
        head += [other, "difference"]
    rows, notes = [head], dict[str, list[str]]()  # rows by what is to be said of them
    for figure in figures:
        for kind, found in kinds.items():
            if figure in found:
                label = kind if len(figures) == 1 else f"{figure}, {kind}"
                rows.append(_row(label, found[figure], notes))
    lines = [table(rows)]
    if other is not None:
        lines += ["", *(f"{figure}: {_words(kinds[ALL][figure], one, other)}" for figure in kinds[ALL])]
    return "\n".join([*lines, *(f"({', '.join(labels)}: {note})" for note, labels in notes.items())])


def _row(label: str, found: Mapping[str, Any], notes: dict[str, list[str]]) -> list[str]:
    estimates = [_estimate(found[part]) for part in ("estimate", "against", "difference") if part in found]
    for note in dict.fromkeys(estimate.note for estimate in estimates if estimate.note):
        notes.setdefault(note, []).append(label)
    first = estimates[0]
    cells = [with_interval(estimate) for estimate in estimates]
    if len(cells) > 2 and estimates[2].value > 0:
        cells[2] = f"+{cells[2]}"
    return [label, str(first.questions), str(first.clusters), *cells]


def _words(found: Mapping[str, Any], one: str, other: str) -> str:
    return in_words(_estimate(found["difference"]), one, other)


def _names(report: Mapping[str, Any]) -> tuple[str, str | None]:
    """The two sides' names; where both have one, the place in front tells them apart."""
    one = str(report["system"]["name"])
    if "against" not in report:
        return one, None
    other = str(report["against"]["name"])
    return (one, other) if one != other else (f"{one} (1)", f"{other} (2)")


def _pinned(report: Mapping[str, Any]) -> list[str]:
    """What the numbers depend on."""
    lines = [
        f"95 % intervals over {report['pictures']} pictures with {report['questions']} questions; docs/evaluation.md "
        "has the formulas.",
        f"data: {report['data'][:12]}",
    ]
    for side in ("system", "against"):
        for seed in report[side]["seeds"] if side in report else ():
            settings = ", ".join(f"{name} {value}" for name, value in seed["settings"].items())
            template = seed.get("template_sha256") or "unknown"
            lines.append(
                f"{seed['name']}: {seed.get('kind', 'model')} {seed.get('given', '')}, model {_hash(seed['model'])}, "
                f"chat template {template[:12]}, {settings}"
            )
            if seed["cut_off"]:
                lines.append(f"  {seed['cut_off']} of its answers were cut off there; --max-new-tokens gives more")
            lines += [f"  {_session(session)}" for session in seed["sessions"]]
    return lines


def _hash(model: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:12]


def _session(session: Mapping[str, Any]) -> str:
    found = ", ".join(f"{name} {value}" for name, value in session["versions"].items())
    machine = session["machine"]
    return f"{found}; {machine.get('processor', 'a machine that was not named')}, {machine.get('system', '')}"
