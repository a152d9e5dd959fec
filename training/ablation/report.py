"""An ablation's table: what each arm reached in the picture world, over its seeds, and the paper's numbers apart.

Intervals are those of training/evaluation: over the pictures' chance, and with several seeds over theirs too. Every arm
is also compared, question by question and seed by seed, with the first one that is trained.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from switchkd.export.folders.digests import sha256

from ..evaluation.intervals import Estimate
from ..evaluation.metrics import ALL
from ..evaluation.report import in_words, table
from ..runs.stages import finished_stages
from ..world.dataset import MARKER
from ..world.scoring import Records, above, answer_checkpoint, described, difference, read_test, score, score_seeds
from .matrix import Arm, Matrix

SCORES = "scores.json"
ABOVE = "above prior"
NOTHING = "–"


def score_arm(matrix: Matrix, arm: Arm, seed: int) -> None:
    """Let the arm's finished model answer the world's test questions, unless the very same has answered them."""
    folder, world, path = arm.folder(seed), Path(matrix.root) / "world", Path(matrix.output) / SCORES
    stamp = [sha256(folder / "model.safetensors"), json.loads((world / MARKER).read_text())]
    scores = _kept_scores(matrix)
    kept = scores.get(str(folder), {})
    if kept.get("stamp") != stamp:
        answers, records = answer_checkpoint(folder, world), read_test(world)
        scores[str(folder)] = {"stamp": stamp} | described(score(answers, records), len(records)) | {"answers": answers}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores, indent=1) + "\n")


def collect(matrix: Matrix) -> dict[str, Any]:
    """What `report.json` holds: every arm with what is finished of it, found on disk, whichever run has made it."""
    kept = _kept_scores(matrix)
    records = read_test(Path(matrix.root) / "world") if kept else []
    arms = {arm.name: _arm(matrix, arm, kept, records) for arm in matrix.arms}
    _compare(matrix, arms, kept, records)
    report = {"title": matrix.title, "output": matrix.output, "source": matrix.source, "arms": arms}
    for scores in kept.values():
        report |= {name: scores[name] for name in ("test_questions", "prior", "prior_by_kind")}
    return report


def write_report(matrix: Matrix, report: dict[str, Any]) -> str:
    """Write `report.json` and `report.md` under the matrix's output, and return the text to print."""
    out = Path(matrix.output)
    out.mkdir(parents=True, exist_ok=True)
    text = report_text(report)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(f"# {report['title']}\n\n```text\n{text}```\n")
    return text


def report_text(report: dict[str, Any]) -> str:
    """The tables and what is to be known about them, in lines of text."""
    blocks = [_scored(report) if "prior" in report else _folders(report)]
    papers = {name: arm["paper"] for name, arm in report["arms"].items() if arm["paper"]}
    if papers:
        columns = list(dict.fromkeys(column for paper in papers.values() for column in paper))
        rows = [[name, *(str(paper.get(column, NOTHING)) for column in columns)] for name, paper in papers.items()]
        blocks.append(
            f"The PAPER'S numbers for its own models ({report['source'] or 'no source given'}); none is measured here:"
            f"\n\n{table([['', *columns], *rows])}"
        )
    return "\n\n".join(blocks) + "\n"


def _kept_scores(matrix: Matrix) -> dict[str, Any]:
    """The scores by folder, of this very world, with the answers that pairs are made of."""
    path, marker = Path(matrix.output) / SCORES, Path(matrix.root) / "world" / MARKER
    if matrix.world is None or not path.is_file() or not marker.is_file():
        return {}
    world = json.loads(marker.read_text())
    scores: dict[str, Any] = json.loads(path.read_text())
    return {folder: kept for folder, kept in scores.items() if "answers" in kept and kept["stamp"][1] == world}


def _arm(matrix: Matrix, arm: Arm, kept: dict[str, Any], records: Records) -> dict[str, Any]:
    seeds = [_seed(arm, seed, kept) for seed in matrix.seeds_of(arm)]
    scores = [seed["scores"] for seed in seeds if "scores" in seed]
    found: dict[str, Any] = {"seeds": seeds, "paper": arm.paper}
    if scores:
        result = score_seeds(_answers(found, kept), records)
        found["interval"] = result.intervals | {
            ABOVE: [None if end is None else above(end, result.prior) for end in result.intervals[ALL]]
        }
        found["mean"] = {name: statistics.mean(score[name] for score in scores) for name in scores[0]}
    if len(scores) > 1:
        found["standard_deviation"] = {name: statistics.stdev(score[name] for score in scores) for name in scores[0]}
    return found


