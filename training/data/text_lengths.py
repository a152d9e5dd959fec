"""How long a stage's conversations are: counted on some of its records, or taken from what is known of public data.

Shapes: T tokens of a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..models.vlm import IMAGE_TOKEN
from ..recipe.recipe import DataRecipe
from .conversations import DataError, to_messages
from .label_mask import ConversationEncoder

SMALL = 4 * 2**20  # bytes of a file that is read whole
PLACES, RECORDS = 32, 64  # of a larger one: where records are read, and how many at each place
WINDOW = 2**20  # bytes read at a place
CHARACTERS = 4.0  # of English a token of Qwen2.5, where there is no tokenizer to ask: an assumption
TURN = 5  # tokens that ChatML puts around a turn
SYSTEM = 20  # tokens of Qwen2.5's own system turn
_OBJECT = re.compile(r'\{\s*"')  # in a text inside JSON the quote would be escaped
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class TextLengths:
    """A stage's samples (None: unknown) and the tokens of their texts: on average, supervised, and of the longest.

    `with_picture` is the share of samples that have one; `basis` says where all this is from.
    """

    samples: int | None
    text: float
    supervised: float
    longest: int
    with_picture: float
    basis: str


# Samples as LLaVA's authors count them. The tokens are assumptions: these files were not at hand when this was written.
KNOWN = {
    "blip_laion_cc_sbu_558k.json": TextLengths(558_128, 60, 20, 256, 1.0, "assumed for LLaVA's 558k captions"),
    "llava_v1_5_mix665k.json": TextLengths(665_298, 300, 150, 2048, 0.94, "assumed for LLaVA-1.5's mix of 665k"),
}
UNKNOWN = TextLengths(None, 200, 100, 1024, 1.0, "assumed: the records are not here and not known")


def text_lengths(data: DataRecipe, tokenizer: PreTrainedTokenizerBase | None) -> TextLengths:
    """Lengths of a stage's data: of its files if all are here, else what is known or assumed of them."""
    paths = [Path(path) for path in data.records]
    if all(path.is_file() for path in paths):
        return _combined([_measured(path, tokenizer) for path in paths])
    return _combined([KNOWN.get(path.name, UNKNOWN) for path in paths])


def _combined(parts: list[TextLengths]) -> TextLengths:
    known = [part.samples for part in parts if part.samples is not None]
    weights = [part.samples or 1 for part in parts]

    def mean(values: list[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    return TextLengths(
        sum(known) if len(known) == len(parts) else None,
        mean([part.text for part in parts]),
        mean([part.supervised for part in parts]),
        max(part.longest for part in parts),
        mean([part.with_picture for part in parts]),
        "; ".join(dict.fromkeys(part.basis for part in parts)),
    )


def _measured(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> TextLengths:
    size = path.stat().st_size
    records, taken = _sample(path, size)
    encoder = None if tokenizer is None else ConversationEncoder(tokenizer, IMAGE_TOKEN, 0)
    lengths = [length for record in records if (length := _length(record, encoder)) is not None]
    if not lengths:
        return UNKNOWN
    count = len(lengths)
    how = "counted by the tokenizer" if tokenizer else f"at {CHARACTERS:g} characters a token"
    which = "all" if taken == size else "some"
    return TextLengths(
        count if taken == size else round(count * size / taken),
        sum(text for text, _ in lengths) / count,
        sum(supervised for _, supervised in lengths) / count,
        max(text for text, _ in lengths),
        sum(bool(record.get("image")) for record in records) / len(records),
        f"{which} {count:,} records of {path.name}, {how}",
    )


def _sample(path: Path, size: int) -> tuple[list[dict[str, Any]], int]:
    """Records, and the bytes that they take of the file's `size`."""
    if size <= SMALL:
        # Not the reader of training: a file that it refuses is no reason not to estimate.
        return [record for record, _ in _records(path.read_text(encoding="utf-8", errors="replace"))], size
    records: list[dict[str, Any]] = []
    taken = 0
    with path.open("rb") as source:
        for place in range(PLACES):
            source.seek(place * size // PLACES)
            text = source.read(WINDOW).decode("utf-8", errors="replace")
            for number, (record, span) in enumerate(_records(text)):
                if number == RECORDS:
                    break
                records.append(record)
                taken += len(span.encode())
    return records, taken


def _records(text: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Records of a piece of JSON or JSONL, each with what lies between it and the next one's beginning.

    A record is told by its conversations, whatever key is its first. A record that the piece begins or ends within is
    left out; its turns and other objects are passed over one by one.
    """
    place = 0
    while found := _OBJECT.search(text, place):
        try:
            record, end = _DECODER.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            place = found.end()  # cut off, or no JSON
            continue
        following = _OBJECT.search(text, end)
        if isinstance(record.get("conversations"), list):
            yield record, text[found.start() : following.start() if following else end]
        place = end


def _length(record: dict[str, Any], encoder: ConversationEncoder | None) -> tuple[int, int] | None:
    """Tokens of a record's text without its picture's, and how many are supervised; None if it is broken."""
    try:
        messages = to_messages(record)
        if encoder is not None:
            return encoder.measure(messages)
    except DataError:
        return None  # training leaves it out, and `switchkd data check` says why
    sizes = [(turn["role"], round(len(_text(turn)) / CHARACTERS)) for turn in messages]
    answers = [size + 1 for role, size in sizes if role == "assistant"]
    return SYSTEM + sum(size + TURN for _, size in sizes), sum(answers)


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
