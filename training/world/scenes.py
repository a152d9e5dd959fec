"""Scenes of coloured shapes and real handwritten digits on a 3x3 grid, and their pictures.

A scene is a value; drawing it twice gives the same bytes. The digits are the UCI optical digits that
scikit-learn bundles; each split draws from its own digit images, so a test digit was never trained on.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

PICTURE_SIDE = 72
CELL_SIDE = PICTURE_SIDE // 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (235, 210, 40),
    "green": (50, 160, 70),
    "blue": (45, 95, 215),
    "purple": (140, 60, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# One word, and so one token, each: "top left" and "top" would be told apart only by what follows.
POSITIONS = (
    "northwest",
    "north",
    "northeast",
    "west",
    "centre",
    "east",
    "southwest",
    "south",
    "southeast",
)
SPLITS = ("train", "validation", "test")
# 1,797 digit images in all; the first two shares are train and validation, the rest is test.
DIGIT_SHARES = {"train": (0, 1300), "validation": (1300, 1400), "test": (1400, 1797)}


@dataclass(frozen=True)
class Thing:
    """One coloured shape or digit: what it is, its cell (0-8, row by row), and how it is drawn."""

    shape: str  # one of SHAPES, or "0".."9"
    colour: str
    cell: int
    side: int  # pixels
    left: int  # pixels from the picture's left edge
    top: int
    shade: tuple[int, int, int]
    digit_image: int = -1  # index into the bundled digits, -1 for a shape
    tilt: float = 0.0  # degrees, anticlockwise
    slimness: float = 1.0  # width of a digit over its usual width

    @property
    def is_digit(self) -> bool:
        """Whether this is a handwritten digit."""
        return self.digit_image >= 0

    @property
    def name(self) -> str:
        """Colour and shape, such as `red circle` or `blue 7`."""
        return f"{self.colour} {self.shape}"

    @property
    def position(self) -> str:
        """The cell's name, such as `northwest`."""
        return POSITIONS[self.cell]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom as fractions of the picture, as in RefCOCO's LLaVA form."""
        right, bottom = self.left + self.side, self.top + self.side
        return (self.left / PICTURE_SIDE, self.top / PICTURE_SIDE, right / PICTURE_SIDE, bottom / PICTURE_SIDE)


@dataclass(frozen=True)
class Scene:
    """A picture's content: its things in reading order, and its background."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    noise_seed: int

    def at(self, cell: int) -> Thing | None:
        """The thing in a cell, or None."""
        return next((thing for thing in self.things if thing.cell == cell), None)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The bundled UCI optical digits: images uint8 [1797, 8, 8] (0-255) and labels [1797]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.clip(bunch.images * 16, 0, 255).astype(np.uint8), bunch.target


def random_scene(rng: random.Random, split: str, *, min_things: int = 2, max_things: int = 6) -> Scene:
    """Draw a scene's content at random; `split` decides which digit images may appear."""
    cells = sorted(rng.sample(range(9), rng.randint(min_things, max_things)))
    # Few colours and shapes a scene, so that counts above one and near misses for "is there" are common.
    colours = rng.sample(sorted(COLOURS), rng.randint(2, 4))
    shapes = rng.sample(SHAPES, rng.randint(2, 3))
    things = tuple(_random_thing(rng, split, cell, rng.choice(colours), shapes) for cell in cells)
    light = rng.randint(225, 250)
    background = tuple(light - rng.randint(0, 14) for _ in range(3))
    return Scene(things, background, rng.getrandbits(32))  # type: ignore[arg-type]


def _random_thing(rng: random.Random, split: str, cell: int, colour: str, shapes: list[str]) -> Thing:
    side = rng.randint(15, 20)
    row, column = divmod(cell, 3)
    left = column * CELL_SIDE + rng.randint(1, CELL_SIDE - side - 1)
    top = row * CELL_SIDE + rng.randint(1, CELL_SIDE - side - 1)
    shade = tuple(max(0, min(255, value + rng.randint(-18, 18))) for value in COLOURS[colour])
    if rng.random() < 0.6:
        return Thing(rng.choice(shapes), colour, cell, side, left, top, shade)  # type: ignore[arg-type]
    digit_image = rng.randrange(*DIGIT_SHARES[split])
    # There are few digit images: tilted and stretched ones teach reading, where the same few would be learned by heart.
    tilt, slimness = rng.uniform(-12, 12), rng.uniform(0.75, 1.0)
    shape = str(digits()[1][digit_image])
    return Thing(shape, colour, cell, side, left, top, shade, digit_image, tilt, slimness)  # type: ignore[arg-type]


@functools.cache
def _shape_mask(shape: str, side: int) -> Image.Image:
    """An anti-aliased mask of one shape, drawn four times too large and reduced."""
    big = side * 4
    mask = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(mask)
    edge = big - 1
    if shape == "circle":
        pen.ellipse((0, 0, edge, edge), fill=255)
    elif shape == "square":
        pen.rectangle((big * 0.06, big * 0.06, edge * 0.94, edge * 0.94), fill=255)
    elif shape == "triangle":
        pen.polygon([(edge / 2, 0), (edge, edge), (0, edge)], fill=255)
    elif shape == "cross":
        pen.rectangle((big * 0.34, 0, big * 0.66, edge), fill=255)
        pen.rectangle((0, big * 0.34, edge, big * 0.66), fill=255)
    else:  # star
        centre = edge / 2
        points = []
        for corner in range(10):
            radius = centre if corner % 2 == 0 else centre * 0.42
            angle = math.pi * corner / 5 - math.pi / 2
            points.append((centre + radius * math.cos(angle), centre + radius * math.sin(angle)))
        pen.polygon(points, fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)


def _digit_mask(thing: Thing) -> Image.Image:
    width = round(thing.side * thing.slimness)
    written = Image.fromarray(digits()[0][thing.digit_image]).resize((width, thing.side), Image.Resampling.BICUBIC)
    mask = Image.new("L", (thing.side, thing.side), 0)
    mask.paste(written, ((thing.side - width) // 2, 0))
    return mask.rotate(thing.tilt, Image.Resampling.BICUBIC)


def draw(scene: Scene) -> Image.Image:
    """The scene's picture: RGB, PICTURE_SIDE x PICTURE_SIDE pixels, the same bytes every time."""
    noise = np.random.default_rng(scene.noise_seed).integers(-5, 6, (PICTURE_SIDE, PICTURE_SIDE, 1))
    canvas = np.clip(np.array(scene.background)[None, None, :] + noise, 0, 255).astype(np.uint8)
    picture = Image.fromarray(canvas)
    for thing in scene.things:
        if thing.is_digit:
            mask = _digit_mask(thing)
        else:
            mask = _shape_mask(thing.shape, thing.side)
        picture.paste(thing.shade, (thing.left, thing.top), mask)
    return picture
