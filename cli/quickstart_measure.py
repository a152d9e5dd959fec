"""Quickstart's measurements: every model over the same test questions, each answered by what a user would run."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from switchkd.training.evaluation.intervals import Estimate
from switchkd.training.world.scoring import Score, difference, score, score_seeds

TIMED_ANSWERS = 40
MAX_NEW_TOKENS = 32
Records = Sequence[dict[str, Any]]


class Clock(Protocol):
    """Keeps seconds by stage."""

    seconds: dict[str, float]

    def measure(self, name: str, work: Callable[[], object]) -> None:
        """Do the work and keep how long it took."""


def measure_all(out: Path, folders: Sequence[Path], arms: Sequence[str], clock: Clock) -> dict[str, Any]:
    """Measure teacher, arms (of every seed) and bundle; what is measured already is not measured again."""
    records = json.loads((out / "world" / "test.json").read_text())
    pictures = out / "world" / "pictures"
    measured: dict[str, dict[str, Any]] = {}

    def once(name: str, weights: Path, work: Callable[[], dict[str, Any]]) -> None:
        path = out / "measurements" / f"{name}.json"
        stamp = _stamp(weights, records)
        if not path.is_file() or json.loads(path.read_text())["stamp"] != stamp:
            path.parent.mkdir(exist_ok=True)
            clock.measure(f"measure {name}", lambda: path.write_text(json.dumps(work() | {"stamp": stamp})))
        measured[name] = json.loads(path.read_text())

    checkpoints = {"teacher": out / "teacher"}
    for seed, folder in enumerate(folders):
        checkpoints |= {arm if seed == 0 else f"{arm}-seed{seed}": folder / arm for arm in arms}
    for name, folder in checkpoints.items():
        once(name, folder / "model.safetensors", lambda f=folder, n=name: _checkpoint(f, records, pictures, n))  # type: ignore[misc]
    for precision in ("fp32", "int8"):
        once(
            f"bundle_{precision}",
            out / "bundle" / "manifest.json",
            lambda p=precision: _bundle(out / "bundle", p, records, pictures),  # type: ignore[misc]
        )
    return _report(measured, records, arms, len(folders), clock.seconds)


def scores_of(report: dict[str, Any], system: str) -> tuple[dict[str, dict[str, float]], str]:
    """A system's accuracies for its card, overall and by kind of question, and what they are."""
    kinds = {"all": (report["accuracy"][system], report["prior"])}
    kinds |= {kind: (value, report["prior_by_kind"][kind]) for kind, value in report["by_kind"][system].items()}
    table = {
        kind: {"accuracy, %": 100 * value, "guessing, %": 100 * prior} for kind, (value, prior) in sorted(kinds.items())
    }
    note = (
        f"Of {report['test_questions']} test questions of switchkd's toy picture world, by kind; no model has seen "
        "them. Guessing is what would be reached without the picture."
    )
    return table, note


def _checkpoint(folder: Path, records: Records, pictures: Path, name: str) -> dict[str, Any]:
    from switchkd.training.evaluation.answers import generate_answers
    from switchkd.training.models.vlm import load_vlm

    vlm = load_vlm(folder)
    answers = generate_answers(vlm, records, pictures, max_new_tokens=MAX_NEW_TOKENS, title=name)
    times = []
    for record in records[:TIMED_ANSWERS]:
        start = time.monotonic()
        generate_answers(vlm, [record], pictures, max_new_tokens=MAX_NEW_TOKENS, title="")
        times.append(time.monotonic() - start)
    size = (folder / "model.safetensors").stat().st_size
    return {"answers": answers, "milliseconds": 1000 * statistics.median(times), "bytes": size}


def _bundle(folder: Path, precision: str, records: Records, pictures: Path) -> dict[str, Any]:
    from tqdm.auto import tqdm

    from switchkd.export.contract.bundle import GRAPHS
    from switchkd.serve import Engine
    from switchkd.training.data.conversations import to_messages

    engine = Engine.open(folder, precision=precision)
    answers: list[str] = []
    times: dict[str, float] = {}  # of the first question about each picture: later ones begin behind it
    for record in tqdm(records, desc=f"bundle {precision}", disable=None, unit="answer"):
        start = time.monotonic()
        messages = to_messages(record)[:-1]
        answer = engine.answer(messages, [pictures / record["image"]], max_new_tokens=MAX_NEW_TOKENS)
        times.setdefault(record["image"], time.monotonic() - start)
        answers.append(answer.text)
    size = sum(engine.bundle.graph_path(name).stat().st_size for name in GRAPHS)
    first = list(times.values())[:TIMED_ANSWERS]
    return {"answers": answers, "milliseconds": 1000 * statistics.median(first), "bytes": size}


def _report(
    measured: dict[str, dict[str, Any]], records: Records, arms: Sequence[str], seeds: int, seconds: dict[str, float]
) -> dict[str, Any]:
    from switchkd.export.contract.processor import this_machine

    scores = {name: score(result["answers"], records) for name, result in measured.items()}
    report: dict[str, Any] = {
        "accuracy": {name: value.accuracy for name, value in scores.items() if "-seed" not in name},
        "intervals": {name: value.intervals for name, value in scores.items() if "-seed" not in name},
        "above_prior": {name: value.above_prior for name, value in scores.items() if "-seed" not in name},
        "by_kind": {name: value.by_kind for name, value in scores.items() if "-seed" not in name},
        "above_prior_by_kind": {n: value.above_prior_by_kind for n, value in scores.items() if "-seed" not in n},
        "prior": next(iter(scores.values())).prior,
        "prior_by_kind": next(iter(scores.values())).prior_by_kind,
        "test_questions": len(records),
        "test_pictures": len({record["image"] for record in records}),
        "difference": {"of": arms[1], "from": arms[0]} | asdict(_difference(measured, records, arms, seeds)),
        "bytes": {name: result["bytes"] for name, result in measured.items()},
        "milliseconds_per_answer": {name: result["milliseconds"] for name, result in measured.items()},
        "seconds": seconds,
        "machine": this_machine(),
    }
    if seeds > 1:
        report["seeds"] = {arm: _spread(arm, scores, measured, records, seeds) for arm in arms}
    return report


def _spread(
    arm: str, scores: dict[str, Score], measured: dict[str, dict[str, Any]], records: Records, seeds: int
) -> dict[str, Any]:
    values = [scores[name].accuracy for name in _names(arm, seeds)]
    low, high = score_seeds(_answers(measured, arm, seeds), records).intervals["all"]
    return {
        "accuracies": values,
        "mean": statistics.mean(values),
        "standard_deviation": statistics.stdev(values),
        "interval": [low, high],
    }


def _difference(measured: dict[str, dict[str, Any]], records: Records, arms: Sequence[str], seeds: int) -> Estimate:
    """The second arm minus the first, paired by question, and by seed where there are several."""
    first, second = (_answers(measured, arm, seeds) for arm in arms)
    return difference(second, first, records)


def _answers(measured: dict[str, dict[str, Any]], arm: str, seeds: int) -> list[list[str]]:
    return [measured[name]["answers"] for name in _names(arm, seeds)]


def _names(arm: str, seeds: int) -> list[str]:
    return [arm if seed == 0 else f"{arm}-seed{seed}" for seed in range(seeds)]


def _stamp(weights: Path, records: Records) -> str:
    digest = hashlib.sha256(json.dumps(records).encode())
    digest.update(weights.read_bytes())
    return digest.hexdigest()
