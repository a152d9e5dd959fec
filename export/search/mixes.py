"""Finds the smallest and fastest mix of methods within an allowed drop of accuracy: `--dtype auto --max-drop 1.0`.

Each part is measured alone in each method, all others in float32. What a mix will do is predicted from that: bytes and
seconds add up, and so do the drops of accuracy. Then the mixes are built and scored, the best first, until one holds.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product, zip_longest
from typing import Any, Self

from ..contract.bundle import DECODER, GRAPHS, VISION_ENCODER
from ..contract.processor import this_machine
from ..graphs.parts import PARTS, parts_in
from ..quantisation.precisions import METHODS, format_parts, methods_of
from ..verification.graph_runner import Array
from ..verification.speed import Speed, side_by_side
from .calibration import CalibrationError, Pair, Reference, Score, score
from .variants import FLOAT32, Variants

MAX_TRIES = 8
_ROUNDING = 1e-9  # of percentage points

Say = Callable[[str], None]  # what the search is at


@dataclass(frozen=True)
class Trial:
    """One part in one method, all others in float32: what that costs, and what it saves."""

    part: str
    method: str
    drop: float  # of accuracy, in percentage points; negative where some was won
    agreement: float  # share of answers with the float32 model's tokens
    relative_rms: float  # of logits
    bytes: int  # of all graphs together
    seconds: float  # of a whole answer


@dataclass(frozen=True)
class Mix:
    """A method for each part, and what is predicted of it."""

    parts: dict[str, str]
    drop: float  # sum of its parts' drops, all that there is at most; what one won does not pay for another's
    relative_rms: float  # root of the sum of squares, as independent errors add up
    bytes: int
    seconds: float
    cost: float  # bytes × seconds, both relative to float32


@dataclass(frozen=True)
class Attempt:
    """A mix that was built, scored and timed."""

    mix: Mix  # what was predicted
    score: Score
    drop: float
    bytes: int
    seconds: float
    held: bool


@dataclass(frozen=True)
class Found:
    """What the search chose, and everything that it measured."""

    parts: dict[str, str]
    max_drop: float
    accuracy: float  # of float32
    float32: Trial
    trials: list[Trial]
    attempts: list[Attempt]
    machine: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """The numbers for the manifest."""
        return {**asdict(self), "command": f"--parts {format_parts(self.parts)}"}


def find_mix(variants: Variants, pairs: Sequence[Pair], reference: Reference, max_drop: float, say: Say) -> Found:
    """Search all mixes for the one of least bytes × seconds whose accuracy on `pairs` drops by `max_drop` at most.

    `reference` are the float32 model's answers. The product knows no weight between size and speed: half the bytes are
    worth as much as half the seconds. At most MAX_TRIES mixes are built; then the cheapest part that held alone is
    taken, and if none did, float32.
    """
    work = _Work.of(pairs, reference)
    float32, trials = _measure_parts(variants, pairs, reference, work, say)
    allowed = max_drop + _ROUNDING
    attempts: list[Attempt] = []
    for mix in predict(float32, trials, 100 * reference.score.accuracy):
        if mix.drop > allowed or any(mix.relative_rms >= attempt.mix.relative_rms for attempt in attempts):
            continue  # a mix that is further off than one that failed would fail too
        if len(attempts) == MAX_TRIES or mix.parts == FLOAT32:
            break
        say(f"try {format_parts(mix.parts)}")
        found = score(variants.runner(mix.parts), pairs, reference)
        drop = found.drop(reference.score)
        plain, seconds = map(work.seconds, work.speeds(variants, mix.parts))
        size = variants.bytes(mix.parts)
        attempts.append(Attempt(mix, found, drop, size, seconds / plain * float32.seconds, drop <= allowed))
        if attempts[-1].held:
            return Found(mix.parts, max_drop, reference.score.accuracy, float32, trials, attempts, this_machine())
        variants.forget()
    best = min(
        (trial for trial in (float32, *trials) if trial.drop <= allowed),
        key=lambda trial: trial.bytes * trial.seconds,
    )
    return Found(
        {**FLOAT32, best.part: best.method},
        max_drop,
        reference.score.accuracy,
        float32,
        trials,
        attempts,
        this_machine(),
    )


def predict(float32: Trial, trials: Sequence[Trial], most: float) -> list[Mix]:
    """Every combination of what was measured, the cheapest first; of equal cost, the one with the smaller error.

    `most` is the float32 model's accuracy, in percent: more cannot be lost.
    """
    choices = [[float32, *(trial for trial in trials if trial.part == part)] for part in PARTS]
    mixes = []
    for chosen in product(*choices):
        size = float32.bytes + sum(trial.bytes - float32.bytes for trial in chosen)
        # Noise can make a saving larger than there is time to save.
        seconds = max(float32.seconds / 100, float32.seconds + sum(t.seconds - float32.seconds for t in chosen))
        mixes.append(
            Mix(
                parts={part: trial.method for part, trial in zip(PARTS, chosen, strict=True)},
                drop=min(most, sum(max(0.0, trial.drop) for trial in chosen)),
                relative_rms=math.hypot(*(trial.relative_rms for trial in chosen)),
                bytes=size,
                seconds=seconds,
                cost=size / float32.bytes * seconds / float32.seconds,
            )
        )
    return sorted(mixes, key=lambda mix: (mix.cost, mix.relative_rms))


def _measure_parts(
    variants: Variants, pairs: Sequence[Pair], reference: Reference, work: "_Work", say: Say
) -> tuple[Trial, list[Trial]]:
    """Float32, and every part alone in every method.

    Answers are scored one part at a time. Seconds are taken from one part of each graph together, beside float32's:
    no graph's time depends on another graph.
    """
    size, found, plain = variants.bytes(FLOAT32), [], []
    for column in zip_longest(*(_alone_in(graph) for graph in GRAPHS)):
        chosen = dict(filter(None, column))
        scores = {}
        for part, method in chosen.items():
            say(f"measure {part}={method}")
            parts = {**FLOAT32, part: method}
            scores[part] = score(variants.runner(parts), pairs, reference), variants.bytes(parts)
        speeds = work.speeds(variants, {**FLOAT32, **chosen})
        plain.append(work.seconds(speeds[0]))
        for part, method in chosen.items():
            ratio = work.seconds(_only(PARTS[part], *speeds)) / plain[-1]
            found.append((part, method, *scores[part], ratio))
        variants.forget()
    seconds = statistics.median(plain)
    float32 = Trial(next(iter(PARTS)), METHODS[0], 0.0, 1.0, 0.0, size, seconds)
    order = list(PARTS)
    ratios = {(part, method): ratio for part, method, _, _, ratio in found}
    return float32, [
        Trial(
            part,
            method,
            got.drop(reference.score),
            got.agreement,
            got.relative_rms,
            bytes_,
            seconds * statistics.mean(ratios[part, twin] for twin in _twins(method) if (part, twin) in ratios),
        )
        for part, method, got, bytes_, _ in sorted(found, key=lambda trial: order.index(trial[0]))
    ]


def _twins(method: str) -> tuple[str, ...]:
    """The methods with the very operators and shapes of this one: between their seconds there is noise alone."""
    return ("q4", "q4_gptq") if method in ("q4", "q4_gptq") else (method,)


def _alone_in(graph: str) -> list[tuple[str, str]]:
    """Every part of a graph with every method that it could have in place of float32."""
    return [(part, method) for part in parts_in(graph) for method in methods_of(part)[1:]]


@dataclass(frozen=True)
class _Work:
    """What the seconds of an answer are made of: a typical prompt, and how often each graph runs."""

    pair: Pair
    pixels_PCHW: Array
    encodings: float  # of a prompt's pictures, for an answer
    tokens: float  # written after the first, which the prompt gives

    @classmethod
    def of(cls, pairs: Sequence[Pair], reference: Reference) -> Self:
        seen = [(len(pair.prompt.ids), number) for number, pair in enumerate(pairs) if pair.prompt.places_T.any()]
        if not seen:
            raise CalibrationError(f"none of {len(pairs)} pairs to score on has a picture; add some that do")
        pair = pairs[sorted(seen)[len(seen) // 2][1]]
        assert pair.prompt.pixels_PCHW is not None
        tokens = statistics.mean(len(answer.tokens) - 1 for answer in reference.answers)
        return cls(pair, pair.prompt.pixels_PCHW, len(seen) / len(pairs), tokens)

    def speeds(self, variants: Variants, parts: Mapping[str, str]) -> tuple[Speed, Speed]:
        """Of float32 and of a mix, side by side."""
        runners = variants.runner(FLOAT32), variants.runner(parts)
        return side_by_side(*runners, self.pair.prompt.ids, self.pixels_PCHW)

    def seconds(self, speed: Speed) -> float:
        """Of an answer."""
        return self.encodings * speed.encode + speed.prefill + self.tokens * speed.decode


def _only(graph: str, float32: Speed, changed: Speed) -> Speed:
    """The speed with one graph changed. A row of embeddings is looked up in no time that could be measured."""
    if graph == VISION_ENCODER:
        return replace(float32, encode=changed.encode)
    return replace(changed, encode=float32.encode) if graph == DECODER else float32
