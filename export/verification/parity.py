"""Compares a bundle's graphs with a reference (PyTorch, or the bundle's own float32 graphs) on real prompts.

Shapes in names: C channels, H height, W width, P pictures, N visual tokens, D hidden size, T tokens, R some of them,
S past + new tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from ..contract.bundle import DECODER, EMBED_TOKENS, FUSED, GRAPHS, VISION_ENCODER, Bundle
from ..contract.json_fields import Reader
from ..contract.pixels import to_pixels
from ..contract.prompt import PromptEncoder, read_tokenizer
from ..graphs.tracing import ExportError
from ..quantisation.precisions import Bounds
from .graph_runner import (
    MAX_PAST,
    REMEMBERED,
    Array,
    GraphRunner,
    Greedy,
    ScoreError,
    TokensError,
    ValuesError,
    VerificationError,
)
from .questions import FIRST, MORE, further_question

MAX_NEW_TOKENS = 16
MAX_ROWS = 64  # places of a prompt at which logits are compared: all of them would be half a gigabyte a picture
SLACK = 1.5  # another processor rounds otherwise
LOST = 0.1  # of equal answers, for the same reason
PAIRS = 200  # of pictures and questions whose greedy answers are compared
_LIKELY = 64  # tokens of an answer's place whose logits are kept: those of all would be gigabytes in 200 answers

PairsDone = Callable[[int, int], None]  # how many pairs, and of how many


class Model(Protocol):
    """What both PyTorch and a GraphRunner can do."""

    def encode(self, pixels_PCHW: Array) -> Array:
        """Pictures to features_PND."""

    def embed(self, ids_BT: Array) -> Array:
        """Token ids to embeds_BTD."""

    def logits(self, embeds_1TD: Array, rows_R: Array) -> Array:
        """logits_RV at some places of a whole prompt."""

    def encode_ahead(self, pictures: Iterable[Array]) -> None:
        """Encode the pictures of up to REMEMBERED prompts that come next, where it saves opening graphs in turns."""

    def greedy(self, ids: Sequence[int], pixels_PCHW: Array | None, max_new_tokens: int) -> Greedy:
        """The most likely answer, token by token."""


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt ready for the model; `places_T` is true at image tokens. Those to compare `closely` come first."""

    ids: list[int]
    pixels_PCHW: Array | None
    places_T: Array
    closely: bool = True


@dataclass(frozen=True)
class Answer:
    """A reference's greedy answer, and its logits of the likeliest tokens at every place of it."""

    tokens: list[int]
    likely_TK: Array
    logits_TK: Array

    @classmethod
    def of(cls, greedy: Greedy) -> "Answer":
        """The answer without the logits of what is unlikely."""
        kept = min(_LIKELY, greedy.logits_TV.shape[1])
        likely_TK = np.argpartition(greedy.logits_TV, -kept, axis=1)[:, -kept:]
        return cls(greedy.tokens, likely_TK, np.take_along_axis(greedy.logits_TV, likely_TK, axis=1))

    def margin(self, place: int, token: int) -> float:
        """By how much the reference prefers its own token to this one; at least by so much, where it is unlikely."""
        logits_K = self.logits_TK[place]
        found = logits_K[self.likely_TK[place] == token]
        return float(logits_K.max() - (found[0] if found.size else logits_K.min()))


@dataclass(frozen=True)
class Values:
    """What a reference's parts give for one prompt."""

    features_PND: Array | None
    embeds_1TD: Array  # of the ids
    merged_1TD: Array  # with features in the places of image tokens
    rows_R: Array
    logits_RV: Array


@dataclass(frozen=True)
class Expected:
    """What a reference says to one prompt; with it the reference itself is no longer needed."""

    answer: Answer
    values: Values | None  # where the prompt is compared closely


def record(reference: Model, prompts: Collection[SamplePrompt], pairs_done: PairsDone | None = None) -> list[Expected]:
    """Ask a reference everything that `compare` will compare."""
    expected: list[Expected] = []
    for prompt in _in_blocks(reference, prompts):
        values = _values(reference, prompt) if prompt.closely else None
        answer = reference.greedy(prompt.ids, prompt.pixels_PCHW, MAX_NEW_TOKENS)
        expected.append(Expected(Answer.of(answer), values))
        if pairs_done is not None:
            pairs_done(len(expected), len(prompts))
    return expected


