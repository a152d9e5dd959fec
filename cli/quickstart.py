"""`switchkd quickstart`: distil, export and measure the embedded default, through the code that full-size runs use."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.training.world.dataset import WorldSettings

ARMS = ("student_sft", "student_switch_kd")
SHORT_WORLD = {"train_pictures": 256, "test_questions": 140, "validation_questions": 70}
SHORT_STEPS = 8
SHORT_PAIRS = 20  # on which greedy answers are compared


class QuickstartError(ValueError):
    """A quickstart that cannot be run as asked; the message says what to change."""


ERRORS: tuple[type[Exception], ...] = (QuickstartError,)


@dataclass(frozen=True)
class Plan:
    """What a quickstart does: where, how large, how often."""

    out: Path
    world: WorldSettings
    seeds: int = 1
    from_scratch: bool = False
    steps: int | None = None  # None: as many as the recipes say

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise QuickstartError(f"--seeds is {self.seeds}; the student arms have to run at least once")

    def folder(self, seed: int) -> Path:
        """Where a seed's students are; the first seed's are the quickstart's own."""
        return self.out if seed == 0 else self.out / f"seed{seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="repeat the student arms; their chance is in the interval")
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="first remake the tiny base models and the teacher by their recipe (some 45 minutes on two cores)",
    )
    parser.add_argument(
        "--short", action="store_true", help="a few steps of everything: shows that it works, accuracies mean nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Run every stage that is not finished, print the table and write the report."""
    world = WorldSettings(**SHORT_WORLD) if args.short else WorldSettings()
    plan = Plan(args.out, world, args.seeds, args.from_scratch, SHORT_STEPS if args.short else None)
    quickstart(plan)
    return 0


def quickstart(plan: Plan) -> dict[str, Any]:
    """Do the whole thing and return what `report.json` holds."""
    from switchkd.training.process.terminal import quiet_libraries

    from .quickstart_report import write_report

    quiet_libraries()
    plan.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(plan.out / "seconds.json")
    _world(plan, clock)
    _parts(plan, clock)
    for seed in range(plan.seeds):
        for arm in ARMS:
            _train(plan, arm, seed, clock)
    _export(plan, clock)
    report = _measure(plan, clock)
    sys.stdout.write(write_report(plan.out, report))
    return report


class Clock:
    """Seconds by stage, kept on disk so that an interrupted run's report is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def record(self, name: str, seconds: float) -> None:
        """Keep a stage's seconds."""
        self.seconds[name] = round(seconds, 1)
        self._path.write_text(json.dumps(self.seconds, indent=1) + "\n")

    def measure(self, name: str, work: Callable[[], object]) -> None:
        """Do the work and keep how long it took."""
        announce(name)
        start = time.monotonic()
        work()
        self.record(name, time.monotonic() - start)


def announce(text: str) -> None:
    """Say what happens now."""
    sys.stderr.write(f"== {text}\n")


def _world(plan: Plan, clock: Clock) -> None:
    from switchkd.training.world.dataset import draw_world, is_written

    folder = plan.out / "world"
    if not is_written(folder, plan.world):
        clock.measure("world", lambda: draw_world(folder, plan.world))


def _parts(plan: Plan, clock: Clock) -> None:
    from switchkd.training.world.bases import copy_parts, make_parts, store, stored_parts
    from switchkd.training.world.dataset import draw_world
    from switchkd.training.world_command import PARTS_WORLD

    if not plan.from_scratch:
        copy_parts(stored_parts(), plan.out)
        return
    made = plan.out / "parts"

    def work() -> None:
        draw_world(made / "world", PARTS_WORLD if plan.steps is None else plan.world)
        make_parts(made, announce=announce, max_steps=plan.steps)
        store(made, made / "stored")

    if not (made / "stored" / "teacher" / "config.json").is_file():
        clock.measure("parts", work)
    copy_parts(made / "stored", plan.out)


def _train(plan: Plan, arm: str, seed: int, clock: Clock) -> None:
    from switchkd.training.recipe.recipe import RecipeError, load_recipe
    from switchkd.training.runs.stages import check_kept, run_recipe

    recipe = load_recipe(f"world/{arm}", [f"root={plan.out}", f"output={plan.folder(seed)}", f"seed={seed}"])
    if plan.steps is not None:
        recipe = recipe.with_max_steps(plan.steps)
    try:
        check_kept(recipe)
    except RecipeError as error:
        raise QuickstartError(f"{error}; --out FOLDER begins a quickstart in another folder") from None
    for result in run_recipe(recipe, announce=announce):
        clock.record(result.name if seed == 0 else f"{result.name} (seed {seed})", result.seconds)


def _export(plan: Plan, clock: Clock) -> None:
    from switchkd.export.assembly import export_checkpoint
    from switchkd.export.contract.bundle import INT7
    from switchkd.export.contract.manifest import FORMAT_VERSION
    from switchkd.export.folders.digests import sha256
    from switchkd.export.search.mix_options import MixOptions
    from switchkd.export.verification.parity import PAIRS

    bundle, marker = plan.out / "bundle", plan.out / "bundle.source.json"
    weights = sha256(plan.out / "student_switch_kd" / "model.safetensors")
    source = {"weights": weights, "format_version": FORMAT_VERSION, "integer_weights": INT7}
    if marker.is_file() and json.loads(marker.read_text()) == source and (bundle / "manifest.json").is_file():
        return
    shutil.rmtree(bundle, ignore_errors=True)

    def work() -> None:
        world, examples = plan.out / "world", plan.out / "examples"
        _copy_examples(world, examples)
        calibration = MixOptions(calibration=world / "validation.json", picture_root=world / "pictures")
        export_checkpoint(
            plan.out / "student_switch_kd",
            bundle,
            precisions=("fp32", "int8"),
            mix=calibration,
            pairs=PAIRS if plan.steps is None else SHORT_PAIRS,
            examples=examples,
        )

    clock.measure("export", work)
    marker.write_text(json.dumps(source))


def _copy_examples(world: Path, folder: Path, count: int = 6) -> None:
    """A few test pictures, each with a question of another kind, for the demo."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    records = json.loads((world / "test.json").read_text())
    examples: list[dict[str, str]] = []
    seen: set[str] = set()
    for record in records:
        if seen & {record["kind"], record["image"]} or len(record["conversations"]) > 2:
            continue
        seen |= {record["kind"], record["image"]}
        name = record["image"].replace("/", "-")
        shutil.copy(world / "pictures" / record["image"], folder / name)
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        examples.append({"picture": name, "question": question})
    (folder / "examples.json").write_text(json.dumps(examples[:count], indent=1) + "\n")


def _measure(plan: Plan, clock: Clock) -> dict[str, Any]:
    from switchkd.training.runs.model_card import write_scores

    from .quickstart_measure import measure_all, scores_of

    report = measure_all(plan.out, [plan.folder(seed) for seed in range(plan.seeds)], ARMS, clock)
    for arm in ARMS:
        write_scores(plan.out / arm, *scores_of(report, arm))
    return report
