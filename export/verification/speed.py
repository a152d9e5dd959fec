"""Seconds that bundles' graphs take on this machine, in turns, so that what slows the machine slows all of them.

Shapes in names: see export/verification/graph_runner.py.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from ..contract.bundle import VISION_ENCODER, Manifest
from ..contract.processor import this_machine
from .graph_runner import Array, Cache, GraphRunner
from .parity import SamplePrompt

ROUNDS = 3
STAGES = ("encode", "prefill", "decode")  # the fields of Speed
BUDGET = 60.0  # seconds after which no other round begins
_LONG_ENOUGH = 0.1  # seconds of one turn's runs of a graph; then its median stands
_MOST_RUNS = 5
_FEWEST_TURNS = 3


@dataclass(frozen=True)
class Speed:
    """Median seconds of a precision: of one picture, of reading a prompt, and of writing one token after it."""

    encode: float
    prefill: float
    decode: float


def measure_speed(
    openers: Mapping[str, Callable[[], GraphRunner]], ids: list[int], pixels_PCHW: Array, budget: float = BUDGET
) -> dict[str, Speed]:
    """Seconds of what each opener opens, on one prompt, in turns of up to ROUNDS.

    Every turn opens the graphs anew and runs each once before the clock, so that one runner's graphs at a time are in
    memory. After `budget` seconds no other round begins. Raises what `GraphRunner.run` raises.
    """
    turns: dict[str, list[Speed]] = {name: [] for name in openers}
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for name, opened in openers.items():
            turns[name].append(_one_turn(opened(), ids, pixels_PCHW))
        if time.perf_counter() - start > budget:
            break
    return {
        name: Speed(*(statistics.median(values) for values in zip(*map(astuple, found), strict=True)))
        for name, found in turns.items()
    }


def side_by_side(first: GraphRunner, second: GraphRunner, ids: list[int], pixels_PCHW: Array) -> tuple[Speed, Speed]:
    """Seconds of two runners on one prompt, run by run in turns; for small differences.

    A graph of each is open at a time. Raises what `GraphRunner.run` raises.
    """
    runners = first, second
    encode = _in_turns([functools.partial(_encode, runner, pixels_PCHW) for runner in runners])
    embeds_1TD = first.merge(ids, pixels_PCHW)
    empty = [runner.empty_cache() for runner in runners]
    prefill = _in_turns(
        [functools.partial(_decoding, *given, embeds_1TD) for given in zip(runners, empty, strict=True)]
    )
    full = [_decode(runner, embeds_1TD, cache)[1] for runner, cache in zip(runners, empty, strict=True)]
    last_11D = embeds_1TD[:, -1:]
    decode = _in_turns([functools.partial(_decoding, *given, last_11D) for given in zip(runners, full, strict=True)])
    return Speed(encode[0], prefill[0], decode[0]), Speed(encode[1], prefill[1], decode[1])


def measure_variants(path: Path, manifest: Manifest, prompt: SamplePrompt) -> dict[str, dict[str, Any]]:
    """What `measure_speed` says of every variant of a bundle folder, with what it belongs to, for the manifest."""
    assert prompt.pixels_PCHW is not None
    openers = {
        name: functools.partial(GraphRunner.open, path, variant) for name, variant in manifest.variants().items()
    }
    machine = {"prompt_tokens": len(prompt.ids), **this_machine()}
    return {
        name: {**asdict(speed), **machine}
        for name, speed in measure_speed(openers, prompt.ids, prompt.pixels_PCHW).items()
    }


def _one_turn(runner: GraphRunner, ids: list[int], pixels_PCHW: Array) -> Speed:
    encode = _median(lambda: _encode(runner, pixels_PCHW))
    embeds_1TD = runner.merge(ids, pixels_PCHW)
    prefill = _median(lambda: _decode(runner, embeds_1TD, runner.empty_cache())[0])
    _, cache = _decode(runner, embeds_1TD, runner.empty_cache())
    return Speed(encode, prefill, _median(lambda: _decode(runner, embeds_1TD[:, -1:], cache)[0]))


def _encode(runner: GraphRunner, pixels_PCHW: Array) -> float:
    runner.run(VISION_ENCODER, [pixels_PCHW])
    return runner.seconds


def _decode(runner: GraphRunner, embeds_1TD: Array, cache: Cache) -> tuple[float, Cache]:
    _, grown = runner.decode(embeds_1TD, cache, keep=1)
    return runner.seconds, grown


def _decoding(runner: GraphRunner, cache: Cache, embeds_1TD: Array) -> float:
    return _decode(runner, embeds_1TD, cache)[0]


def _in_turns(runs: Sequence[Callable[[], float]]) -> list[float]:
    """The least seconds of each, one run of each after the other: what else the machine does can only add to them."""
    found = [[run() for run in runs] for _ in range(1 + _FEWEST_TURNS)][1:]  # the first makes room for all others
    while sum(map(sum, found)) < _LONG_ENOUGH * len(runs):
        found.append([run() for run in runs])
    return [min(seconds) for seconds in zip(*found, strict=True)]


def _median(run: Callable[[], float]) -> float:
    run()  # the first one makes room for all others
    found = [run()]
    while len(found) < _MOST_RUNS and sum(found) < _LONG_ENOUGH:
        found.append(run())
    return statistics.median(found)
