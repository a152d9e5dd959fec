"""Questions about a scene, by kind, with balanced answers so that guessing without the picture fails.

Each kind offers every question that the scene allows; `Balancer` picks the one whose fact has been
used least so far for that wording, which evens out the answers of every template over a whole split.

Where something has to be looked up, the answer is a sentence that names the key before the fact ("The
circle is in the north."), in the words of the captions: each word then asks for one look-up, and what
the captions taught serves the questions. Yes, no and numbers are answered in a word.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .scenes import COLOURS, POSITIONS, SHAPES, Scene

CAPTION_REQUEST = "Describe the picture."
LIST_REQUEST = "List facts."
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Question:
    """One question: its kind, its wording's name, the turns before it, the text, the fact asked for, the answer."""

    kind: str
    template: str
    text: str
    fact: str
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
        """Take a wording at random, then its question with the least used fact; None without candidates."""
        by_template: dict[str, list[Question]] = {}
        for question in candidates:
            by_template.setdefault(question.template, []).append(question)
        if not by_template:
            return None
        template = self._rng.choice(sorted(by_template))
        used = self._used.setdefault(template, Counter())
        choices = by_template[template]
        self._rng.shuffle(choices)
        question = min(choices, key=lambda choice: used[choice.fact])
        used[question.fact] += 1
        return question


def attributes(scene: Scene) -> Iterable[Question]:
    """Colour of the one thing of a shape; shape of the one thing of a colour."""
    for thing in scene.things:
        shape = "digit" if thing.is_digit else thing.shape
        if _only(scene, shape=thing.shape):
            answer = f"The {thing.shape} is {thing.colour}."
            yield Question("attribute", "colour", f"What colour is the {thing.shape}?", thing.colour, answer)
        if _only(scene, colour=thing.colour):
            answer = f"The {thing.colour} thing is a {shape}."
            yield Question("attribute", "shape", f"What shape is the {thing.colour} thing?", shape, answer)


def counting(scene: Scene) -> Iterable[Question]:
    """How many things of a colour, of a shape, digits, or in all."""

    def question(template: str, things: str, number: int) -> Question:
        return Question("counting", template, f"How many {things} are there?", str(number), str(number))

    for colour in COLOURS:
        yield question("count colour", f"{colour} things", sum(thing.colour == colour for thing in scene.things))
    for shape in SHAPES:
        plural = "crosses" if shape == "cross" else f"{shape}s"
        yield question("count shape", plural, sum(thing.shape == shape for thing in scene.things))
    yield question("count digits", "digits", sum(thing.is_digit for thing in scene.things))
    yield question("count all", "things", len(scene.things))