def _answers(arm: dict[str, Any], kept: dict[str, Any]) -> list[list[str]]:
    """The answers of an arm's finished seeds."""
    return [kept[seed["folder"]]["answers"] for seed in arm["seeds"] if "scores" in seed]


def _compare(matrix: Matrix, arms: dict[str, Any], kept: dict[str, Any], records: Records) -> None:
    """Add to each arm its paired difference from the first arm that is trained here, over the seeds that both have."""
    trained = [arm.name for arm in matrix.arms if arm.recipe is not None and "mean" in arms[arm.name]]
    if not trained:
        return
    base = trained[0]
    for name, arm in arms.items():
        if name == base or "mean" not in arm:
            continue
        one, other = _answers(arm, kept), _answers(arms[base], kept)
        if name in trained:
            seeds = min(len(one), len(other))
            one, other = one[:seeds], other[:seeds]
        arm["difference"] = {"from": base} | asdict(difference(one, other, records))


def _seed(arm: Arm, seed: int, kept: dict[str, Any]) -> dict[str, Any]:
    recipe, folder = arm.run(seed), str(arm.folder(seed))
    found: dict[str, Any] = {"seed": seed, "folder": folder, "finished": recipe is None}
    if recipe is not None:
        stages = finished_stages(recipe)
        found["finished"] = len(stages) == len(recipe.stages)
        found["seconds"] = {stage.name: round(stage.seconds, 1) for stage in stages}
    if found["finished"] and folder in kept:
        scores = kept[folder]
        found["scores"] = {ALL: scores["accuracy"], ABOVE: scores["above_prior"], **scores["by_kind"]}
    return found


def _scored(report: dict[str, Any]) -> str:
    kinds = sorted(report["prior_by_kind"])
    columns = [ALL, ABOVE, *kinds]
    base = next((arm["difference"]["from"] for arm in report["arms"].values() if "difference" in arm), None)
    rows = [["", "seeds", *columns, *([] if base is None else [f"minus {base}"])]]
    for name, arm in report["arms"].items():
        count = sum("scores" in seed for seed in arm["seeds"])
        rows.append([name, str(count), *(_cell(arm, column) for column in columns)])
        if base is not None:
            rows[-1].append(_difference_cell(arm))
    priors = (f"{100 * report['prior_by_kind'][kind]:.1f}" for kind in kinds)
    rows.append(["guessing (prior)", "", f"{100 * report['prior']:.1f}", "", *priors, *([] if base is None else [""])])
    return table(rows) + "\n\n" + "\n".join(_notes(report))


def _notes(report: dict[str, Any]) -> list[str]:
    """What the table's numbers are, and what its differences say."""
    notes = [f"Accuracy in % of {report['test_questions']} test questions; toy models of a toy world."]
    if any("standard_deviation" in arm for arm in report["arms"].values()):
        notes.append(
            "Mean over the seeds ± half of the 95 % interval, of the pictures' and the seeds' chance together."
        )
    else:
        notes.append(
            "± half of the 95 % interval, of the pictures' chance alone. One seed an arm: a difference between two may "
            "be the seeds' chance; --seeds 3 takes that in."
        )
    for name, arm in report["arms"].items():
        if "difference" in arm:
            found = dict(arm["difference"])
            base = found.pop("from")
            notes.append(in_words(Estimate(**found), name, base))
    if "max_steps" in report:
        notes.append(f"Every stage was ended after {report['max_steps']} steps: the accuracies mean nothing.")
    return notes


def _cell(arm: dict[str, Any], column: str) -> str:
    if "mean" not in arm:
        return NOTHING
    low, high = arm["interval"][column]
    spread = "" if low is None else f" ± {100 * (high - low) / 2:.1f}"
    return f"{100 * arm['mean'][column]:.1f}{spread}"


def _difference_cell(arm: dict[str, Any]) -> str:
    found = arm.get("difference")
    if found is None:
        return NOTHING
    interval = "" if found["low"] is None else f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    return f"{100 * found['value']:+.1f}{interval}"


def _folders(report: dict[str, Any]) -> str:
    rows = [["", "trained", "our scores", "checkpoint to evaluate"]]
    for name, arm in report["arms"].items():
        for seed in arm["seeds"]:
            title = name if len(arm["seeds"]) == 1 else f"{name}, seed {seed['seed']}"
            rows.append([title, "yes" if seed["finished"] else "not yet", "not scored here", seed["folder"]])
    return table(rows) + "\n\nThe paper's benchmarks are no part of this program: run lmms-eval on these folders."
