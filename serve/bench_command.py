"""`switchkd bench BUNDLE`: what a picture and a question take here, stage by stage, beside what else could answer."""

import argparse
import json
import os
import shlex
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from switchkd.export.contract.bundle import BundleError, read_manifest
from switchkd.export.contract.processor import processors, this_machine

from .bench.contender import Contender, ContenderError
from .bench.report import Report, measure

ERRORS: tuple[type[Exception], ...] = (BundleError, ContenderError)
QUESTIONS = (
    "Look at the whole picture first, from the left to the right and from the top to the bottom, and then describe in "
    "a few words what you can see in it, which colours there are, and how many things.",
    "And what is in the middle of it?",
)
PICTURE = (640, 480)  # pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder made by `switchkd export`")
    parser.add_argument(
        "--precision",
        action="append",
        help="measure this one too, in turns (default: the bundle's first; `all`: every one, and where another reads "
        "pictures and prompts for it, also without that)",
    )
    parser.add_argument("--threads", type=int, help="threads to compute with (default: one a logical processor)")
    parser.add_argument("--rounds", type=int, default=5, help="pictures to ask about (default: 5)")
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of an answer (default: 16)")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="measure another program in turns with the bundle: a command that speaks serve/bench/protocol.py, "
        "for example those of benchmarks/serve",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers there")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    for name, value in (("rounds", args.rounds), ("tokens", args.tokens), ("threads", args.threads or 1)):
        if value < 1:
            raise ContenderError(f"{name} is {value}, expected 1 or more")
    commands = {**_bundle_commands(args), **dict(map(_rival, args.against))}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pictures = [_picture(folder / f"{number}.jpg", number) for number in range(1 + args.rounds)]
        contenders = [stack.enter_context(Contender(name, command)) for name, command in commands.items()]
        found = measure(contenders, pictures, QUESTIONS, args.tokens, _show)
    report = Report(this_machine(), args.threads or processors(), QUESTIONS[0], args.rounds, found)
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    print(report.text())
    return 0


def _bundle_commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The bundle's precisions as contenders, each in a process of its own."""
    manifest = read_manifest(Path(args.bundle))
    known = manifest.precisions
    chosen = args.precision or [known[0]]
    everything = "all" in chosen
    word = [sys.executable, "-m", "switchkd.serve.bench.bundle", args.bundle]
    threads = ["--threads", str(args.threads)] if args.threads else []
    commands = {}
    for precision in dict.fromkeys(known if everything else chosen):
        command = commands[f"switchkd {precision}"] = [*word, "--precision", precision, *threads]
        if everything and manifest.prefill_of(precision) is not None:
            commands[f"switchkd {precision} alone"] = [*command, "--no-prefill"]
    return commands


def _rival(word: str) -> tuple[str, list[str]]:
    name, equals, command = word.partition("=")
    if not (name and equals and command):
        raise ContenderError(f"--against is {word!r}, expected NAME=COMMAND, such as torch='python rival.py MODEL'")
    return name, shlex.split(command)


def _picture(path: Path, seed: int) -> Path:
    """Write a photograph's size of soft noise: as hard to encode as any picture, and another one for every seed."""
    rough = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(rough).resize(PICTURE, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def _show(done: int, of: int) -> None:
    """Say how far it is over the line before, where somebody looks at a terminal."""
    if sys.stderr.isatty():
        end = "" if done + 1 < of else os.linesep
        print(f"\033[K[{done + 1}/{of}] asking in turns", end=end or "\r", file=sys.stderr, flush=True)