def existence(scene: Scene) -> Iterable[Question]:
    """Is there a thing of a colour, of a shape, or of both; absent pairs are near misses from the scene itself."""
    colours = {thing.colour for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    names = {thing.name for thing in scene.things}

    def question(template: str, thing: str, there: bool) -> Question:
        answer = "yes" if there else "no"
        return Question("existence", template, f"Is there {with_article(thing)}?", answer, answer)

    for colour in COLOURS:
        yield question("colour exists", f"{colour} thing", colour in colours)
    for shape in SHAPES:
        yield question("shape exists", shape, shape in shapes)
    for colour in sorted(colours):
        for shape in sorted(shapes):
            yield question("pair exists", f"{colour} {shape}", f"{colour} {shape}" in names)


def position(scene: Scene) -> Iterable[Question]:
    """Where the one thing of a colour or of a shape is, and how two things lie to each other."""
    for thing in scene.things:
        for template, name, alone in (
            ("where is the shape", thing.shape, _only(scene, shape=thing.shape)),
            ("where is the colour", f"{thing.colour} thing", _only(scene, colour=thing.colour)),
        ):
            if alone:
                answer = f"The {name} is in the {thing.position}."
                yield Question("position", template, f"Where is the {name}?", thing.position, answer)
    single = [thing for thing in scene.things if _only(scene, shape=thing.shape)]
    for first in single:
        for second in single:
            for direction, (down, right) in DIRECTIONS.items():
                rows = second.cell // 3 - first.cell // 3
                columns = second.cell % 3 - first.cell % 3
                # "first is left of second" holds when second lies further right.
                gap = -(down * rows + right * columns)
                if first is not second and gap != 0:
                    fact = "yes" if gap > 0 else "no"
                    text = f"Is the {first.shape} {direction} the {second.shape}?"
                    places = (
                        f"The {first.shape} is in the {first.position}, the {second.shape} is in the {second.position}"
                    )
                    yield Question("position", "relation", text, fact, f"{places}: {fact}.")


def reading(scene: Scene) -> Iterable[Question]:
    """OCR: one digit by its place or colour, or all digits in reading order."""
    written = [thing for thing in scene.things if thing.is_digit]
    colours = Counter(thing.colour for thing in written)
    for thing in written:
        answer = f"The digit in the {thing.position} is {thing.shape}."
        yield Question("reading", "digit at", f"What digit is in the {thing.position}?", thing.shape, answer)
        if colours[thing.colour] == 1:
            answer = f"The {thing.colour} digit is {thing.shape}."
            yield Question("reading", "digit of colour", f"What digit is {thing.colour}?", thing.shape, answer)
    if 1 <= len(written) <= 3:
        digits = " ".join(thing.shape for thing in written)
        yield Question("reading", "read all", "Read the digits.", digits, digits)


def region(scene: Scene) -> Iterable[Question]:
    """Referring: what is inside a box, given as fractions of the picture."""
    for thing in scene.things:
        box = ", ".join(f"{value:.2f}" for value in thing.box)
        answer = f"In the {thing.position} is {with_article(thing.name)}."
        yield Question("region", "in box", f"What is in the region [{box}]?", thing.name, answer)


def conversation(scene: Scene) -> Iterable[Question]:
    """Two turns; the second can be answered only with the first in mind."""

    def at(cell: int) -> tuple[str, str]:
        thing = scene.at(cell)
        name = with_article(thing.name) if thing else "nothing"
        return name.removeprefix("an ").removeprefix("a "), f"In the {POSITIONS[cell]} is {name}."

    for cell, place in enumerate(POSITIONS):
        thing = scene.at(cell)
        row, column = divmod(cell, 3)
        earlier = ((f"What is in the {place}?", at(cell)[1]),)
        for words, (down, right) in {"to the right of": (0, 1), "to the left of": (0, -1), "below": (1, 0)}.items():
            if 0 <= row + down < 3 and 0 <= column + right < 3:
                fact, answer = at((row + down) * 3 + column + right)
                yield Question("conversation", "neighbour", f"And what is {words} it?", fact, answer, earlier)
        if thing:
            another = "no" if _only(scene, colour=thing.colour) else "yes"
            text = "Is there another thing of the same colour?"
            yield Question("conversation", "same colour", text, another, another, earlier)


def _only(scene: Scene, *, shape: str | None = None, colour: str | None = None) -> bool:
    """Whether a scene has exactly one thing of a shape, or of a colour."""
    return sum(shape in (None, thing.shape) and colour in (None, thing.colour) for thing in scene.things) == 1


KINDS: dict[str, Callable[[Scene], Iterable[Question]]] = {
    "attribute": attributes,
    "counting": counting,
    "existence": existence,
    "position": position,
    "reading": reading,
    "region": region,
    "conversation": conversation,
}


def caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A request and a dense caption in random order: sentences of every thing and its place, or a list of bare facts.

    In a fixed order a model could scan the picture and never learn to look a thing up by what it is or where it is. In
    a bare fact ("north red", "circle north", "red circle") the word that asks stands right before the one that
    answers. Such a look-up is learned in hundreds of steps; a sentence, which has to carry it over a few words, only
    once the look-up is there. Sentences alone stayed on a plateau for thousands of steps.
    """
    if rng.random() < 0.5:
        return LIST_REQUEST, _facts(scene, rng)
    things, thing_first = rng.sample(scene.things, len(scene.things)), rng.random() < 0.5
    parts = [
        f"{with_article(thing.name)} is in the {thing.position}"
        if thing_first
        else f"in the {thing.position} is {with_article(thing.name)}"
        for thing in things
    ]
    text = ", ".join(parts)
    return CAPTION_REQUEST, text[0].upper() + text[1:] + "."


def _facts(scene: Scene, rng: random.Random) -> str:
    """Two facts of each thing, in random order: any two of place, colour and shape, either of them first."""
    facts = []
    for thing in scene.things:
        pairs = list(itertools.permutations((thing.position, thing.colour, thing.shape), 2))
        facts += [" ".join(pair) for pair in rng.sample(pairs, 2)]
    rng.shuffle(facts)
    return ", ".join(facts)


def with_article(name: str) -> str:
    """`a red circle`, `an orange 8`."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def text_only(rng: random.Random) -> Question:
    """A question that needs no picture, as ShareGPT's share of the LLaVA mix."""
    if rng.random() < 0.5:
        first, second = rng.randint(0, 6), rng.randint(0, 3)
        total = str(first + second)
        return Question("text", "sum", f"What is {first} plus {second}?", total, total)
    place = rng.choice(POSITIONS)
    opposite = POSITIONS[8 - POSITIONS.index(place)]
    answer = f"Opposite the {place} is the {opposite}."
    return Question("text", "opposite", f"What is opposite the {place}?", opposite, answer)
