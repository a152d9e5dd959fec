"""Compares a bundle's graphs with a reference (PyTorch, or the bundle's own float32 graphs) on real prompts.

Shapes in names: C channels, H height, W width, P pictures, D hidden size, T tokens, S past + new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from .bundle import DECODER, EMBED_TOKENS, GRAPHS, VISION_ENCODER, Bundle
from .pixels import to_pixels
from .precisions import Bounds
from .prompt import expand_image_token, render_chat
from .verification import Array, GraphRunner, Greedy, TokensError, ValuesError, VerificationError

MAX_NEW_TOKENS = 16
# Pictures per prompt and its words: a text alone, short and long questions, two pictures.
QUESTIONS = (
    (1, "What is in the picture?"),
    (1, "Describe everything that you can see, from left to right, and then say how many things there are."),
    (0, "Hello!"),
    (2, "Which of the two pictures is brighter?"),
    (1, "Is it red?"),
    (1, "Read the text."),
)


class Reference(Protocol):
    """What both PyTorch and a GraphRunner can do."""

    def encode(self, pixels_PCHW: Array) -> Array:
        """Pictures to features_PND."""

    def embed(self, ids_BT: Array) -> Array:
        """Token ids to embeds_BTD."""

    def logits(self, embeds_BTD: Array) -> Array:
        """logits_BTV of whole prompts in one go."""

    def merge(self, ids: Sequence[int], pixels_PCHW: Array | None) -> Array:
        """embeds_1TD of a prompt, visual features in the places of its image tokens."""

    def greedy(self, ids: Sequence[int], pixels_PCHW: Array | None, max_new_tokens: int) -> Greedy:
        """The most likely answer, token by token."""


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt ready for the model."""

    ids: list[int]
    pixels_PCHW: Array | None


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
        """The numbers for the manifest."""
        return {"max_abs": self.max_abs, "relative_rms": self.relative_rms}


def sample_prompts(bundle: Bundle) -> list[SamplePrompt]:
    """Prompts of several lengths with pictures, the same every time."""
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    random = np.random.default_rng(0)
    return [_sample(bundle, tokenizer, pictures, question, random) for pictures, question in QUESTIONS]


def _sample(
    bundle: Bundle, tokenizer: Tokenizer, pictures: int, question: str, random: np.random.Generator
) -> SamplePrompt:
    content: list[dict[str, str]] = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    text = render_chat(
        bundle.chat_template,
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        special_tokens=bundle.special_tokens,
    )
    text = expand_image_token(text, bundle.model.image_token, bundle.model.tokens_per_picture)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    expected = pictures * bundle.model.tokens_per_picture
    if ids.count(bundle.model.image_token_id) != expected:
        raise VerificationError(
            f"the chat template and tokenizer make {ids.count(bundle.model.image_token_id)} image tokens for "
            f"{pictures} pictures, expected {expected}; check {bundle.model.image_token!r} in both"
        )
    if not pictures:
        return SamplePrompt(ids, None)
    return SamplePrompt(ids, np.stack([to_pixels(_picture(random), bundle.preprocessing) for _ in range(pictures)]))


def _picture(random: np.random.Generator) -> Image.Image:
    """Coloured blocks under a little noise: edges and flat parts, as in photos and drawings."""
    blocks = random.integers(0, 256, (4, 5, 3)).repeat(16, axis=0).repeat(16, axis=1)
    noise = random.integers(-20, 21, blocks.shape)
    return Image.fromarray(np.clip(blocks + noise, 0, 255).astype(np.uint8))


