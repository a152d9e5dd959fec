"""Quickstart's report: report.json, report.md with its table, report.png; whatever the comparison shows, as it is."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchkd.training.evaluation.intervals import Estimate
from switchkd.training.evaluation.report import in_words

WIDTH = 120  # columns of running text
TITLES = {
    "teacher": "teacher",
    "student_sft": "student, SFT",
    "student_switch_kd": "student, Switch-KD",
    "bundle_fp32": "bundle, fp32",
    "bundle_int8": "bundle, int8",
}


def write_report(out: Path, report: dict[str, Any]) -> str:
    """Write the three files and return the text to print."""
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    text = _text(report)
    (out / "report.md").write_text(f"# Quickstart: the toy picture world\n\n```\n{text}```\n")
    _plot(out / "report.png", report)
    return f"\n{text}\nThe report: {out / 'report.md'}, {out / 'report.json'}, {out / 'report.png'}\n"


def _text(report: dict[str, Any]) -> str:
    kinds = sorted(report["prior_by_kind"])
    header = ["", "all", "above prior", *kinds, "MB", "ms/answer"]
    rows = [header]
    for name, title in TITLES.items():
        rows.append(
            [
                title,
                _with_half_width(report["accuracy"][name], report["intervals"][name]["all"]),
                _percent(report["above_prior"][name]),
                *(_percent(report["by_kind"][name][kind]) for kind in kinds),
                f"{report['bytes'][name] / 1e6:.1f}",
                f"{report['milliseconds_per_answer'][name]:.1f}",
            ]
        )
    priors = (_percent(report["prior_by_kind"][kind]) for kind in kinds)
    rows.append(["guessing (prior)", _percent(report["prior"]), "", *priors, "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines += ["", _verdict(report), _times(report)]
    return "\n".join(lines) + "\n"


def _verdict(report: dict[str, Any]) -> str:
    """What the comparison shows, win or loss, with its interval."""
    text = (
        f"Accuracy in % of {report['test_questions']} test questions about {report['test_pictures']} pictures, ± half "
        "of the 95 % interval; toy models of a toy world."
    )
    for name, spread in report.get("seeds", {}).items():
        values = ", ".join(_percent(value) for value in spread["accuracies"])
        low, high = spread["interval"]
        text += (
            f"\n{TITLES[name]}: mean {_percent(spread['mean'])}, standard deviation "
            f"{_percent(spread['standard_deviation'])} over {len(spread['accuracies'])} seeds ({values}); "
            f"95 % interval {_percent(low)} to {_percent(high)}"
        )
    found = dict(report["difference"])
    one, other = (TITLES[found.pop(side)].removeprefix("student, ") for side in ("of", "from"))
    text += f"\n{in_words(Estimate(**found), one, other)}"
    if found["seeds"] == 1:
        text += " One seed: --seeds 3 takes the seeds' chance in."
    return text


def _times(report: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items())
    machine = report["machine"]
    where = f"{machine['processors']} logical processors of {machine['processor']}"
    text = f"Time, on {where}: {parts}; {sum(report['seconds'].values()) / 60:.1f} minutes in all."
    return textwrap.fill(text, WIDTH)


def _with_half_width(value: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{_percent(value)} ± {_percent((high - low) / 2)}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _plot(path: Path, report: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = ["all", *sorted(report["prior_by_kind"])]
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(TITLES)
    colours = ("#4b4b4b", "#9ecae1", "#2171b5", "#74c476", "#c7e9c0")
    for number, ((name, title), colour) in enumerate(zip(TITLES.items(), colours, strict=True)):
        values = [report["accuracy"][name], *(report["by_kind"][name][kind] for kind in kinds[1:])]
        places = [place + (number - (len(TITLES) - 1) / 2) * width for place in range(len(kinds))]
        axes.bar(places, [100 * value for value in values], width, label=title, color=colour)
    priors = [report["prior"], *(report["prior_by_kind"][kind] for kind in kinds[1:])]
    for place, prior in enumerate(priors):
        axes.hlines(100 * prior, place - 0.45, place + 0.45, colors="#d62728", linestyles="dashed")
    axes.plot([], [], color="#d62728", linestyle="dashed", label="guessing without the picture")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.set_title(f"switchkd quickstart: {report['test_questions']} test questions of a toy picture world")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
