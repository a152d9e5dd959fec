"""`switchkd world`: draw the picture world, remake its base models and teacher, store them, score a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .models.vlm import ModelError
from .process.terminal import quiet_libraries
from .recipe.recipe import RecipeError
from .world.dataset import WorldSettings, draw_world
from .world.scoring import score_checkpoint

ERRORS: tuple[type[Exception], ...] = (RecipeError, ModelError)
PARTS_WORLD = WorldSettings(train_pictures=24_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    draw = commands.add_parser("draw", help="write pictures and LLaVA-format questions")
    draw.add_argument("folder", type=Path)
    draw.add_argument(
        "--pictures", type=int, default=WorldSettings.train_pictures, help="training pictures (%(default)s)"
    )
    draw.add_argument("--seed", type=int, default=0)
    parts = commands.add_parser("parts", help="make tokenizer, encoder, language models and teacher from nothing")
    parts.add_argument("folder", type=Path)
    keep = commands.add_parser(
        "store", help="write the parts that switchkd carries, in half precision, with their scores"
    )
    keep.add_argument("source", type=Path, help="the folder that `world parts` filled")
    keep.add_argument("target", type=Path, help="for example training/world/pretrained")
    score = commands.add_parser("score", help="accuracy of a checkpoint on a world's test questions, by kind")
    score.add_argument("checkpoint", type=Path)
    score.add_argument("world", type=Path)


def run(args: argparse.Namespace) -> int:
    """Run the action."""
    quiet_libraries()
    if args.action == "draw":
        draw_world(args.folder, WorldSettings(train_pictures=args.pictures, seed=args.seed))
    elif args.action == "parts":
        from .world.bases import make_parts

        draw_world(args.folder / "world", PARTS_WORLD)
        make_parts(args.folder, announce=lambda text: _say(f"== {text}"))
    elif args.action == "store":
        from .world.bases import store

        store(args.source, args.target)
        scores = score_checkpoint(args.target / "teacher", args.source / "world")
        (args.target / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    else:
        sys.stdout.write(json.dumps(score_checkpoint(args.checkpoint, args.world), indent=1) + "\n")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
