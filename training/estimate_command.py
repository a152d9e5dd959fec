"""`switchkd estimate RECIPE`: parameters, memory of a GPU by part, tokens and hours, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from typing import TYPE_CHECKING

from .models.vlm import ModelError
from .process.terminal import quiet_libraries
from .recipe.recipe import RecipeError, load_recipe

if TYPE_CHECKING:
    from .estimate.estimate import Cluster, StageEstimate

ERRORS: tuple[type[Exception], ...] = (RecipeError, ModelError)
DOES_NOT_FIT = 1
_UNITS = {"": 1e9, "GB": 1e9, "GIB": 2**30, "MIB": 2**20, "MB": 1e6}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "recipe", help="a recipe file, or the name of a shipped one, such as paper/qwen2.5-0.5b-switch-kd"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="replace a value of the recipe, as in train"
    )
    parser.add_argument("--gpu", default="80GB", metavar="SIZE", help="memory of a GPU (default: 80GB)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs in all nodes together (default: 8)")
    parser.add_argument(
        "--gpu-type", default="H100", metavar="NAME", help="whose TFLOP/s to count with (default: H100)"
    )
    parser.add_argument(
        "--tflops", type=float, metavar="X", help="dense bfloat16 TFLOP/s of a GPU, instead of its type"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.35, metavar="SHARE", help="share of them that is used, an assumption (0.35)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="samples of each stage, if the records are not here")
    parser.add_argument("--text-tokens", type=int, metavar="N", help="text tokens of a sample, on average")
    parser.add_argument(
        "--teacher-language-model",
        metavar="NAME",
        help="a hub id or folder to size a teacher by that is not there yet, with the student's encoder",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 where every stage fits, 1 where one does not."""
    recipe = load_recipe(args.recipe, args.overrides)
    for name in ("samples", "text_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
    quiet_libraries()
    from .estimate.estimate import Cluster, Estimator

    cluster = Cluster(args.gpus, gpu_bytes(args.gpu), args.tflops or _tflops(args.gpu_type), args.mfu)
    stages = Estimator(
        recipe,
        cluster,
        teacher_language_model=args.teacher_language_model,
        text_tokens=args.text_tokens,
        samples=args.samples,
    ).stages()
    if args.json:
        plain = {"cluster": dataclasses.asdict(cluster), "stages": [dataclasses.asdict(stage) for stage in stages]}
        print(json.dumps(plain, indent=1))
    else:
        print(report(args.recipe, args.gpu_type if args.tflops is None else None, cluster, stages))
    return 0 if all(stage.fits for stage in stages) else DOES_NOT_FIT


def gpu_bytes(text: str) -> float:
    """Bytes of a GPU's memory from text such as 80GB, 79.6GiB or 80. Raises RecipeError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].upper() not in _UNITS or not float(found[1]) > 0:
        raise RecipeError(f"--gpu is {text!r}, expected a GPU's memory such as 80GB, 24GB or 79.6GiB")
    return float(found[1]) * _UNITS[found[2].upper()]


def _tflops(name: str) -> float:
    from .estimate.estimate import GPU_TFLOPS

    known = {gpu.upper(): value for gpu, value in GPU_TFLOPS.items()}
    if name.upper() not in known:
        raise RecipeError(f"--gpu-type is {name!r}, expected one of {', '.join(GPU_TFLOPS)}, or give --tflops")
    return known[name.upper()]


def report(name: str, gpu_type: str | None, cluster: Cluster, stages: list[StageEstimate]) -> str:
    """The estimate as a person reads it: a table with a column for each stage, the verdict, and what was assumed."""
    of = f", an {gpu_type} each" if gpu_type else ""
    title = f"{name} on {_count(cluster.gpus, 'GPU')} of {cluster.memory / 1e9:.1f} GB{of}"
    lines = [title, "", *_table(cluster, stages), ""]
    for stage in stages:
        left = cluster.memory - stage.peak
        verdict = (
            f"fits, {left / 1e9:.1f} GB to spare" if stage.fits else f"does not fit, {-left / 1e9:.1f} GB too much"
        )
        lines.append(f"{stage.name}: {verdict}")
        for text, size in stage.remedies:
            lines.append(f"  {text}: {size / 1e9:.1f} GB, {'fits' if size <= cluster.memory else 'does not fit'}")
    return "\n".join([*lines, "", *_assumptions(gpu_type, cluster, stages)])


def _table(cluster: Cluster, stages: list[StageEstimate]) -> list[str]:
    parts = list(dict.fromkeys(part for stage in stages for part in stage.memory))
    rows: list[tuple[str, list[str]]] = [("", [stage.name for stage in stages])]
    rows.append(("objective", [stage.objective for stage in stages]))
    rows += [("", []), ("parameters, millions", [])]
    for label, key in (("student, trained", "trained"), ("student, frozen", "frozen"), ("teacher", "teacher")):
        rows.append((f"  {label}", [f"{getattr(stage.parameters, key) / 1e6:,.1f}" for stage in stages]))
    rows += [("", []), (f"memory of a GPU, GB, at {_longest(stages)} tokens a sample", [])]
    for part in parts:
        rows.append((f"  {part}", [f"{stage.memory.get(part, 0) / 1e9:.1f}" for stage in stages]))
    rows.append(("  in all", [f"{stage.peak / 1e9:.1f}" for stage in stages]))
    rows.append((f"  left of {cluster.memory / 1e9:.1f}", [f"{(cluster.memory - s.peak) / 1e9:.1f}" for s in stages]))
    rows += [("", []), ("tokens and time", [])]
    rows += [
        ("  samples", [_number(stage.lengths.samples) for stage in stages]),
        ("  visual tokens of a picture", [f"{stage.visual_tokens:,}" for stage in stages]),
        ("  text tokens of a sample, on average", [f"{stage.lengths.text:,.0f}" for stage in stages]),
        ("  micro-batch x accumulation x GPUs", [_batch(stage, cluster) for stage in stages]),
        ("  steps", [_number(stage.steps) for stage in stages]),
        ("  tokens, millions", [_number(None if s.tokens is None else s.tokens / 1e6, 1) for s in stages]),
        ("  TFLOP of a sample", [f"{stage.flops_of_sample / 1e12:,.1f}" for stage in stages]),
        ("  hours", [_number(stage.hours, 1) for stage in stages]),
    ]
    first = max(len(label) for label, _ in rows)
    width = max(10, *(len(cell) + 2 for _, cells in rows for cell in cells))
    return [(label.ljust(first) + "".join(cell.rjust(width) for cell in cells)).rstrip() for label, cells in rows]


def _assumptions(gpu_type: str | None, cluster: Cluster, stages: list[StageEstimate]) -> list[str]:
    used = f"{cluster.utilisation:.0%} of {cluster.tflops:g} TFLOP/s"
    total = None if any(stage.hours is None for stage in stages) else sum(stage.hours or 0 for stage in stages)
    hours = "unknown without the number of samples (--samples)" if total is None else f"{total:.1f} in all"
    lines = [
        f"Hours: {hours}, at an assumed {used}{f' of an {gpu_type}' if gpu_type else ''} (--mfu, --tflops), if "
        "loading pictures does not hold it up."
    ]
    lines += [f"Lengths of {stage.name}: {stage.lengths.basis}." for stage in stages]
    lines.append("Allowance: CUDA, cuBLAS and NCCL, and 5 % of a step's tensors for gaps between blocks; assumed.")
    return lines


def _longest(stages: list[StageEstimate]) -> str:
    return " and ".join(dict.fromkeys(f"{stage.longest_tokens:,}" for stage in stages))


def _batch(stage: StageEstimate, cluster: Cluster) -> str:
    return f"{stage.micro_batch} x {stage.accumulation} x {cluster.gpus}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _number(value: float | None, digits: int = 0) -> str:
    return "?" if value is None else f"{value:,.{digits}f}"
