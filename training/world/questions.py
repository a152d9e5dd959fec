"""Questions about a scene, by kind, with balanced answers so that guessing without the picture fails.

Each kind offers every question that the scene allows; `Balancer` picks the one whose answer has been
used least so far for that wording, which evens out the answers of every template over a whole split.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .scenes import COLOURS, POSITIONS, SHAPES, Scene

CAPTION_REQUEST = "Describe the picture."
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Question:
    """One question: its kind, its wording's name, the turns before it, the text and the answer."""

    kind: str
    template: str
    text: str
    answer: str
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """All (question, answer) turns, this one last."""
        return (*self.earlier, (self.text, self.answer))


class Balancer:
    """Chooses questions so that each wording's answers come out even (deterministic given the rng)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: dict[str, Counter[str]] = {}

    def choose(self, candidates: Iterable[Question]) -> Question | None:
        """Take a wording at random, then its question with the least used answer; None without candidates."""
        by_template: dict[str, list[Question]] = {}
        for question in candidates:
            by_template.setdefault(question.template, []).append(question)
        if not by_template:
            return None
        template = self._rng.choice(sorted(by_template))
        used = self._used.setdefault(template, Counter())
        choices = by_template[template]
        self._rng.shuffle(choices)
        question = min(choices, key=lambda choice: used[choice.answer])
        used[question.answer] += 1
        return question


def attributes(scene: Scene) -> Iterable[Question]:
    """Colour of the one thing of a shape; shape of the one thing of a colour."""
    shapes = Counter(thing.shape for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    for thing in scene.things:
        if shapes[thing.shape] == 1:
            yield Question("attribute", "colour", f"What colour is the {thing.shape}?", thing.colour)
        if colours[thing.colour] == 1:
            shape = "digit" if thing.is_digit else thing.shape
            yield Question("attribute", "shape", f"What shape is the {thing.colour} thing?", shape)


def counting(scene: Scene) -> Iterable[Question]:
    """How many things of a colour, of a shape, digits, or in all."""
    for colour in COLOURS:
        number = sum(thing.colour == colour for thing in scene.things)
        yield Question("counting", "count colour", f"How many {colour} things are there?", str(number))
    for shape in SHAPES:
        number = sum(thing.shape == shape for thing in scene.things)
        plural = "crosses" if shape == "cross" else f"{shape}s"
        yield Question("counting", "count shape", f"How many {plural} are there?", str(number))
    number = sum(thing.is_digit for thing in scene.things)
    yield Question("counting", "count digits", "How many digits are there?", str(number))
    yield Question("counting", "count all", "How many things are there?", str(len(scene.things)))


def existence(scene: Scene) -> Iterable[Question]:
    """Is there a thing of a colour, of a shape, or of both; absent pairs are near misses from the scene itself."""
    colours = {thing.colour for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    names = {thing.name for thing in scene.things}
    for colour in COLOURS:
        answer = "yes" if colour in colours else "no"
        yield Question("existence", "colour exists", f"Is there {with_article(colour)} thing?", answer)
    for shape in SHAPES:
        yield Question("existence", "shape exists", f"Is there a {shape}?", "yes" if shape in shapes else "no")
    for colour in sorted(colours):
        for shape in sorted(shapes):
            name = f"{colour} {shape}"
            yield Question(
                "existence", "pair exists", f"Is there {with_article(name)}?", "yes" if name in names else "no"
            )


def position(scene: Scene) -> Iterable[Question]:
    """Where the one thing of a colour or of a shape is, and how two things lie to each other."""
    shapes = Counter(thing.shape for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    for thing in scene.things:
        if shapes[thing.shape] == 1:
            yield Question("position", "where is the shape", f"Where is the {thing.shape}?", thing.position)
        if colours[thing.colour] == 1:
            yield Question("position", "where is the colour", f"Where is the {thing.colour} thing?", thing.position)
    single = [thing for thing in scene.things if shapes[thing.shape] == 1]
    for first in single:
        for second in single:
            for direction, (down, right) in DIRECTIONS.items():
                rows = second.cell // 3 - first.cell // 3
                columns = second.cell % 3 - first.cell % 3
                # "first is left of second" holds when second lies further right.
                gap = -(down * rows + right * columns)
                if first is not second and gap != 0:
                    answer = "yes" if gap > 0 else "no"
                    text = f"Is the {first.shape} {direction} the {second.shape}?"
                    yield Question("position", "relation", text, answer)


def reading(scene: Scene) -> Iterable[Question]:
    """OCR: one digit by its place or colour, or all digits in reading order."""
    written = [thing for thing in scene.things if thing.is_digit]
    colours = Counter(thing.colour for thing in written)
    for thing in written:
        yield Question("reading", "digit at", f"What digit is at the {thing.position}?", thing.shape)
        if colours[thing.colour] == 1:
            yield Question("reading", "digit of colour", f"What digit is {thing.colour}?", thing.shape)
    if 1 <= len(written) <= 3:
        yield Question("reading", "read all", "Read the digits.", " ".join(thing.shape for thing in written))


def region(scene: Scene) -> Iterable[Question]:
    """Referring: what is inside a box, given as fractions of the picture."""
    for thing in scene.things:
        box = ", ".join(f"{value:.2f}" for value in thing.box)
        yield Question("region", "in box", f"What is in the region [{box}]?", thing.name)


def conversation(scene: Scene) -> Iterable[Question]:
    """Two turns; the second can be answered only with the first in mind."""
    for cell, place in enumerate(POSITIONS):
        thing = scene.at(cell)
        row, column = divmod(cell, 3)
        first = (f"What is at the {place}?", thing.name if thing else "nothing")
        for words, (down, right) in {"to the right of": (0, 1), "to the left of": (0, -1), "below": (1, 0)}.items():
            if 0 <= row + down < 3 and 0 <= column + right < 3:
                neighbour = scene.at((row + down) * 3 + column + right)
                answer = neighbour.name if neighbour else "nothing"
                yield Question("conversation", "neighbour", f"And what is {words} it?", answer, (first,))
        if thing:
            others = sum(other.colour == thing.colour for other in scene.things) - 1
            text = "Is there another thing of the same colour?"
            yield Question("conversation", "same colour", text, "yes" if others else "no", (first,))


KINDS: dict[str, Callable[[Scene], Iterable[Question]]] = {
    "attribute": attributes,
    "counting": counting,
    "existence": existence,
    "position": position,
    "reading": reading,
    "region": region,
    "conversation": conversation,
}


def caption(scene: Scene, rng: random.Random) -> str:
    """A dense caption: every thing and where it is, in random order, thing first or place first.

    In a fixed order a model could scan the picture and never learn to look a thing up by what it is or where it is;
    with a random one every word after the first of each part is such a look-up.
    """
    things = rng.sample(scene.things, len(scene.things))
    if rng.random() < 0.5:
        return ", ".join(f"{with_article(thing.name)} at the {thing.position}" for thing in things) + "."
    return ", ".join(f"at the {thing.position} {with_article(thing.name)}" for thing in things) + "."


def with_article(name: str) -> str:
    """`a red circle`, `an orange 8`."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def text_only(rng: random.Random) -> Question:
    """A question that needs no picture, as ShareGPT's share of the LLaVA mix."""
    if rng.random() < 0.5:
        first, second = rng.randint(0, 6), rng.randint(0, 3)
        return Question("text", "sum", f"What is {first} plus {second}?", str(first + second))
    place = rng.choice(POSITIONS)
    opposite = POSITIONS[8 - POSITIONS.index(place)]
    return Question("text", "opposite", f"What is opposite the {place}?", opposite)