def compare(runner: GraphRunner, reference: Reference, bounds: Bounds) -> dict[str, Any]:
    """Measure every graph against the reference; raises ValuesError or TokensError beyond the bounds.

    Returns the numbers for the manifest.
    """
    prompts = sample_prompts(runner.bundle)
    vision, embeddings, logits = Difference(), Difference(), Difference()
    for prompt in prompts:
        if prompt.pixels_PCHW is not None:
            vision.add(runner.encode(prompt.pixels_PCHW), reference.encode(prompt.pixels_PCHW))
        ids_1T = np.array([prompt.ids], dtype=np.int64)
        embeddings.add(runner.embed(ids_1T), reference.embed(ids_1T))
    _compare_decoder(runner, reference, prompts, logits)
    tie = 2 * bounds.logits_max * max(1.0, logits.expected_rms)
    files = {name: runner.bundle.graph(name).file for name in GRAPHS}
    vision.check(files[VISION_ENCODER], bounds.vision_max, bounds.relative_rms)
    embeddings.check(files[EMBED_TOKENS], bounds.vision_max, bounds.relative_rms)
    logits.check(files[DECODER], bounds.logits_max, bounds.relative_rms)
    return {
        "image_features": vision.record(),
        "inputs_embeds": embeddings.record(),
        "logits": logits.record(),
        "greedy": _compare_answers(runner, reference, prompts, bounds, tie),
    }


def _compare_decoder(
    runner: GraphRunner, reference: Reference, prompts: list[SamplePrompt], difference: Difference
) -> None:
    """Whole prompts, prompts in pieces, and a batch with padding on the left, each against the reference's whole."""
    embeds = [reference.merge(prompt.ids, prompt.pixels_PCHW) for prompt in prompts]
    expected = [reference.logits(embeds_1TD) for embeds_1TD in embeds]
    for embeds_1TD, expected_1TV in zip(embeds, expected, strict=True):
        difference.add(runner.logits(embeds_1TD), expected_1TV)
        cache, length = runner.empty_cache(), embeds_1TD.shape[1]
        for start, end in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
            logits_1TV, cache = runner.decode(embeds_1TD[:, start:end], cache)
            difference.add(logits_1TV, expected_1TV[:, start:end])
    longest = max(embeds_1TD.shape[1] for embeds_1TD in embeds)
    padded_BTD = np.concatenate([_pad_left(embeds_1TD, longest) for embeds_1TD in embeds])
    mask_BS = np.stack([np.arange(longest) >= longest - embeds_1TD.shape[1] for embeds_1TD in embeds]).astype(np.int64)
    # The last token goes in alone, so that padding also lies in the cache.
    head_BTV, cache = runner.decode(padded_BTD[:, :-1], runner.empty_cache(len(embeds)), mask_BS[:, :-1])
    last_BTV, _ = runner.decode(padded_BTD[:, -1:], cache, mask_BS)
    batch_BTV = np.concatenate([head_BTV, last_BTV], axis=1)
    for row, expected_1TV in enumerate(expected):
        difference.add(batch_BTV[row : row + 1, longest - expected_1TV.shape[1] :], expected_1TV)


def _pad_left(embeds_1TD: Array, length: int) -> Array:
    return np.pad(embeds_1TD, ((0, 0), (length - embeds_1TD.shape[1], 0), (0, 0)))


def _compare_answers(
    runner: GraphRunner, reference: Reference, prompts: list[SamplePrompt], bounds: Bounds, tie: float
) -> dict[str, float | int | None]:
    """Greedy answers from pictures and ids alone: how many are equal, and where the others part.

    Where both tokens are likely within `tie` of each other no precision can decide, and nothing is refused.
    """
    equal, divergences = 0, []
    for prompt in prompts:
        expected = reference.greedy(prompt.ids, prompt.pixels_PCHW, MAX_NEW_TOKENS)
        got = runner.greedy(prompt.ids, prompt.pixels_PCHW, MAX_NEW_TOKENS)
        if got.tokens == expected.tokens:
            equal += 1
            continue
        first = next(i for i, (a, b) in enumerate(zip(got.tokens, expected.tokens, strict=False)) if a != b)
        divergences.append(first)
        row_V = expected.logits_TV[first]
        margin = float(row_V[expected.tokens[first]] - row_V[got.tokens[first]])
        if bounds.same_tokens and margin > tie:
            raise TokensError(
                f"{runner.bundle.precision}: greedy answers part at token {first}: {got.tokens[first]} in place of "
                f"{expected.tokens[first]}, which the reference prefers by {margin:.2e} (a tie is {tie:.2e})"
            )
    return {
        "prompts": len(prompts),
        "equal": equal,
        "max_new_tokens": MAX_NEW_TOKENS,
        "mean_first_divergence": float(np.mean(divergences)) if divergences else None,
    }
