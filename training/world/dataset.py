"""Writes the picture world to disk: PNG pictures and LLaVA-format JSON, deterministic and resumable.

FOLDER/
  pictures/{train,validation,test}/000000.png
  captions.json      one dense caption a training picture (PT)
  train.json         several questions a training picture, plus text-only samples (SFT, DFT)
  validation.json, test.json   one question a record, with its kind, template and the fact asked for
  regions.json       what is where in each training picture (encoder pretraining)
  world.json         the settings that made it; written last, so its presence means complete
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .questions import KINDS, Balancer, Question, caption, text_only
from .scenes import SPLITS, Scene, draw, random_scene

WORLD_VERSION = 2
MARKER = "world.json"


@dataclass(frozen=True)
class WorldSettings:
    """How much to generate. Counts are pictures for train, questions for validation and test."""

    train_pictures: int = 10_000
    validation_questions: int = 700
    test_questions: int = 3_500
    questions_per_picture: int = 6
    text_share: float = 0.02
    caption_share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_pictures", "validation_questions", "test_questions", "questions_per_picture"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a world needs at least 1")


def draw_world(folder: Path, settings: WorldSettings) -> None:
    """Write a world with a progress bar, unless it is there."""
    if is_written(folder, settings):
        return
    with tqdm(total=picture_count(settings), desc="pictures", disable=None, unit="picture") as bar:
        write_world(folder, settings, bar.update)


def write_world(folder: Path, settings: WorldSettings, advance: Callable[[], object] = lambda: None) -> Path:
    """Write the world into `folder` unless the same world is already there; `advance` is called per picture."""
    if is_written(folder, settings):
        return folder
    marker = folder / MARKER
    marker.unlink(missing_ok=True)
    for split in SPLITS:
        (folder / "pictures" / split).mkdir(parents=True, exist_ok=True)
    _write_train(folder, settings, advance)
    for split, count in (("validation", settings.validation_questions), ("test", settings.test_questions)):
        _write_questions(folder, split, count, settings.seed, advance)
    _dump(marker, _stamp(settings))
    return folder


def is_written(folder: Path, settings: WorldSettings) -> bool:
    """Whether exactly this world is in `folder`, complete."""
    marker = folder / MARKER
    return marker.is_file() and json.loads(marker.read_text()) == _stamp(settings)


def _stamp(settings: WorldSettings) -> dict[str, Any]:
    return {"version": WORLD_VERSION, **dataclasses.asdict(settings)}


def picture_count(settings: WorldSettings) -> int:
    """How many pictures `write_world` draws, for a progress bar."""
    held_out = -(-settings.validation_questions // len(KINDS)) + -(-settings.test_questions // len(KINDS))
    return settings.train_pictures + held_out


def _rng(seed: int, purpose: str) -> random.Random:
    # A string seed is hashed with SHA-512, so it is the same on every machine and Python.
    return random.Random(f"switchkd world {WORLD_VERSION} {purpose} {seed}")


def _write_train(folder: Path, settings: WorldSettings, advance: Callable[[], object]) -> None:
    scenes = _scenes(settings.seed, "train")
    rng = _rng(settings.seed, "train questions")
    balancers = {kind: Balancer(rng) for kind in KINDS}
    captions, train, regions = [], [], []
    for number in range(settings.train_pictures):
        scene = next(scenes)
        image = f"train/{number:06d}.png"
        draw(scene).save(folder / "pictures" / image, compress_level=1)
        described = caption(scene, rng)
        captions.append(_record(f"caption-{number:06d}", image, [described]))
        turns = _turns(scene, rng, balancers, settings)
        # A scene of look-alikes may allow none of the questions drawn for it: it is described then.
        if rng.random() < settings.caption_share or not turns:
            turns.append(described)
        train.append(_record(f"train-{number:06d}", image, turns))
        regions.append({"image": image, "things": [_region(scene, cell) for cell in range(9)]})
        if rng.random() < settings.text_share:
            turns = [text_only(rng).turns[-1] for _ in range(4)]
            train.append(_record(f"text-{number:06d}", None, turns))
        advance()
    for name, rows in (("captions", captions), ("train", train), ("regions", regions)):
        _dump(folder / f"{name}.json", rows)


def _turns(
    scene: Scene, rng: random.Random, balancers: dict[str, Balancer], settings: WorldSettings
) -> list[tuple[str, str]]:
    """Several questions about one picture, as LLaVA's mix merges them into one conversation."""
    questions: list[Question] = []
    kinds = sorted(KINDS) * 2
    for kind in rng.sample(kinds, min(settings.questions_per_picture, len(kinds))):
        question = balancers[kind].choose(KINDS[kind](scene))
        if question is not None and question not in questions:
            questions.append(question)
    return [turn for question in questions for turn in question.turns]


def _region(scene: Scene, cell: int) -> dict[str, Any]:
    thing = scene.at(cell)
    return {"cell": cell, "colour": thing.colour if thing else None, "shape": thing.shape if thing else None}


def _write_questions(folder: Path, split: str, count: int, seed: int, advance: Callable[[], object]) -> None:
    """One record a question, kinds in turn, up to one question of each kind a picture."""
    rng = _rng(seed, f"{split} questions")
    balancers = {kind: Balancer(rng) for kind in KINDS}
    records: list[dict[str, Any]] = []
    remaining = {kind: len(range(index, count, len(KINDS))) for index, kind in enumerate(KINDS)}
    for number, scene in enumerate(_scenes(seed, split)):
        if not any(remaining.values()):
            break
        image = f"{split}/{number:06d}.png"
        used = False
        for kind in KINDS:
            question = balancers[kind].choose(KINDS[kind](scene)) if remaining[kind] else None
            if question is None:
                continue
            used = True
            remaining[kind] -= 1
            record = _record(f"{split}-{number:06d}-{kind}", image, list(question.turns))
            records.append(record | {"kind": kind, "template": question.template, "fact": question.fact})
        if used:
            draw(scene).save(folder / "pictures" / image, compress_level=1)
            advance()
    _dump(folder / f"{split}.json", records)


def _scenes(seed: int, split: str) -> Iterator[Scene]:
    # Scenes have a generator of their own: other questions about them leave the pictures as they are.
    rng = _rng(seed, split)
    while True:
        yield random_scene(rng, split)


def _record(identity: str, image: str | None, turns: list[tuple[str, str]]) -> dict[str, Any]:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        preface = "<image>\n" if image is not None and number == 0 else ""
        conversations.append({"from": "human", "value": preface + question})
        conversations.append({"from": "gpt", "value": answer})
    record: dict[str, Any] = {"id": identity, "conversations": conversations}
    return record | ({"image": image} if image is not None else {})


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=None, separators=(",", ":")) + "\n")