def _values(reference: Model, prompt: SamplePrompt) -> Values:
    features_PND = None if prompt.pixels_PCHW is None else reference.encode(prompt.pixels_PCHW)
    embeds_1TD = reference.embed(np.array([prompt.ids], dtype=np.int64))
    merged_1TD = embeds_1TD.copy()
    if features_PND is not None:
        merged_1TD[0, prompt.places_T] = features_PND.reshape(-1, merged_1TD.shape[-1])
    rows_R = np.unique(np.linspace(0, len(prompt.ids) - 1, MAX_ROWS).astype(np.int64))
    return Values(features_PND, embeds_1TD, merged_1TD, rows_R, reference.logits(merged_1TD, rows_R))


def _in_blocks(model: Model, prompts: Iterable[SamplePrompt]) -> Iterator[SamplePrompt]:
    """The prompts one by one, the pictures of a block of them encoded before it."""
    rest = iter(prompts)
    while block := list(islice(rest, REMEMBERED)):
        model.encode_ahead(prompt.pixels_PCHW for prompt in block if prompt.pixels_PCHW is not None)
        yield from block


class Difference:
    """Gathers the largest absolute and the relative root-mean-square difference over many arrays."""

    def __init__(self) -> None:
        self.max_abs = 0.0
        self._difference = self._expected = 0.0
        self._count = 0

    def add(self, got: Array, expected: Array) -> None:
        """Take in one more pair of equal shape."""
        difference = got.astype(np.float64) - expected.astype(np.float64)
        self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        self._difference += float(np.square(difference).sum())
        self._expected += float(np.square(expected.astype(np.float64)).sum())
        self._count += expected.size

    @property
    def expected_rms(self) -> float:
        """How large the expected values are."""
        return float(np.sqrt(self._expected / max(1, self._count)))

    @property
    def relative_rms(self) -> float:
        """Root mean square of the difference over that of the expected values."""
        return float(np.sqrt(self._difference / max(self._expected, 1e-30)))

    def check(self, what: str, max_abs: float, relative_rms: float) -> None:
        """Raise ValuesError beyond a bound; the absolute one grows with the values where these are above 1."""
        allowed = max_abs * max(1.0, self.expected_rms)
        if not (self.max_abs <= allowed and self.relative_rms <= relative_rms):
            raise ValuesError(
                f"{what}: differs from the reference by up to {self.max_abs:.2e} (allowed {allowed:.2e}) and "
                f"{self.relative_rms:.2e} relative (allowed {relative_rms:.2e})"
            )

    def record(self) -> dict[str, float]:
        """Return the numbers for the manifest."""
        return {"max_abs": self.max_abs, "relative_rms": self.relative_rms}


def sample_prompts(bundle: Bundle, *, full: bool = False) -> list[SamplePrompt]:
    """Prompts of several lengths with pictures, the same every time; `full` adds long ones."""
    tokenizer = read_tokenizer(bundle.tokenizer_path)
    random = np.random.default_rng(0)
    prompts = [_sample(bundle, tokenizer, pictures, question, random) for pictures, question in FIRST]
    if full:
        room = bundle.model.max_positions - MAX_NEW_TOKENS
        more = [_sample(bundle, tokenizer, pictures, question, random) for pictures, question in MORE]
        prompts += [prompt for prompt in more if len(prompt.ids) <= room]
        length = min(MAX_PAST + 1, room)
        prompts.append(SamplePrompt((prompts[2].ids * length)[:length], None, np.zeros(length, dtype=bool)))
    return prompts


def check_pairs(count: int) -> None:
    """Raise ExportError where so few pairs cannot hold those that are compared closely."""
    if count < len(FIRST):
        raise ExportError(f"pairs is {count}; give {len(FIRST)} or more, since so many are always compared")


class Pairs(Collection[SamplePrompt]):
    """`sample_prompts`, and generated pairs of pictures and a question after them: `count` in all, at least the former.

    The latter are made anew, and equal, each time they are asked for: the pixels of all of them are gigabytes.
    """

    def __init__(self, bundle: Bundle, count: int = PAIRS, *, full: bool = False) -> None:
        self.first = sample_prompts(bundle, full=full)
        self.further = max(0, count - len(self.first))
        self._bundle = bundle
        self._tokenizer = read_tokenizer(bundle.tokenizer_path)

    def __len__(self) -> int:
        return len(self.first) + self.further

    def __contains__(self, prompt: object) -> bool:
        return any(prompt is own for own in self)

    def __iter__(self) -> Iterator[SamplePrompt]:
        yield from self.first
        for number in range(self.further):
            random = np.random.default_rng([1, number])
            prompt = _sample(self._bundle, self._tokenizer, *further_question(number), random, _varied_picture)
            yield replace(prompt, closely=False)


