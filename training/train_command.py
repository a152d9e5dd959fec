"""`switchkd train RECIPE`: run a recipe's stages, show it resolved, or try it dry at tiny sizes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .data.conversations import DataError
from .models.vlm import ModelError
from .objectives.finite import NonFiniteError
from .process.stopping import EXIT_STOPPED, Stopped
from .process.terminal import quiet_libraries, say
from .recipe.arguments import leave_other_ranks
from .recipe.recipe import Recipe, RecipeError, load_recipe
from .runs.checkpoints import CheckpointError

ERRORS: tuple[type[Exception], ...] = (RecipeError, ModelError, DataError, NonFiniteError, CheckpointError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "recipe", help="a recipe file, or the name of a shipped one, such as paper/qwen2.5-0.5b-switch-kd"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the recipe; a stage's by its name: stages.pt.training.learning_rate=1e-3",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--print-config", action="store_true", help="print the resolved recipe as YAML and stop")
    shown.add_argument(
        "--dry-run",
        action="store_true",
        help="build the recipe's classes at tiny sizes with random weights and take two real steps of every stage",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when every stage is finished, EXIT_STOPPED when the same command is to go on."""
    recipe = load_recipe(args.recipe, args.overrides)
    if args.print_config:
        sys.stdout.write(recipe.to_yaml())
        return 0
    return until_stopped(lambda: _train(recipe, args.dry_run))


def until_stopped(work: Callable[[], None]) -> int:
    """Do a command's work; 0 when it is done, EXIT_STOPPED when the same command is to go on."""
    quiet_libraries()
    code = 0
    try:
        work()
    except Stopped as stopped:
        say(f"switchkd: {stopped}")
        code = EXIT_STOPPED
    leave_other_ranks()
    return code


def _train(recipe: Recipe, dry_run: bool) -> None:
    if dry_run:
        from .world.dry_run import shrink

        with tempfile.TemporaryDirectory(prefix="switchkd-dry-run-") as folder:
            _run(shrink(recipe, Path(folder)))
        say("dry run: every stage took two steps, was saved and loaded again")
    else:
        _run(recipe)


def _run(recipe: Recipe) -> None:
    from .runs.stages import run_recipe

    for result in run_recipe(recipe, announce=say):
        spent = "already finished" if result.reused else f"{result.seconds:.0f} s"
        say(f"{result.name}: {result.folder} ({spent})")
