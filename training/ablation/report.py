"""An ablation's table: what each arm reached in the picture world, over its seeds, and the paper's numbers apart."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from switchkd.export.folders.digests import sha256

from ..runs.stages import finished_stages
from ..world.dataset import MARKER
from ..world.scoring import score_checkpoint
from .matrix import Arm, Matrix

SCORES = "scores.json"
ALL = "all"
ABOVE = "above prior"
NOTHING = "–"


def score_arm(matrix: Matrix, arm: Arm, seed: int) -> None:
    """Let the arm's finished model answer the world's test questions, unless the very same has answered them."""
    folder, world, path = arm.folder(seed), Path(matrix.root) / "world", Path(matrix.output) / SCORES
    stamp = [sha256(folder / "model.safetensors"), json.loads((world / MARKER).read_text())]
    scores = _kept_scores(matrix)
    if scores.get(str(folder), {}).get("stamp") != stamp:
        scores[str(folder)] = {"stamp": stamp} | score_checkpoint(folder, world)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores, indent=1) + "\n")


def collect(matrix: Matrix) -> dict[str, Any]:
    """What `report.json` holds: every arm with what is finished of it, found on disk, whichever run has made it."""
    kept = _kept_scores(matrix)
    arms = {arm.name: _arm(matrix, arm, kept) for arm in matrix.arms}
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
            f"\n\n{_table([['', *columns], *rows])}"
        )
    return "\n\n".join(blocks) + "\n"


def _kept_scores(matrix: Matrix) -> dict[str, Any]:
    path = Path(matrix.output) / SCORES
    return json.loads(path.read_text()) if matrix.world is not None and path.is_file() else {}


def _arm(matrix: Matrix, arm: Arm, kept: dict[str, Any]) -> dict[str, Any]:
    seeds = [_seed(arm, seed, kept) for seed in matrix.seeds_of(arm)]
    scores = [seed["scores"] for seed in seeds if "scores" in seed]
    found: dict[str, Any] = {"seeds": seeds, "paper": arm.paper}
    if scores:
        found["mean"] = {name: statistics.mean(score[name] for score in scores) for name in scores[0]}
    if len(scores) > 1:
        found["standard_deviation"] = {name: statistics.stdev(score[name] for score in scores) for name in scores[0]}
    return found


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
    rows = [["", "seeds", *columns]]
    for name, arm in report["arms"].items():
        count = sum("scores" in seed for seed in arm["seeds"])
        rows.append([name, str(count), *(_cell(arm, column) for column in columns)])
    priors = (f"{100 * report['prior_by_kind'][kind]:.1f}" for kind in kinds)
    rows.append(["guessing (prior)", "", f"{100 * report['prior']:.1f}", "", *priors])
    notes = [f"Accuracy in % of {report['test_questions']} test questions; toy models of a toy world."]
    if any("standard_deviation" in arm for arm in report["arms"].values()):
        notes.append("Mean ± standard deviation over the seeds.")
    else:
        notes.append("One seed an arm: a difference between two may be chance; --seeds 3 shows the spread.")
    if "max_steps" in report:
        notes.append(f"Every stage was ended after {report['max_steps']} steps: the accuracies mean nothing.")
    return _table(rows) + "\n\n" + "\n".join(notes)


def _cell(arm: dict[str, Any], column: str) -> str:
    if "mean" not in arm:
        return NOTHING
    spread = f" ± {100 * arm['standard_deviation'][column]:.1f}" if "standard_deviation" in arm else ""
    return f"{100 * arm['mean'][column]:.1f}{spread}"


def _folders(report: dict[str, Any]) -> str:
    rows = [["", "trained", "our scores", "checkpoint to evaluate"]]
    for name, arm in report["arms"].items():
        for seed in arm["seeds"]:
            title = name if len(arm["seeds"]) == 1 else f"{name}, seed {seed['seed']}"
            rows.append([title, "yes" if seed["finished"] else "not yet", "not scored here", seed["folder"]])
    return _table(rows) + "\n\nThe paper's benchmarks are no part of this program: run lmms-eval on these folders."


def _table(rows: list[list[str]]) -> str:
    """Columns side by side, the first to the left and the others to the right, a line below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