def _sample(
    bundle: Bundle,
    tokenizer: Tokenizer,
    pictures: int,
    question: str,
    random: np.random.Generator,
    make_picture: Callable[[np.random.Generator], Image.Image] | None = None,
) -> SamplePrompt:
    make_picture = make_picture or _picture
    pixels = [to_pixels(make_picture(random), bundle.preprocessing) for _ in range(pictures)]
    return make_prompt(bundle, tokenizer, question, np.stack(pixels) if pixels else None)


def make_prompt(bundle: Bundle, tokenizer: Tokenizer, question: str, pixels_PCHW: Array | None) -> SamplePrompt:
    """A question about pictures in the bundle's chat template; raises PromptError and VerificationError."""
    pictures = 0 if pixels_PCHW is None else len(pixels_PCHW)
    content: list[dict[str, str]] = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    encoder = PromptEncoder.of(bundle, tokenizer)
    ids = encoder.ids(encoder.render([{"role": "user", "content": content}]))
    expected = pictures * bundle.model.tokens_per_picture
    if ids.count(bundle.model.image_token_id) != expected:
        raise VerificationError(
            f"the chat template and tokenizer make {ids.count(bundle.model.image_token_id)} image tokens for "
            f"{pictures} pictures, expected {expected}; check {bundle.model.image_token!r} in both"
        )
    return SamplePrompt(ids, pixels_PCHW, np.array(ids) == bundle.model.image_token_id)


def _picture(random: np.random.Generator) -> Image.Image:
    """Coloured blocks under a little noise: edges and flat parts, as in photos and drawings."""
    blocks = random.integers(0, 256, (4, 5, 3)).repeat(16, axis=0).repeat(16, axis=1)
    noise = random.integers(-20, 21, blocks.shape)
    return Image.fromarray(np.clip(blocks + noise, 0, 255).astype(np.uint8))


