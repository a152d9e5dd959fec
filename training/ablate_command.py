"""`switchkd ablate MATRIX`: run every arm of an ablation, each stage that they share once, and print the table."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

from .ablation.matrix import Arm, Matrix, load_matrix
from .process.terminal import say, speaks
from .recipe.recipe import RecipeError, check_keys
from .train_command import ERRORS as TRAIN_ERRORS
from .train_command import until_stopped

ERRORS: tuple[type[Exception], ...] = TRAIN_ERRORS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("matrix", help="a matrix file, or the name of a shipped one, such as ablation/toy-table4")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the matrix, such as root=FOLDER; recipe.KEY=VALUE one of every arm's recipe, such as "
        "recipe.stages.pt.training.learning_rate=1e-4",
    )
    parser.add_argument("--only", action="append", metavar="ARM", help="run this arm only; may be given several times")
    parser.add_argument("--seeds", type=int, help="run every arm with so many seeds; their chance is in the intervals")
    parser.add_argument("--max-steps", type=int, help="end every stage after so many steps, to try the matrix")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--print-config", action="store_true", help="print the resolved matrix as YAML and stop")
    shown.add_argument(
        "--dry-run",
        action="store_true",
        help="build every arm's classes at tiny sizes with random weights and take two real steps of every stage",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when every arm asked for is finished, EXIT_STOPPED when the same command is to go on."""
    matrix = load_matrix(args.matrix, args.overrides)
    if args.seeds is not None:
        matrix = dataclasses.replace(matrix, seeds=args.seeds)
    if args.max_steps is not None:
        matrix = matrix.with_max_steps(args.max_steps)
    names = [arm.name for arm in matrix.arms]
    check_keys(dict.fromkeys(args.only or []), names, "--only")
    if args.print_config:
        sys.stdout.write(matrix.to_yaml())
        return 0
    only = args.only or names
    if args.dry_run:
        return until_stopped(lambda: _dry_run(matrix, only))
    return until_stopped(lambda: _run(matrix, only, args.max_steps))


def _run(matrix: Matrix, only: list[str], max_steps: int | None) -> None:
    """Run the arms one after the other; the report on disk is whole after each of them."""
    from .ablation.report import collect, score_arm, write_report
    from .runs.stages import run_recipe

    if matrix.world is not None:
        _check_alone()
        _place_world(matrix)
    matrix.check_finished()
    text = ""
    for arm, seed in matrix.runs():
        if arm.name not in only:
            continue
        recipe = arm.run(seed)
        if recipe is not None:
            say(f"== {_title(matrix, arm, seed)}: {' → '.join(stage.name for stage in recipe.stages)}")
            run_recipe(recipe, announce=say)
        if matrix.world is not None:
            score_arm(matrix, arm, seed)
        if speaks():
            text = write_report(matrix, collect(matrix) | ({} if max_steps is None else {"max_steps": max_steps}))
    if speaks():
        out = Path(matrix.output)
        sys.stdout.write(f"\n{matrix.title}\n\n{text}\nThe report: {out / 'report.md'}, {out / 'report.json'}\n")


def _dry_run(matrix: Matrix, only: list[str]) -> None:
    from .runs.stages import run_recipe
    from .world.dry_run import shrink

    with tempfile.TemporaryDirectory(prefix="switchkd-dry-run-") as folder:
        for number, arm in enumerate(matrix.arms):
            if arm.recipe is not None and arm.name in only:
                say(f"== {arm.name}")
                run_recipe(shrink(arm.recipe, Path(folder) / str(number)), announce=say)
    say("dry run: every stage of every arm took two steps, was saved and loaded again")


def _place_world(matrix: Matrix) -> None:
    """The built-in world and the stored parts, where the arms' recipes look for them."""
    from .world.bases import copy_parts, stored_parts
    from .world.dataset import draw_world

    assert matrix.world is not None
    draw_world(Path(matrix.root) / "world", matrix.world)
    copy_parts(stored_parts(), Path(matrix.root))


def _check_alone() -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but a matrix with a world draws it and answers its questions "
            "in one process; run it without a launcher"
        )


def _title(matrix: Matrix, arm: Arm, seed: int) -> str:
    return arm.name if len(matrix.seeds_of(arm)) == 1 else f"{arm.name}, seed {seed}"