def _varied_picture(random: np.random.Generator) -> Image.Image:
    """The same in other layouts, sizes, ranges of colour (down to nearly grey) and strengths of noise."""
    rows, columns, side, noise = random.integers((1, 1, 8, 1), (10, 10, 49, 41))
    lowest, highest = np.sort(random.integers(0, 256, 2))
    tint_3 = random.uniform(0.2, 1.0, 3)
    blocks = random.integers(lowest, highest + 1, (rows, columns, 3)).repeat(side, axis=0).repeat(side, axis=1)
    noisy = blocks * tint_3 + random.integers(-noise, noise + 1, blocks.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def compare(
    runner: GraphRunner,
    prompts: Collection[SamplePrompt],
    expected: Sequence[Expected],
    bounds: Bounds,
    pairs_done: PairsDone | None = None,
) -> dict[str, Any]:
    """Measure every graph against what a reference said; raises ValuesError or TokensError beyond the bounds.

    Returns the numbers for the manifest.
    """
    vision, embeddings, logits = Difference(), Difference(), Difference()
    close = [
        (prompt, want.values)
        for prompt, want in zip(takewhile(lambda prompt: prompt.closely, prompts), expected, strict=False)
        if want.values is not None
    ]
    for prompt, want in close:
        if prompt.pixels_PCHW is not None and want.features_PND is not None:
            vision.add(runner.encode(prompt.pixels_PCHW), want.features_PND)
    for prompt, want in close:
        embeddings.add(runner.embed(np.array([prompt.ids], dtype=np.int64)), want.embeds_1TD)
        _compare_decoder(runner, want, logits)
    wanted = [want for _, want in close]
    _compare_padded(runner, wanted[:3:2], logits)  # a picture and a text
    if len(wanted) > len(FIRST):
        _compare_padded(runner, wanted[2:6], logits)
    tie = 2 * bounds.logits_max * max(1.0, logits.expected_rms)
    files = {name: runner.bundle.graph(name).file for name in GRAPHS}
    vision.check(files[VISION_ENCODER], bounds.vision_max, bounds.relative_rms)
    embeddings.check(files[EMBED_TOKENS], bounds.vision_max, bounds.relative_rms)
    logits.check(files[DECODER], bounds.logits_max, bounds.relative_rms)
    return {
        "image_features": vision.record(),
        "inputs_embeds": embeddings.record(),
        "logits": logits.record(),
        "greedy": _compare_answers(runner, prompts, expected, bounds, tie, pairs_done),
    }


def _compare_decoder(runner: GraphRunner, want: Values, difference: Difference) -> None:
    """A prompt in one go, and in three pieces with a cache."""
    difference.add(runner.logits(want.merged_1TD, want.rows_R), want.logits_RV)
    cache, length = runner.empty_cache(), want.merged_1TD.shape[1]
    for start, end in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
        logits_1TV, cache = runner.decode(want.merged_1TD[:, start:end], cache)
        inside = (want.rows_R >= start) & (want.rows_R < end)
        difference.add(logits_1TV[0, want.rows_R[inside] - start], want.logits_RV[inside])


def _compare_padded(runner: GraphRunner, wants: list[Values], difference: Difference) -> None:
    """Prompts as a batch with padding on the left, or on the right where the decoder is fused.

    The last token of each goes in alone, so padding lies in the cache too.
    """
    longest = max(want.merged_1TD.shape[1] for want in wants)
    counts = [longest - want.merged_1TD.shape[1] for want in wants]
    sides = [(0, count) if runner.form == FUSED else (count, 0) for count in counts]
    heads_BTD = np.concatenate(
        [np.pad(want.merged_1TD[:, :-1], ((0, 0), side, (0, 0))) for want, side in zip(wants, sides, strict=True)]
    )
    mask_BT = np.stack([np.pad(np.ones(longest - 1 - sum(side), dtype=np.int64), side) for side in sides])
    head_BTV, cache = runner.decode(heads_BTD, runner.empty_cache(len(wants)), mask_BT)
    lasts_B1D = np.concatenate([want.merged_1TD[:, -1:] for want in wants])
    last_BTV, _ = runner.decode(lasts_B1D, cache, np.pad(mask_BT, ((0, 0), (0, 1)), constant_values=1))
    for row, (want, (left, _right)) in enumerate(zip(wants, sides, strict=True)):
        difference.add(head_BTV[row, want.rows_R[:-1] + left], want.logits_RV[:-1])
        difference.add(last_BTV[row], want.logits_RV[-1:])


def recorded_pairs(recorded: Mapping[str, Any]) -> int:
    """On how many pairs the precisions of a manifest's `verification` answered; PAIRS where it does not say."""
    greedy = [record.get("greedy") for record in recorded.values() if isinstance(record, dict)]
    counts = [score.get("prompts") for score in greedy if isinstance(score, dict)]
    return max((count for count in counts if isinstance(count, int)), default=PAIRS)


def check_scores(precision: str, found: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Raise ScoreError where a precision does worse than the record of its export, by more than machines differ.

    Equal answers are compared where both times the same pairs were asked.
    """
    for name in ("image_features", "inputs_embeds", "logits"):
        score = recorded.get(name, {}).get("relative_rms")
        if not isinstance(score, float):
            raise ScoreError(f"{precision}: the manifest records no score of {name}; export again")
        if found[name]["relative_rms"] > SLACK * score + 1e-4:
            raise ScoreError(
                f"{precision}: {name} are off by {found[name]['relative_rms']:.2e}, at export it was {score:.2e}; this "
                "machine computes the graph otherwise, or it was altered"
            )
    score = Reader(recorded, f"verification of {precision}").object("greedy")
    equal, prompts = found["greedy"]["equal"], found["greedy"]["prompts"]
    if prompts == score.count("prompts") and equal < score.count("equal") - LOST * prompts - 1:
        raise ScoreError(
            f"{precision}: {equal} of {prompts} greedy answers are equal, at export it was {score.count('equal')}; "
            "this machine computes the graph otherwise, or it was altered"
        )


def _compare_answers(
    runner: GraphRunner,
    prompts: Collection[SamplePrompt],
    wants: Sequence[Expected],
    bounds: Bounds,
    tie: float,
    pairs_done: PairsDone | None,
) -> dict[str, float | int | None]:
    """Greedy answers from pictures and ids alone: how many are equal, and where the others part.

    Where both tokens are likely within `tie` of each other no precision can decide, and nothing is refused.
    """
    equal, divergences = 0, []
    for number, (prompt, want) in enumerate(zip(_in_blocks(runner, prompts), wants, strict=True), 1):
        got, expected = runner.greedy(prompt.ids, prompt.pixels_PCHW, MAX_NEW_TOKENS).tokens, want.answer
        if pairs_done is not None:
            pairs_done(number, len(prompts))
        if got == expected.tokens:
            equal += 1
            continue
        first = next(i for i, (a, b) in enumerate(zip(got, expected.tokens, strict=False)) if a != b)
        divergences.append(first)
        margin = expected.margin(first, got[first])
        if bounds.same_tokens and margin > tie:
            raise TokensError(
                f"{runner.bundle.precision}: greedy answers to pair {number} of {len(prompts)} part at token {first}: "
                f"{got[first]} in place of {expected.tokens[first]}, which the reference prefers by {margin:.2e} (a "
                f"tie is {tie:.2e})"
            )
    return {
        "prompts": len(prompts),
        "equal": equal,
        "max_new_tokens": MAX_NEW_TOKENS,
        "mean_first_divergence": float(np.mean(divergences)) if divergences else None,
    }
